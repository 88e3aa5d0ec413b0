"""Defines arguments and options that several verbs share."""

from __future__ import annotations

import os
from glob import escape, glob
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from packtrain.recipe.recipe import Recipe

RANK = int(os.environ.get("RANK", "0")) if os.environ.get("RANK", "0").isdecimal() else 0  # training says what is wrong
LAST = "last"  # the value of a bare --resume


def complete_recipe(incomplete: str) -> list[str]:
    """Returns the recipes that a shell may complete a word to: YAML files, and the names of those that are shipped."""
    from packtrain.recipe.shipped import SHARE

    files = glob(f"{escape(incomplete)}*.y*ml") + glob(f"{escape(incomplete)}*/")
    shipped = sorted(file.stem for file in (SHARE / "recipes").glob("*.yaml"))
    return [name for name in shipped if name.startswith(incomplete)] + sorted(files)


def complete_key(incomplete: str) -> list[str]:
    """Returns the keys of a recipe, as `section.key=`, that a shell may complete a word to; also from `key` alone."""
    from packtrain.recipe.reader import fields_of
    from packtrain.recipe.recipe import SECTIONS

    keys = [(section, key) for section in SECTIONS for key in fields_of(section)]
    return [f"{section}.{key}=" for section, key in keys if f"{section}.{key}".startswith(incomplete)] or [
        f"{key}=" for _, key in keys if key.startswith(incomplete)
    ]


def complete_launch(incomplete: str) -> list[str]:
    """Returns the launch files that a shell may complete a word to: those here, and the names of those that are shipped."""
    from packtrain.recipe.shipped import SHARE

    shipped = sorted(file.stem for file in (SHARE / "launch").glob("*.yaml"))
    return [name for name in shipped if name.startswith(incomplete)] + sorted(glob(f"{escape(incomplete)}*.y*ml"))


def complete_section(incomplete: str) -> list[str]:
    """Returns what `packtrain keys` lists the keys of, as far as a shell may complete a word to it."""
    from packtrain.recipe.recipe import SECTIONS

    return [name for name in (*SECTIONS, "compare") if name.startswith(incomplete)]


RecipePath = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE",
        help="YAML file, or the name of a recipe that comes with packtrain (quickstart).",
        autocompletion=complete_recipe,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the recipe, as `section.key=value` or `key=value`; repeatable. "
        "The value is YAML: `lora.r=8`, `lora.target_modules=[q_proj, v_proj]`, `lora=null`.",
        autocompletion=complete_key,
    ),
]
Gpus = Annotated[int, typer.Option(min=1, metavar="N", help="Number of GPUs (ranks) to plan for.")]


REMASKING = ("low_confidence", "random", "margin", "entropy")
END_TOKEN_POLICIES = ("none", "suppress_logits", "suppress_confidence", "ban_pad")


Remasking = Annotated[
    str, typer.Option(metavar="NAME", help=f"Order in which tokens are written: {', '.join(REMASKING)}.")
]
Temperature = Annotated[
    float, typer.Option(min=0, metavar="T", help="Sampling temperature; 0 takes the most likely token.")
]
Policy = Annotated[
    str,
    typer.Option(
        metavar="NAME", help=f"How to keep end and pad tokens from coming too early: {', '.join(END_TOKEN_POLICIES)}."
    ),
]


def load_checked(path: Path, overrides: list[str] | None) -> Recipe:
    """Loads and checks a recipe, by path or name."""
    from packtrain.recipe.reader import load_recipe

    return load_recipe(path, overrides or [])
