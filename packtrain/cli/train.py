"""`packtrain train`: train a model from a recipe."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.text import Text

from packtrain.cli.options import LAST, RANK, Overrides, RecipePath, complete_launch, load_checked
from packtrain.cli.output import LastingOutput
from packtrain.errors import hidden


def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="[PATH]", help="Resume from a checkpoint; without PATH (after RECIPE) from the newest valid one."
        ),
    ] = None,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Resume even if harmless keys of the recipe have changed.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing run in `training.output_dir`.")
    ] = False,
    launch: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Start through `accelerate launch` with launch/NAME.yaml.",
            autocompletion=complete_launch,
        ),
    ] = None,
) -> None:
    """Train a model from a recipe and print a summary.

    Runs on any number of processes: `torchrun --nproc_per_node 2 -m packtrain train RECIPE`, or
    `accelerate launch`. The updates see the same examples on any number of processes.
    """
    loaded = load_checked(recipe, overrides)
    from packtrain.training.launch import LAUNCHED_BY, relaunch

    if launch is not None:
        sets = [part for override in overrides or [] for part in ("--set", override)]
        more = [*(["--resume", resume] if resume else []), *(["--allow-changes"] if allow_changes else [])]
        more += ["--overwrite"] if overwrite else []
        relaunch(launch, ["train", str(recipe), *sets, *more], use_cpu=bool(loaded.training.get("use_cpu")))
    console = Console(quiet=RANK != 0, file=cast(Any, LastingOutput(sys.stdout)))
    batching = loaded.batching
    first = f"{Path(recipe).stem}: {hidden(loaded.data.shown)}, {batching.strategy}; loading torch and transformers"
    console.print(first, style="dim", markup=False)
    from packtrain.training.run import train as run

    resume_from = True if resume == LAST else resume or False
    summary = run(loaded, resume=resume_from, allow_changes=allow_changes, overwrite=overwrite, console=console)
    console.print(summary.table())
    console.print("\nTry next:")
    padded = f"{loaded.training['output_dir']}-padded"
    sampled = loaded.objective.answers
    shapes = batching.shapes is not None
    launched = os.environ.get(LAUNCHED_BY)
    answers = str(loaded.training["output_dir"]) if loaded.objective.predicts_next else None
    asked = next_commands(recipe, overrides or [], padded, run=answers, sampled=sampled, shapes=shapes, launch=launched)
    for comment, command in asked:
        console.print(Text.assemble((f"  # {comment}\n", "dim"), ("  " + command, "bold")), soft_wrap=True)


def next_commands(
    recipe: Path,
    overrides: Sequence[str],
    padded_dir: str,
    *,
    run: str | None = None,
    sampled: bool = False,
    shapes: bool = False,
    launch: str | None = None,
) -> list[tuple[str, str]]:
    """Returns (purpose, command) pairs; each command can be pasted.

    Args:
        padded_dir: directory for a padded run.
        run: directory of the run, if `generate` works with the model.
        sampled: whether `sample` and `evaluate` work with the model.
        shapes: whether the recipe has `batching.shapes`, which padded layouts don't take.
        launch: the launch file of the run, for one that is to be as fast.
    """

    def command(verb: str, overrides: Sequence[str], *more: str) -> str:
        sets = [part for override in overrides for part in ("--set", override)]
        return hidden(shlex.join(["packtrain", verb, str(recipe), *sets, *more]))

    padded = [override for override in overrides if "output_dir" not in override.partition("=")[0]]
    padded += ["batching.shapes=null"] if shapes else []
    padded += ["batching.strategy=pad_longest", f"training.output_dir={padded_dir}"]
    launched = ["--launch", launch] if launch else []
    answers = [("how its answers depend on the allocated length", command("evaluate", overrides))] if sampled else []
    if run is not None:
        answers.append(("talk to the model, or give it a --prompt", hidden(shlex.join(["packtrain", "generate", run]))))
    return [
        *answers,
        ("what the model saw, step by step", command("show", overrides, "--step", "0")),
        ("what every other strategy does with these data", command("plan", overrides, "--all")),
        ("the same updates with plain padding: compare losses and real tokens/s", command("train", padded, *launched)),
    ]
