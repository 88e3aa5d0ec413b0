"""Arguments and options that several verbs share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from packtrain.errors import PacktrainError

if TYPE_CHECKING:
    from packtrain.recipe.recipe import Recipe

RANK = int(os.environ.get("RANK", "0"))
LAST = "last"  # the value of a bare --resume

RecipePath = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE", help="A YAML file, or the name of a recipe that comes with packtrain (quickstart)."
    ),
]
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


REMASKING = ("low_confidence", "random", "margin", "entropy")
END_TOKEN_POLICIES = ("none", "suppress_logits", "suppress_confidence", "ban_pad")


Remasking = Annotated[str, typer.Option(metavar="NAME", help=f"What is written first: {', '.join(REMASKING)}.")]
Temperature = Annotated[float, typer.Option(min=0, metavar="T", help="0 takes the likeliest token, 1 draws one.")]
Policy = Annotated[
    str,
    typer.Option(metavar="NAME", help=f"Keeps ends and pads from coming too soon: {', '.join(END_TOKEN_POLICIES)}."),
]


def load_checked(path: Path, overrides: list[str] | None) -> Recipe:
    """Returns the checked recipe of a file, or of that name."""
    from packtrain.recipe.reader import load_recipe

    return load_recipe(find_recipe(path), overrides or [])


def find_recipe(path: Path, *, below: str = "") -> Path:
    """Returns the file of a recipe by path or name; an unreadable path is left to who reads it."""
    from packtrain.recipe.shipped import find_shipped

    if path.exists():
        return path
    try:
        return find_shipped(path, "recipes", kind="recipe", below=below)
    except PacktrainError as error:
        raise PacktrainError(error.what, key="RECIPE", value=str(path), fix=error.fix) from None
