"""`packtrain compare`: compare variants of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from packtrain.cli.options import Overrides, RecipePath
from packtrain.recipe.shipped import find_recipe


def compare(
    recipe: RecipePath,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Directory for runs and report. Default: out/compare_NAME.")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Remove existing runs first.")] = False,
) -> None:
    """Compare variants of a recipe: run them in turn, each in a fresh process, print a verdict and write a report.

    RECIPE is a comparison (`recipes/compare/`; `packtrain keys compare` explains its keys) or any recipe to train, whose
    strategy is compared with the usual ones over twelve updates, or `training.max_steps` of the recipe where that is fewer.
    After an interruption the same command continues, and finished runs are kept. A variant that fails is
    listed in the report.
    """
    console = Console()
    path = find_recipe(recipe, below="compare")
    console.print(
        f"{path.stem}: loading torch and transformers, reading rows", style="dim", markup=False, highlight=False
    )
    from packtrain.compare.run import run_comparison

    say = lambda line: console.print(line, soft_wrap=True, highlight=False, markup=False)  # noqa: E731
    run_comparison(path, overrides or [], output_dir=out, restart=restart, say=say, console=console)
