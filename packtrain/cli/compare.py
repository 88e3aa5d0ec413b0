"""`packtrain compare`: compare variants of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from packtrain.cli.options import Overrides, RecipePath


def compare(
    recipe: RecipePath,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Directory for runs and report. Default: out/compare_NAME.")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Remove existing runs first.")] = False,
) -> None:
    """Compare variants of a recipe: run them in turn, each in a fresh process, and write a report.

    After an interruption the same command continues, and finished runs are kept. A variant that fails is listed in the
    report.
    """
    from packtrain.compare.run import run_comparison

    say = lambda line: Console().print(line, soft_wrap=True)  # noqa: E731
    run_comparison(recipe, overrides or [], output_dir=out, restart=restart, say=say)
