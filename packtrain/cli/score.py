"""`packtrain score`: score the training examples of a recipe by how hard they are for a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from packtrain.cli.options import Overrides, RecipePath, load_checked


def score(
    recipe: RecipePath,
    overrides: Overrides = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RUN_OR_MODEL",
            help="A run, a model or a checkpoint to score with; repeatable, for the mean over several. "
            "Default: the model that the recipe starts from.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Parquet file to write. Default: `data.keep.scores`, or scores.parquet in `training.output_dir`.",
        ),
    ] = None,
) -> None:
    """Score the training examples of a recipe: loss, perplexity and EL2N of each.

    They are computed in the layout of the recipe's strategy, without padding by default, and written with row, source,
    length and supervised tokens of each example. `data.keep` in a recipe trains on the share of the examples that scores
    highest, lowest or in the middle; scored are all, whatever it says.
    """
    from packtrain.training.scoring import score as run

    loaded, console = load_checked(recipe, overrides), Console()
    keep = loaded.data.keep
    named = keep.scores if keep is not None else None
    target = (out or Path(named or Path(loaded.training["output_dir"], "scores.parquet"))).expanduser()
    scored = run(loaded, out=target, models=model or [], console=console)
    print("\n".join(scored.lines()))
    print(f"\nwrote {target}")
