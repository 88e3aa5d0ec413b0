"""Errors that a user can act on: where, which key, which value, and what to do about it.

Everything packtrain refuses is a `PacktrainError`; the command line prints it without a traceback and
exits with code 2. Programming mistakes stay `assert`s and plain exceptions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

HIDDEN = "***"
_SECRETS = re.compile(
    r"""(?P<scheme>\b\w{2,}:/{1,2})[^/@\s]+(?=@)   # https://user:secret@host, also as a path
    |\b(hf_|gh[opsur]_)[A-Za-z0-9]{30,}           # tokens of the Hub and of GitHub
    |\b(sk-(\w+-)?|github_pat_|glpat-)\w{20,}     # of OpenAI and others, GitHub, GitLab
    |\bA(KI|SI)A[A-Z0-9]{16}\b                    # key ids of AWS
    |(?P<parameter>(?i:[?&;](\w+[-_.])*(token|signature|sig|secret|password|passwd|pwd|api[-_]?key|access[-_]?key|credential)=))
     [^&;\s"']+                                   # of signed and private URLs""",
    re.VERBOSE,
)
UNSET = object()  # "no value to show", as None is itself a value a user may have written


class PacktrainError(ValueError):
    """One thing that is wrong with what the user gave.

    Args:
        what: what is wrong, one sentence.
        where: file, row or place it was found in (`recipes/sft.yaml:12`, `train.jsonl, row 17`).
        key: the recipe key or argument (`batching.max_tokens`).
        value: the offending value; left out of the message when not given.
        fix: what the user can do.
    """

    exit_code = 2  # of the command line

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        key: str | None = None,
        value: object = UNSET,
        fix: str | None = None,
    ):
        self.what, self.where, self.key, self.value, self.fix = what, where, key, value, fix
        super().__init__(str(self))

    def __str__(self) -> str:
        head = ": ".join(part for part in (self.where, self.key) if part)
        shown = "" if self.value is UNSET else f" (got {shorten(self.value)})"
        fix = f"\n    fix: {self.fix}" if self.fix else ""
        return hidden((f"{head}: " if head else "") + self.what + shown + fix)


class RecipeError(PacktrainError):
    """Everything that is wrong with a recipe, reported at once in `problems`."""

    def __init__(self, problems: Sequence[PacktrainError]):
        self.problems = list(problems)
        count = len(self.problems)
        super().__init__(f"{count} problem{'s' if count != 1 else ''} in the recipe")

    def __str__(self) -> str:
        return "\n".join([self.what, *(f"  {problem}" for problem in self.problems)])


class DataError(PacktrainError):
    """A row, a file or a column that cannot be trained on."""


class RowsError(DataError):
    """Rows that cannot be trained on: bad ones, overlong ones, those of several sources; all that were found."""


class PlanError(PacktrainError):
    """Lengths, capacities or counts from which no plan can be made."""


class ModelError(PacktrainError):
    """A model, tokenizer, attention or adapter that cannot do what the recipe asks."""


class LaunchError(PacktrainError):
    """The run that started (world size, engine, device) is not the one that was requested."""


class CheckpointError(PacktrainError):
    """A checkpoint that can't be written, is damaged, or is of another run."""


class NonFiniteError(PacktrainError):
    """A loss or gradient that is NaN or infinite; raised before the weights have seen it."""


class OutOfMemory(PacktrainError):
    """A micro-batch, or the optimizer, that the device has no room for."""


class Stopped(PacktrainError):
    """A run that was told to stop, and has saved a checkpoint to go on from."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


@contextmanager
def refused_by(library: str, key: str, names: Iterable[str] = ()) -> Iterator[None]:
    """Around one call of a library: whatever it raises about the settings it was given becomes a PacktrainError.

    Args:
        key: of the recipe, whose settings it was given.
        names: of settings under `key`; one that the message mentions is named.
    """
    try:
        yield
    except PacktrainError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        words = set(re.findall(r"\w+", str(error)))
        key = next((f"{key}.{name}" for name in names if name in words), key)
        what = f"is rejected by {library}: {type(error).__name__}: {clip(lines[0])}"
        raise PacktrainError(what, key=key, fix="change or remove the setting that the message names") from error


def require(*packages: str, extra: str) -> None:
    """Raises PacktrainError where packages of an extra are not installed."""
    if missing := [name for name in packages if find_spec(name) is None]:
        raise PacktrainError(
            f"this needs {' and '.join(missing)} (not installed)", fix=f"pip install 'packtrain[{extra}]'"
        )


def clip(text: str, limit: int = 300) -> str:
    """Returns a text of at most `limit` characters: its first sentences, or words with an ellipsis.

    >>> clip("It failed. Then much was said.", 20), clip("Much was said of it", 12)
    ('It failed.', 'Much was ...')
    """
    if len(text) <= limit:
        return text
    sentences = text[:limit].rpartition(". ")[0]
    return f"{sentences}." if len(sentences) >= limit // 3 else f"{text[: limit - 3].rpartition(' ')[0]} ..."


def hidden(text: str) -> str:
    """`text` without what looks like a secret: credentials in URLs, and tokens by their issuers' prefixes."""
    return _SECRETS.sub(lambda found: (found["scheme"] or found["parameter"] or "") + HIDDEN, text)


def shorten(value: object, limit: int = 120) -> str:
    """`repr(value)`, cut to `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
