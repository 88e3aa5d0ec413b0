"""`packtrain audit`, `compare` and `report`: what is asked of models and strategies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from packtrain.cli.options import Overrides, RecipePath
from packtrain.errors import PacktrainError


def audit(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_RECIPE", help="A recipe, Hub name, directory, architecture (`llama`), or `config: {...}`."
        ),
    ],
    implementations: Annotated[
        str, typer.Option("--attn-implementation", metavar="NAMES", help="`all`, or some, for example `sdpa,eager`.")
    ] = "all",
    layouts: Annotated[
        str, typer.Option("--layout", metavar="NAMES", help="`all`, or some, for example `flat,padded`.")
    ] = "all",
    device: Annotated[str, typer.Option(help="Where to run it: auto, cpu, cuda.")] = "auto",
) -> None:
    """Ask a model itself whether documents of a batch see each other, for every attention, layout and mode.

    Exits with 1 where a recipe's own combination of model, layout and attention leaks.
    """
    from packtrain.cli.show_audit import show_audit

    safe = show_audit(
        target,
        Console(),
        implementations=None if implementations == "all" else implementations.split(","),
        layouts=None if layouts == "all" else layouts.split(","),
        device=device,
    )
    raise typer.Exit(0 if safe else 1)


def compare(
    recipe: RecipePath,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Default: out/compare_NAME.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Remove the runs that are there first.")] = False,
) -> None:
    """Run variants of a recipe against each other, interleaved, each in a fresh process, and write a report.

    Interrupted, the same command continues: finished runs are kept. A variant that fails is a row of the report.
    A file with the section `rainbow_oracle:` runs that grid instead.
    """
    from packtrain.experiments.comparison.compare import compare as run

    if recipe.is_file() and "\nrainbow_oracle:" in "\n" + recipe.read_text(encoding="utf-8"):
        from packtrain.experiments.rainbow.oracle import run_recipe

        if overrides:
            raise PacktrainError("a grid takes no --set", where=str(recipe), fix="edit the file, or a copy of it")
        directory = run_recipe(recipe, output_dir=out)
        Console().print((directory / "oracle.md").read_text(), soft_wrap=True)
        return
    say = lambda line: Console().print(line, soft_wrap=True)  # noqa: E731
    run(recipe, overrides or [], output_dir=out, restart=restart, say=say)


def report(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Directories of `packtrain compare`.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where the page goes.")] = None,
) -> None:
    """Rebuild the report of one comparison, or lay several side by side, from stored files alone."""
    from packtrain.experiments.comparison.report import write_report

    Console().print(f"report: {write_report(directories, out=out)}", soft_wrap=True)
