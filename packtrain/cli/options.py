"""Arguments and options that several verbs share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from packtrain.recipe import Recipe

RANK = int(os.environ.get("RANK", "0"))
LAST = "last"  # the value of a bare --resume

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file; see recipes/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the recipe, as `section.key=value` or `key=value`; repeatable. "
        "The value is YAML: `lora.r=8`, `lora.target_modules=[q_proj, v_proj]`, `lora=null`.",
    ),
]
Gpus = Annotated[int, typer.Option(min=1, metavar="N", help="Devices (ranks) to plan for.")]


def load_checked(path: Path, overrides: list[str] | None) -> Recipe:
    """The checked recipe, with a strategy that exists."""
    from packtrain.packing.strategies import resolve_strategy
    from packtrain.recipe import load_recipe

    recipe = load_recipe(path, overrides or [])
    resolve_strategy(recipe.batching.strategy)
    return recipe
