"""What became of the rows: bad rows, the error that lists them, and the report that is printed and stored.

It says, for example:

7,473 rows (question_answer) -> 7,473 examples: 1,530,219 tokens, 803,422 of them supervised
12 rows cut to max_length: 3,411 tokens lost, 3,399 of them supervised
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from packtrain.errors import DataError

CONVERSATIONS = ("messages", "sharegpt")  # formats of which all is learnt unless the recipe says otherwise
SHOWN = 10  # rows that a message lists before it says how many more there are


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

    def to_dict(self) -> dict[str, object]:
        """Returns plain data, for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Returns the report as a person reads it, one statement a line."""
        result = [
            f"{self.rows:,} rows ({self.format}) -> {self.examples:,} examples: "
            f"{self.tokens:,} tokens, {self.supervised_tokens:,} of them supervised"
        ]
        if self.format in CONVERSATIONS and 0 < self.supervised_tokens == self.tokens - self.examples:
            result.append(
                "all turns are supervised, those of system and user included: "
                f"{self.supervised_tokens / self.tokens:.1%} of the tokens "
                "(`data.assistant_only_loss: true` learns only what the assistant says)"
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
