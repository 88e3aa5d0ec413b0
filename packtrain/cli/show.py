"""`packtrain show`: print one batch as the model gets it."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from packtrain.cli.options import Gpus, Overrides, RecipePath, load_checked


def show(
    recipe: RecipePath,
    overrides: Overrides = None,
    step: Annotated[int, typer.Option(min=0, metavar="N", help="Update to show.")] = 0,
    rank: Annotated[int, typer.Option(min=0, metavar="R", help="Rank to show.")] = 0,
    micro_batch: Annotated[int, typer.Option(min=0, metavar="M", help="Micro-batch of that rank to show.")] = 0,
    examples: Annotated[
        str | None, typer.Option(metavar="IDS", help="Show these examples instead: `3,17`, or a run's nonfinite.jsonl.")
    ] = None,
    lines: Annotated[
        str | None,
        typer.Option(
            metavar="LINES", help="Show the rows on these lines, as errors name them: `17`, `3,17`, or `a.jsonl:17`."
        ),
    ] = None,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Show held-out rows: those of --lines or --examples, or the first.")
    ] = False,
    documents: Annotated[int, typer.Option(min=0, metavar="N", help="Number of documents whose text is printed.")] = 8,
    gpus: Gpus = 1,
) -> None:
    """Print one batch exactly as the model gets it: documents, positions, loss mask and text.

    Supervised tokens stand between marks, such as [[ and ]], and have a colour of their own.
    """
    from packtrain.cli.batch_view import show_batch

    show_batch(
        load_checked(recipe, overrides),
        Console(),
        step=step,
        rank=rank,
        micro_batch=micro_batch,
        examples=examples,
        lines=lines,
        held_out=held_out,
        documents=documents,
        world_size=gpus,
    )
