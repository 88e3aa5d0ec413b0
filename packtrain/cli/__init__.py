"""The command line, one file per verb.

    packtrain train recipes/quickstart.yaml
    packtrain audit gpt_oss
    packtrain compare recipes/compare/quickstart.yaml
    packtrain plan recipes/sft.yaml --all
    packtrain show recipes/sft.yaml --step 3
    torchrun --nproc_per_node 2 -m packtrain train recipes/sft.yaml

Errors that a user can fix are printed without a traceback, with exit code 2; Ctrl-C exits with 130. A training run that is
told to stop saves a checkpoint and exits with 75; a second signal, at least five seconds later, ends it at once.
Heavy libraries are imported by the verb that needs them, so that help and errors come at once.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from typer.core import TyperGroup

from packtrain import __version__
from packtrain.cli.audit import audit
from packtrain.cli.compare import compare
from packtrain.cli.evaluate import evaluate
from packtrain.cli.generate import generate
from packtrain.cli.init import init
from packtrain.cli.keys import keys
from packtrain.cli.merge import merge
from packtrain.cli.options import LAST, RANK
from packtrain.cli.output import print_error
from packtrain.cli.plan import plan
from packtrain.cli.prepare import prepare
from packtrain.cli.push import push
from packtrain.cli.report import report
from packtrain.cli.sample import sample
from packtrain.cli.score import score
from packtrain.cli.show import show
from packtrain.cli.train import train
from packtrain.errors import UNSET, PacktrainError, Stopped, shorten


class Verbs(TyperGroup):
    """Groups the verbs; adds packtrain's exit codes, a `--resume` that may stand alone, and help where nothing is asked."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        return super().parse_args(ctx, fill_bare_resume(args) or ["--help"])

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except PacktrainError as error:
            rank = f" (rank {RANK})" if RANK else ""
            print_error(error, ("stopped" if isinstance(error, Stopped) else "error") + rank)
            raise typer.Exit(error.exit_code) from None
        except typer.BadParameter as error:
            if not error.message or error.param is None:  # an argument that is missing
                raise
            print_error(bad_option(error))
            raise typer.Exit(PacktrainError.exit_code) from None
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            Console(stderr=True).print(f"error: a path is too long: {shorten(error.filename)}", soft_wrap=True)
            raise typer.Exit(PacktrainError.exit_code) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


WORDS = {  # pydantic's, which checks options for typer, and ours
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "Input should be": "must be",
}


def bad_option(error: typer.BadParameter) -> PacktrainError:
    """Returns what is wrong with the value of an option, as all errors are said.

    `Invalid value for '--gpus': Input should be greater than or equal to 1` is `--gpus: must be at least 1 (got 0)`.
    """
    assert error.param is not None and error.ctx is not None  # as typer raises it
    what, value = error.message.partition(",")[0], UNSET
    for theirs, ours in WORDS.items():
        what = what.replace(theirs, ours)
    if isinstance(error.__cause__, ValidationError):
        value = error.__cause__.errors()[0]["input"]
        value = int(value) if re.fullmatch("-?[0-9]{1,20}", str(value)) else value
    fix = f"`{error.ctx.command_path} --help` says what it takes"
    names = [*error.param.opts, error.param.name or ""]
    return PacktrainError(what, key=names[0], value=value, fix=fix)


def fill_bare_resume(args: Sequence[str]) -> list[str]:
    """Gives `--resume` the value `last` at the end, before another option and before the recipe; an option can't have an
    optional value. A checkpoint is a directory, so a word that is a file, or ends like a recipe, is the recipe.

    >>> fill_bare_resume(["train", "r.yaml", "--resume", "--set", "a=1"])
    ['train', 'r.yaml', '--resume', 'last', '--set', 'a=1']
    """
    filled = []
    for word, following in zip_longest(args, args[1:], fillvalue="-"):
        filled.append(word)
        if word == "--resume" and (following.startswith("-") or _is_recipe(following)):
            filled.append(LAST)
    return filled


def _is_recipe(word: str) -> bool:
    return word.endswith((".yaml", ".yml")) or Path(word).is_file()


EXIT_CODES = (
    "Exit codes: 0 done, 1 an audit found a leak or a rank failed, 2 an error that the message says how to fix, "
    "75 stopped with a checkpoint to resume from, 130 interrupted, 143 terminated (SIGTERM) before or after the updates."
)
app = typer.Typer(
    cls=Verbs,
    epilog=EXIT_CODES,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Fine-tune LLMs with packing or padding: a step is a set of examples, and a strategy only lays them out.",
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


for verb in (
    init,
    train,
    plan,
    prepare,
    show,
    audit,
    keys,
    score,
    compare,
    report,
    generate,
    merge,
    push,
    sample,
    evaluate,
):
    app.command(epilog=EXIT_CODES)(verb)


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line; exits with 0, 2 (the user can fix it), 75 (stopped, resumable) or 130 (interrupted)."""
    if sys.flags.optimize > 1:
        print(
            "error: PYTHONOPTIMIZE=2 (-OO) removes docstrings, without which transformers can't be imported: unset it"
        )
        raise SystemExit(PacktrainError.exit_code)
    for stream in (sys.stdout, sys.stderr):  # names and rows hold what a terminal's encoding has not
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    quiet_libraries()
    app(args=args, prog_name="packtrain")


def quiet_libraries() -> None:
    """Silences warnings of libraries that a user of the command line can't act on.

    DeepSpeed names its accelerator whenever it is installed, used or not; transformers and peft announce
    deprecated names, which packtrain takes care of. Where nobody watches a terminal, libraries draw no progress bars,
    which would stand between the lines of whoever captures the output.
    """
    if not sys.stderr.isatty():
        for library in ("HF_HUB", "HF_DATASETS"):  # the first is transformers' switch, too
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|accelerate|torch)\b")
