"""The command line: `packtrain train | plan | show | audit | compare | report | sample | evaluate`.

    packtrain train recipes/quickstart.yaml
    packtrain audit gpt_oss
    packtrain compare recipes/compare/quickstart.yaml
    packtrain plan recipes/sft.yaml --all
    packtrain show recipes/sft.yaml --step 3
    torchrun --nproc_per_node 2 -m packtrain train recipes/sft.yaml

What a user can mend is printed without a traceback, with exit code 2; Ctrl-C exits with 130. A training run that is
told to stop saves a checkpoint and exits with 75; a second signal ends it at once. Heavy libraries are imported by the
verb that needs them, so that help and errors come at once.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from packtrain import __version__
from packtrain.cli_diffusion import evaluate, sample
from packtrain.cli_options import Gpus, Overrides, RecipePath, load_checked
from packtrain.errors import PacktrainError, Stopped, hidden

RANK = int(os.environ.get("RANK", "0"))
LAST = "last"  # the value of a bare --resume


class Verbs(TyperGroup):
    """The group of verbs, with packtrain's exit codes and a `--resume` that may stand alone."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        return super().parse_args(ctx, fill_bare_resume(args))

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except PacktrainError as error:
            rank = f" (rank {RANK})" if RANK else ""
            head = "stopped" if isinstance(error, Stopped) else "error"
            message = Text.assemble((f"{head}{rank}: ", "bold red"), str(error))
            message.highlight_regex(r"(?m)^\s+fix: ", "bold green")
            Console(stderr=True).print(message, soft_wrap=True)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


def fill_bare_resume(args: Sequence[str]) -> list[str]:
    """`--resume` at the end or before another option gets the value `last`; options can't have optional values.

    >>> fill_bare_resume(["train", "r.yaml", "--resume", "--set", "a=1"])
    ['train', 'r.yaml', '--resume', 'last', '--set', 'a=1']
    """
    filled = []
    for word, following in zip_longest(args, args[1:], fillvalue="-"):
        filled.append(word)
        if word == "--resume" and following.startswith("-"):
            filled.append(LAST)
    return filled


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Packing and padding for LLM fine-tuning: a step is a set of examples, a strategy only lays them out.",
)


def _version(asked: bool) -> None:
    if asked:
        print(f"packtrain {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="[PATH]", help="Go on from a checkpoint; without PATH from the newest good one."),
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
        from packtrain.training.relaunch import relaunch

        sets = [part for override in overrides or [] for part in ("--set", override)]
        more = [*(["--resume", resume] if resume else []), *(["--allow-changes"] if allow_changes else [])]
        relaunch(launch, ["train", str(recipe), *sets, *more])
    from packtrain.training.run import train as run

    console = Console(quiet=RANK != 0)
    resume_from = True if resume == LAST else resume or False
    summary = run(loaded, resume=resume_from, allow_changes=allow_changes, console=console)
    console.print(summary.table())
    console.print("\nTry next:")
    padded = f"{loaded.training['output_dir']}-padded"
    for comment, command in next_commands(recipe, overrides or [], padded):
        console.print(Text.assemble((f"  # {comment}\n", "dim"), ("  " + command, "bold")), soft_wrap=True)


def next_commands(recipe: Path, overrides: Sequence[str], padded_dir: str) -> list[tuple[str, str]]:
    """(what for, command), each as it can be pasted; `padded_dir` is where a padded run would be stored."""

    def command(verb: str, overrides: Sequence[str], *more: str) -> str:
        sets = [part for override in overrides for part in ("--set", override)]
        return hidden(shlex.join(["packtrain", verb, str(recipe), *sets, *more]))

    padded = [override for override in overrides if "output_dir" not in override.partition("=")[0]]
    padded += ["batching.strategy=pad_longest", f"training.output_dir={padded_dir}"]
    return [
        ("what the model saw, step by step", command("show", overrides, "--step", "0")),
        ("what every other strategy would do with these data", command("plan", overrides, "--all")),
        ("the same updates with plain padding: compare losses and real tokens/s", command("train", padded)),
    ]


@app.command()
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
    strategy: Annotated[str, typer.Option(metavar="NAME", help="Without a recipe: the strategy.")] = "balanced",
    max_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Without a recipe: most tokens in a micro-batch.")
    ] = 16384,
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
    from packtrain.cli_memory import asked_memory
    from packtrain.cli_plan import show_lengths, show_plan

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
            strategy=strategy,
            max_tokens=max_tokens,
            every=every,
            world_size=gpus,
            counts_only=counts,
        )
        return
    if counts or strategy != "balanced" or max_tokens != 16384:
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


@app.command()
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
    from packtrain.cli_show import show_batch

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


@app.command()
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
    from packtrain.cli_audit import show_audit

    safe = show_audit(
        target,
        Console(),
        implementations=None if implementations == "all" else implementations.split(","),
        layouts=None if layouts == "all" else layouts.split(","),
        device=device,
    )
    raise typer.Exit(0 if safe else 1)


@app.command()
def compare(
    recipe: RecipePath,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Default: results/compare_NAME.")] = None,
) -> None:
    """Run variants of a recipe against each other, interleaved, each in a fresh process, and write a report.

    Interrupted, the same command continues: finished runs are kept. A variant that fails is a row of the report.
    A file with the section `rainbow_oracle:` runs that grid instead.
    """
    from packtrain.experiments.compare import compare as run

    if recipe.is_file() and "\nrainbow_oracle:" in "\n" + recipe.read_text(encoding="utf-8"):
        from packtrain.experiments.oracle import run_recipe

        directory = run_recipe(recipe, output_dir=out)
        Console().print((directory / "oracle.md").read_text(), soft_wrap=True)
        return
    run(recipe, overrides or [], output_dir=out, say=lambda line: Console().print(line, soft_wrap=True))


@app.command()
def report(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Directories of `packtrain compare`.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where the page goes.")] = None,
) -> None:
    """Rebuild the report of one comparison, or lay several side by side, from stored files alone."""
    from packtrain.experiments.report import write_report

    Console().print(f"report: {write_report(directories, out=out)}", soft_wrap=True)


app.command()(sample)
app.command()(evaluate)


def main(args: Sequence[str] | None = None) -> None:
    """Entry point; exits with 0, 2 (what the user gave is wrong), 75 (stopped, resumable) or 130 (interrupted)."""
    app(args=args, prog_name="packtrain")
