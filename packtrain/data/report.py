"""What became of the rows: bad rows, the error that lists them, and the report that is printed and stored.

It says, for example:

read: train.jsonl.gz (7,485 rows)
not read (split test): test.jsonl
7,485 rows (question_answer) -> 7,485 examples: 1,530,219 tokens, 803,422 of them supervised
12 rows cut to max_length: 3,411 tokens lost, 3,399 of them supervised
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from packtrain.errors import RowsError

ALL_TURNS = (
    "system and user turns are supervised, too (`data.assistant_only_loss: true` supervises assistant turns only)"
)
SHOWN = 10  # rows that a message lists before it says how many more there are
DOCUMENTATION = "hidden or documentation"  # why a file is not read; such files are counted, not named
_NAMED = 4  # files that a line names before it says how many more there are


class BadRow(ValueError):
    """The reason why a row cannot become an example. Readers return it in the row's place, parsers raise it."""


def reason_of(error: json.JSONDecodeError) -> str:
    """Says why JSON cannot be read, without the place.

    >>> try: json.loads('{"text": "on')
    ... except json.JSONDecodeError as error: reason_of(error)
    'Unterminated string'
    """
    return error.msg.removesuffix(" at").removesuffix(" starting")


def bad_rows_error(first: Sequence[tuple[str, str]], total: int, *, what: str, key: str, fix: str) -> RowsError:
    """Makes one error for many rows: their number is in `what`, the first of them follow as (where, reason)."""
    lines = [f"\n    {where}: {reason}" for where, reason in first[:SHOWN]]
    more = f"\n    ... and {total - SHOWN:,} more" if total > SHOWN else ""
    return RowsError(what + ":" + "".join(lines) + more, key=key, fix=fix)


def join_row_errors(errors: Sequence[RowsError]) -> RowsError:
    """Makes one error of several lists of rows: bad ones and overlong ones, those of each source.

    >>> bad = bad_rows_error([("a.jsonl, line 2", "'text' is missing")], 1, what="1 of 9", key="data.bad", fix="skip")
    >>> long = bad_rows_error([("a.jsonl, line 3", "44 tokens")], 1, what="1 of 9", key="data.overflow", fix="cut")
    >>> print(join_row_errors([bad, long]))
    data.bad: 1 of 9:
        a.jsonl, line 2: 'text' is missing
      data.overflow: 1 of 9:
        a.jsonl, line 3: 44 tokens
        fix: skip
        fix: cut
    """
    first, *others = errors
    if not others:
        return first
    what = "\n  ".join([first.what, *(f"{error.key}: {error.what}" for error in others)])
    return RowsError(what, key=first.key, fix="\n    fix: ".join(dict.fromkeys(error.fix or "" for error in errors)))


@dataclass(frozen=True, kw_only=True)
class Share:
    """One source of a mixture.

    Attributes:
        path, weight: as they are written.
        share: of the weights, which is that of the examples of an epoch.
        rows: of the source.
        held_out: examples of it that are kept for evaluation.
        available: examples that are left to train on.
        examples: of an epoch; more than `available` repeats some, fewer leaves some out.
        tokens, supervised_tokens: of the examples of an epoch.
    """

    path: str
    weight: float
    share: float
    rows: int
    held_out: int
    available: int
    examples: int
    tokens: int
    supervised_tokens: int

    def line(self) -> str:
        """Says how often its examples are read in an epoch."""
        often, more = divmod(self.examples, self.available)
        if not often:
            read = f"chosen from {self.available:,}, the same in every epoch"
        else:
            times = f"{often} or {often + 1} times" if more else "once" if often == 1 else f"{often} times"
            read = f"each of its {self.available:,} is read {times}"
        kept = f" ({self.held_out:,} more are held out)" if self.held_out else ""
        tokens = f"{self.tokens:,} tokens, {self.supervised_tokens:,} of them supervised"
        return f"{self.share:.1%} {self.path} ({self.rows:,} rows): {self.examples:,} examples, {read}{kept}: {tokens}"


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """Counts of rows, examples and tokens; nothing that was lost is left out.

    `tokens_lost` and `supervised_lost` count what `overflow` took from the rows in `truncated_rows`,
    `dropped_rows` and `split_rows` (a split loses the label at the start of every further piece, and pieces
    without a supervised token). `skipped` lists every bad row as (where, reason), of streamed rows the first ones, and
    `more_skipped` counts the others; their tokens count nowhere.
    `held_out` counts the rows among them that `data.eval_size` keeps for evaluation, whose examples are not counted here.
    `files` are (file, its rows), `not_read` (file, reason) of those next to them. In a `mixture` rows and losses are those
    of all sources, examples and tokens those of an epoch. `prompts` says how the rows were written out: `conversation` by
    the chat template, `text` as they are, `alpaca` or `question_answer` in the wording of that format, `input_ids` and
    `tokens` without a prompt.
    """

    format: str
    rows: int
    held_out: int = 0
    prompts: tuple[str, ...] = ()
    examples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    skipped: tuple[tuple[str, str], ...] = ()
    more_skipped: int = 0
    truncated_rows: int = 0
    dropped_rows: int = 0
    split_rows: int = 0
    tokens_lost: int = 0
    supervised_lost: int = 0
    notes: tuple[str, ...] = ()
    files: tuple[tuple[str, int], ...] = ()
    not_read: tuple[tuple[str, str], ...] = ()
    mixture: tuple[Share, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """Returns plain data, for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Returns the report as a person reads it, one statement a line."""
        result = self.file_lines()
        result.append(
            f"{self.rows:,} rows ({self.format}) -> {self.examples:,} examples: "
            f"{self.tokens:,} tokens, {self.supervised_tokens:,} of them supervised"
        )
        if self.held_out:
            result.append(f"rows held out for evaluation: {self.held_out:,}")
        if self.mixture:
            result.append(
                f"mixture of {len(self.mixture)} source{'s' if len(self.mixture) > 1 else ''}, in every epoch:"
            )
            result += [f"  {share.line()}" for share in self.mixture]
        for count, done in (
            (self.truncated_rows, "cut to max_length"),
            (self.dropped_rows, "longer than max_length, dropped"),
            (self.split_rows, "split at max_length"),
        ):
            if count:
                lost = f"{self.tokens_lost:,} tokens lost, {self.supervised_lost:,} of them supervised"
                result.append(f"rows {done}: {count:,} ({lost})")
        if self.skipped:
            skipped = len(self.skipped) + self.more_skipped
            result.append(f"bad rows, skipped: {skipped:,}")
            result += [f"  {where}: {reason}" for where, reason in self.skipped[:SHOWN]]
            if skipped > SHOWN:
                result.append(f"  ... and {skipped - SHOWN:,} more")
        return result + [self._with_share(note) for note in self.notes]

    def _with_share(self, note: str) -> str:
        """Adds how much is supervised to the note that all turns are."""
        share = self.supervised_tokens / self.tokens if self.tokens else 0.0
        return note.replace(ALL_TURNS, f"{ALL_TURNS}: {share:.1%} of all tokens")

    def file_lines(self) -> list[str]:
        """Returns which files were read, with their rows, and which were not, with the reason."""
        lines = []
        if self.files:
            read = [f"{file} ({count:,} row{'s' if count != 1 else ''})" for file, count in self.files]
            lines.append(f"read{_number(read)}: {_some(read)}")
        for reason in dict.fromkeys(reason for _, reason in self.not_read):
            names = [file for file, why in self.not_read if why == reason]
            named = f"{len(names):,}" if reason == DOCUMENTATION else _some(names)
            lines.append(f"not read ({reason}): {named}")
        return lines


def _number(names: Sequence[str]) -> str:
    return f" {len(names):,} files" if len(names) > _NAMED else ""


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def merge_reports(reports: Sequence[tuple[str, DataReport]]) -> DataReport:
    """Adds up the reports of several sources, each with its name; examples and tokens are left to whoever joins them."""
    only = [report for _, report in reports]
    counted = ("rows", "truncated_rows", "dropped_rows", "split_rows", "tokens_lost", "supervised_lost")
    by_note: dict[str, list[str]] = {}
    for name, report in reports:
        for note in report.notes:
            by_note.setdefault(note, []).append(name)
    return DataReport(
        format=", ".join(dict.fromkeys(report.format for report in only)),
        prompts=tuple(dict.fromkeys(kind for report in only for kind in report.prompts)),
        **{name: sum(getattr(report, name) for report in only) for name in counted},
        skipped=tuple(row for report in only for row in report.skipped),
        notes=tuple(
            note if len(names) == len(reports) else f"{', '.join(names)}: {note}" for note, names in by_note.items()
        ),
        files=tuple(file for report in only for file in report.files),
        not_read=tuple(file for report in only for file in report.not_read),
    )
