"""What became of the rows: bad rows, the error that lists them, and the report that is printed and stored.

It says, for example:

read: train.jsonl.gz (7,485 rows)
not read (split test): test.jsonl
7,485 rows (question_answer) -> 7,485 examples: 1,530,219 tokens, 803,422 of them supervised
12 rows cut to max_length: 3,411 tokens lost, 3,399 of them supervised
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from packtrain.errors import DataError

SHOWN = 10  # rows that a message lists before it says how many more there are
DOCUMENTATION = "hidden or documentation"  # why a file is not read; such files are counted, not named
_NAMED = 4  # files that a line names before it says how many more there are


class BadRow(ValueError):
    """The reason why a row cannot become an example. Readers return it in the row's place, parsers raise it."""


def bad_rows_error(first: Sequence[tuple[str, str]], total: int, *, what: str, key: str, fix: str) -> DataError:
    """Makes one error for many rows: their number is in `what`, the first of them follow as (where, reason)."""
    lines = [f"\n    {where}: {reason}" for where, reason in first[:SHOWN]]
    more = f"\n    ... and {total - SHOWN:,} more" if total > SHOWN else ""
    return DataError(what + ":" + "".join(lines) + more, key=key, fix=fix)


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """Counts of rows, examples and tokens; nothing that was lost is left out.

    `tokens_lost` and `supervised_lost` count what `overflow` took from the rows in `truncated_rows`,
    `dropped_rows` and `split_rows` (a split loses the label at the start of every further piece, and pieces
    without a supervised token). `skipped` lists every bad row as (where, reason); their tokens count nowhere.
    `files` are (file, its rows), `not_read` (file, reason) of those next to them.
    """

    format: str
    rows: int
    examples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    skipped: tuple[tuple[str, str], ...] = ()
    truncated_rows: int = 0
    dropped_rows: int = 0
    split_rows: int = 0
    tokens_lost: int = 0
    supervised_lost: int = 0
    notes: tuple[str, ...] = ()
    files: tuple[tuple[str, int], ...] = ()
    not_read: tuple[tuple[str, str], ...] = ()

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
        for count, done in (
            (self.truncated_rows, "cut to max_length"),
            (self.dropped_rows, "longer than max_length, dropped"),
            (self.split_rows, "split at max_length"),
        ):
            if count:
                lost = f"{self.tokens_lost:,} tokens lost, {self.supervised_lost:,} of them supervised"
                result.append(f"rows {done}: {count:,} ({lost})")
        if self.skipped:
            result.append(f"bad rows, skipped: {len(self.skipped):,}")
            result += [f"  {where}: {reason}" for where, reason in self.skipped[:SHOWN]]
            if len(self.skipped) > SHOWN:
                result.append(f"  ... and {len(self.skipped) - SHOWN:,} more")
        return result + list(self.notes)

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
