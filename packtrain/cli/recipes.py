"""`packtrain train`, `plan` and `show`: what is done with a recipe."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from packtrain.cli.options import LAST, RANK, Gpus, Overrides, RecipePath, load_checked
from packtrain.errors import PacktrainError, hidden

STRATEGY, MAX_TOKENS = "balanced", 16384  # of `plan --lengths`, without a recipe


def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="[PATH]", help="After RECIPE: go on from a checkpoint; without PATH from the newest good one."
        ),
    ] = None,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Resume although harmless keys of the recipe have changed.")
    ] = False,
    launch: Annotated[
        str | None, typer.Option(metavar="NAME", help="Start through `accelerate launch` with launch/NAME.yaml.")
    ] = None,
) -> None:
    """Train a recipe, and say what came of it.

    Runs on any number of processes: `torchrun --nproc_per_node 2 -m packtrain train RECIPE`, or
    `accelerate launch`. The steps see the same examples whatever their number.
    """
    loaded = load_checked(recipe, overrides)
    if launch is not None:
        from packtrain.training.engines.relaunch import relaunch

        sets = [part for override in overrides or [] for part in ("--set", override)]
        more = [*(["--resume", resume] if resume else []), *(["--allow-changes"] if allow_changes else [])]
        relaunch(launch, ["train", str(recipe), *sets, *more], use_cpu=bool(loaded.training.get("use_cpu")))
    from packtrain.training.run import train as run

    console = Console(quiet=RANK != 0)
    resume_from = True if resume == LAST else resume or False
    summary = run(loaded, resume=resume_from, allow_changes=allow_changes, console=console)
    console.print(summary.table())
    console.print("\nTry next:")
    padded = f"{loaded.training['output_dir']}-padded"
    sampled = loaded.objective.name == "masked_diffusion"
    for comment, command in next_commands(recipe, overrides or [], padded, sampled=sampled):
        console.print(Text.assemble((f"  # {comment}\n", "dim"), ("  " + command, "bold")), soft_wrap=True)


def next_commands(
    recipe: Path, overrides: Sequence[str], padded_dir: str, *, sampled: bool = False
) -> list[tuple[str, str]]:
    """(what for, command), each as it can be pasted.

    Args:
        padded_dir: where a padded run would be stored.
        sampled: whether the model is one that `sample` and `evaluate` take.
    """

    def command(verb: str, overrides: Sequence[str], *more: str) -> str:
        sets = [part for override in overrides for part in ("--set", override)]
        return hidden(shlex.join(["packtrain", verb, str(recipe), *sets, *more]))

    padded = [override for override in overrides if "output_dir" not in override.partition("=")[0]]
    padded += ["batching.strategy=pad_longest", f"training.output_dir={padded_dir}"]
    answers = [("how its answers depend on the room they get", command("evaluate", overrides))] if sampled else []
    return [
        *answers,
        ("what the model saw, step by step", command("show", overrides, "--step", "0")),
        ("what every other strategy would do with these data", command("plan", overrides, "--all")),
        ("the same updates with plain padding: compare losses and real tokens/s", command("train", padded)),
    ]


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
    counts: Annotated[
        bool,
        typer.Option("--counts", help="Of --lengths FILE, the number of packs alone: one pass, hardly any memory."),
    ] = False,
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
        typer.Option(metavar="SIZE", help="Of one device, `80GiB`: what a run needs of it, and does it fit."),
    ] = None,
    launch: Annotated[
        str | None, typer.Option(metavar="NAME", help="With --memory: only the engine that launch/NAME.yaml starts.")
    ] = None,
) -> None:
    """Show the lengths of the examples and what strategies make of them, before anything is trained.

    Rows are tokenised once and remembered; after that the answer takes a second and no GPU, torch or tokenizer.
    Lengths may be a billion: `packtrain plan --lengths lengths.npy --max-tokens 8192 --counts`.
    """
    from packtrain.cli.show_memory import asked_memory
    from packtrain.cli.show_plan import show_lengths, show_plan

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
            counts_only=counts,
        )
        return
    if counts or strategy is not None or max_tokens is not None:
        raise PacktrainError(
            "--counts, --strategy and --max-tokens are for --lengths without a recipe",
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


def show(
    recipe: RecipePath,
    overrides: Overrides = None,
    step: Annotated[int, typer.Option(min=0, metavar="N", help="Which update.")] = 0,
    rank: Annotated[int, typer.Option(min=0, metavar="R", help="Of which rank.")] = 0,
    micro_batch: Annotated[int, typer.Option(min=0, metavar="M", help="Which of its micro-batches.")] = 0,
    examples: Annotated[
        str | None, typer.Option(metavar="IDS", help="These examples instead: `3,17`, or a run's nonfinite.jsonl.")
    ] = None,
    documents: Annotated[int, typer.Option(min=0, metavar="N", help="Texts to print.")] = 8,
    gpus: Gpus = 1,
) -> None:
    """Print one batch exactly as the model gets it: documents, positions, loss mask, text.

    What is supervised, what is prompt and what is filler have different colours.
    """
    from packtrain.cli.show_batch import show_batch

    show_batch(
        load_checked(recipe, overrides),
        Console(),
        step=step,
        rank=rank,
        micro_batch=micro_batch,
        examples=examples,
        documents=documents,
        world_size=gpus,
    )
