"""`packtrain plan`: show lengths, strategies and memory before training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from packtrain.cli.options import Gpus, Overrides, complete_launch, complete_recipe, load_checked
from packtrain.errors import PacktrainError
from packtrain.recipe.sections import MAX_TOKENS, STRATEGY


def plan(
    recipe: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RECIPE]",
            help="YAML file, or the name of a shipped recipe; not needed with --lengths.",
            autocompletion=complete_recipe,
        ),
    ] = None,
    overrides: Overrides = None,
    every: Annotated[bool, typer.Option("--all", help="Show every strategy, not only the recipe's.")] = False,
    gpus: Gpus = 1,
    lengths: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Plan for these lengths (.npy, integers) instead of the data.")
    ] = None,
    strategy: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"Strategy without a recipe. Default: {STRATEGY}.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help=f"Most tokens in a micro-batch without a recipe. Default: {MAX_TOKENS}."),
    ] = None,
    recommend: Annotated[bool, typer.Option("--recommend", help="Recommend a strategy, and say why.")] = False,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Estimate memory per GPU and check whether it fits, e.g. `--memory 80GiB`."),
    ] = None,
    launch: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="With --memory: show only the engine that launch/NAME.yaml starts.",
            autocompletion=complete_launch,
        ),
    ] = None,
) -> None:
    """Show example lengths, compare strategies and estimate memory before training.

    Rows are tokenised once and cached; after that it takes a second, and no GPU, torch or tokenizer. A lengths file may
    hold a billion: `packtrain plan --lengths lengths.npy --max-tokens 8192`.
    """
    from packtrain.cli.memory_table import asked_memory
    from packtrain.cli.strategy_table import show_lengths, show_plan

    asked = asked_memory(memory, launch)
    if recipe is None:
        if lengths is None:
            raise PacktrainError(
                "needs a recipe or a lengths file", key="plan", fix="name a recipe, or add --lengths lengths.npy"
            )
        if overrides or recommend or asked:
            what = "--set, --recommend and --memory need a recipe"
            raise PacktrainError(what, key="plan", fix="name a recipe, or leave these options out")
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
            "--strategy and --max-tokens work only without a recipe",
            key="plan",
            fix="use --set batching.strategy=NAME and --set batching.max_tokens=N, or leave the recipe out",
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
