"""`packtrain plan`: lengths, strategies and memory of a recipe, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from packtrain.cli.options import Gpus, Overrides, load_checked
from packtrain.errors import PacktrainError
from packtrain.recipe.sections import MAX_TOKENS

STRATEGY = "balanced"  # of `--lengths` without a recipe


def plan(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="A YAML file; not needed with --lengths.")
    ] = None,
    overrides: Overrides = None,
    every: Annotated[bool, typer.Option("--all", help="One row for every strategy, not only the recipe's.")] = False,
    gpus: Gpus = 1,
    lengths: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Plan for these lengths (.npy, integers), not for the data.")
    ] = None,
    strategy: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"Without a recipe: the strategy ({STRATEGY} by default).")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help=f"Without a recipe: most tokens in a micro-batch ({MAX_TOKENS})."),
    ] = None,
    recommend: Annotated[bool, typer.Option("--recommend", help="Say which strategy to use, and why.")] = False,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Estimate memory per GPU and check whether it fits, for example `80GiB`."),
    ] = None,
    launch: Annotated[
        str | None, typer.Option(metavar="NAME", help="With --memory: only the engine that launch/NAME.yaml starts.")
    ] = None,
) -> None:
    """Show the lengths of the examples and what strategies make of them, before anything is trained.

    Rows are tokenised once and remembered; after that the answer takes a second and no GPU, torch or tokenizer.
    Lengths may be a billion: `packtrain plan --lengths lengths.npy --max-tokens 8192`.
    """
    from packtrain.cli.memory_table import asked_memory
    from packtrain.cli.strategy_table import show_lengths, show_plan

    asked = asked_memory(memory, launch)
    if recipe is None:
        if lengths is None:
            raise PacktrainError("nothing to plan for", key="plan", fix="name a recipe, or --lengths lengths.npy")
        if overrides or recommend or asked:
            what = "--set, --recommend and --memory need a recipe"
            raise PacktrainError(what, key="plan", fix="name one, or leave them out")
        show_lengths(
            lengths,
            Console(),
            strategy=strategy or STRATEGY,
            max_tokens=max_tokens or MAX_TOKENS,
            every=every,
            world_size=gpus,
        )
        return
    if strategy is not None or max_tokens is not None:
        raise PacktrainError(
            "--strategy and --max-tokens are for --lengths without a recipe",
            key="plan",
            fix="leave the recipe out, or write --set batching.strategy=NAME, --set batching.max_tokens=N",
        )
    show_plan(
        load_checked(recipe, overrides),
        Console(),
        every=every,
        recommend=recommend,
        world_size=gpus,
        lengths_file=lengths,
        asked=asked,
    )
