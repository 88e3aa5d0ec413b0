"""`packtrain compare`: variants of a recipe against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from packtrain.cli.options import Overrides, RecipePath


def compare(
    recipe: RecipePath,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Default: out/compare_NAME.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Remove the runs that are there first.")] = False,
) -> None:
    """Run variants of a recipe against each other, interleaved, each in a fresh process, and write a report.

    Interrupted, the same command continues: finished runs are kept. A variant that fails is a row of the report.
    """
    from packtrain.compare.run import run_comparison

    say = lambda line: Console().print(line, soft_wrap=True)  # noqa: E731
    run_comparison(recipe, overrides or [], output_dir=out, restart=restart, say=say)
