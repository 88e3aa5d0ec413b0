"""Chooses examples among tokenised documents: whole ones, pieces of long ones, and no bad ones.

A `View` is what `max_length`, `overflow` and `on_bad_row` come to: pieces of documents, worked out on arrays of
lengths. Tokens are read only to count the supervised ones of pieces.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from packtrain.data.report import SHOWN, DataReport, bad_rows_error, join_row_errors
from packtrain.data.tokens import Documents
from packtrain.errors import DataError, RowsError

OVERFLOWS = ("error", "truncate", "drop", "split")
BAD_ROW_CHOICES = ("error", "skip")


@dataclass(frozen=True, kw_only=True)
class View:
    """Pieces of documents; arrays `[n]`."""

    rows: np.ndarray | None  # int64: the document, which is the source row; None: all of them, in their order
    starts: np.ndarray  # int32: its first token
    lengths: np.ndarray  # int32
    supervised: np.ndarray  # int32: labels other than -100

    def __getitem__(self, index: np.ndarray) -> View:
        return View(
            rows=self.documents(index),
            starts=self.starts[index],
            lengths=self.lengths[index],
            supervised=self.supervised[index],
        )

    def documents(self, index: np.ndarray) -> np.ndarray:
        """Returns the documents of some pieces, int64 `[k]`."""
        if self.rows is not None:
            return self.rows[index]
        assert (index >= 0).all(), "example ids start at 0"
        return index


def select(
    documents: Documents,
    *,
    max_length: int | None,
    overflow: str,
    on_bad_row: str,
    where: Callable[[int], str],
    part: bool = False,
) -> tuple[View | None, DataReport]:
    """Chooses the examples of some documents, in order of their rows.

    Args:
        documents: one per row.
        max_length: most tokens of an example; None for no limit.
        overflow, on_bad_row: see `build_examples`.
        where: names a row in messages.
        part: whether more documents follow, so that none of these need be left.

    Returns:
        The view, None where every document is an example as a whole; and the report without its totals.

    Raises:
        DataError: bad rows or long rows where they are errors; nothing left.
    """
    _check(max_length, overflow, on_bad_row)
    count = len(documents.lengths)
    limit = max_length or np.iinfo(np.int32).max
    long = np.flatnonzero(documents.lengths > limit)
    refused = [_too_long(documents, long, limit, where)] if long.size and overflow == "error" else []
    pieces = _cut(documents, long, limit, overflow)
    assert pieces.rows is not None, "pieces name their rows"
    hopeless = np.setdiff1d(long, pieces.rows) if overflow in ("truncate", "split") else long[:0]
    reason = f"no supervised token is left after truncation to max_length={limit}"
    problems = sorted([*documents.problems, *((row, reason) for row in hopeless.tolist())])
    skipped = tuple((where(row), reason) for row, reason in problems)
    if problems and on_bad_row == "error":
        bad = bad_rows_error(
            skipped,
            len(skipped),
            what=f"{len(skipped):,} of {count:,} rows cannot be trained on",
            key="data.on_bad_row",
            fix="correct or remove the rows, or skip them with `data.on_bad_row: skip`",
        )
        refused.insert(0, bad)
    if refused:
        raise join_row_errors(refused)
    whole = np.ones(count, dtype=bool)
    whole[long] = whole[[row for row, _ in problems]] = False
    if not part and len(problems) + len(long) and not whole.any() and not len(pieces.rows):
        raise DataError(f"none of {count:,} rows is left to train on", key="data.path")
    if not part:
        refuse_mostly_bad(documents, where)

    changed = np.setdiff1d(long, hopeless)
    report = DataReport(
        format=documents.format,
        prompts=tuple(documents.prompts),
        rows=count,
        skipped=skipped,
        truncated_rows=len(changed) if overflow == "truncate" else 0,
        dropped_rows=len(changed) if overflow == "drop" else 0,
        split_rows=len(changed) if overflow == "split" else 0,
        tokens_lost=int(documents.lengths[changed].sum(dtype=np.int64) - pieces.lengths.sum()),
        supervised_lost=int(documents.supervised[changed].sum(dtype=np.int64) - pieces.supervised.sum()),
        notes=tuple(documents.notes),
    )
    return (None if whole.all() else _merge(documents, np.flatnonzero(whole), pieces)), report


def _cut(documents: Documents, long: np.ndarray, limit: int, overflow: str) -> View:
    """Cuts long documents into the pieces that have a supervised token."""
    lengths = documents.lengths[long].astype(np.int64)
    counts = {"truncate": np.ones_like(lengths), "split": -(-lengths // limit)}.get(overflow, np.zeros_like(lengths))
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # of a piece in its document
    rows, starts = np.repeat(long, counts), number * limit
    stops = np.minimum(starts + limit, np.repeat(lengths, counts))
    supervised = documents.tokens.count_supervised(rows, starts, stops) if len(rows) else np.zeros(0, np.int32)
    view = View(
        rows=rows,
        starts=starts.astype(np.int32),
        lengths=(stops - starts).astype(np.int32),
        supervised=supervised,
    )
    return view[supervised > 0]


def _merge(documents: Documents, whole: np.ndarray, pieces: View) -> View:
    """Joins whole documents and pieces into one view, in order of rows."""
    rows = np.concatenate([whole, pieces.rows])
    return View(
        rows=rows,
        starts=np.concatenate([np.zeros(len(whole), dtype=np.int32), pieces.starts]),
        lengths=np.concatenate([documents.lengths[whole], pieces.lengths]),
        supervised=np.concatenate([documents.supervised[whole], pieces.supervised]),
    )[np.argsort(rows, kind="stable")]


def refuse_mostly_bad(documents: Documents, where: Callable[[int], str]) -> None:
    """Raises DataError for rows that are rather of another format, or broken throughout, than bad by exception."""
    problems = documents.problems
    if 2 * len(problems) <= len(documents.lengths) or documents.format == "input_ids":  # tokenised: no other format
        return
    raise bad_rows_error(
        [(where(row), reason) for row, reason in problems[:SHOWN]],
        len(problems),
        what=f"{len(problems):,} of {len(documents.lengths):,} rows, more than half, cannot be trained on as the format "
        f"`{documents.format}`",
        key="data.on_bad_row",
        fix="set `data.format` to the format of most rows, keep rows of other formats in files of their own "
        "(`data.mixture` joins them), or remove the broken ones",
    )


def _check(max_length: int | None, overflow: str, on_bad_row: str) -> None:
    if max_length is not None and max_length < 2:
        fix = "set it to 2 or more: an example needs a token to predict from and a token to predict"
        raise DataError("must be at least 2", key="data.max_length", value=max_length, fix=fix)
    for key, value, known in (
        ("data.overflow", overflow, OVERFLOWS),
        ("data.on_bad_row", on_bad_row, BAD_ROW_CHOICES),
    ):
        if value not in known:
            raise DataError("is not a valid choice", key=key, value=value, fix=f"choose one of {', '.join(known)}")


def _too_long(documents: Documents, long: np.ndarray, limit: int, where: Callable[[int], str]) -> RowsError:
    lengths = documents.lengths[long]
    lost = int((lengths.astype(np.int64) - limit).sum())
    longest_first = long[np.argsort(-lengths, kind="stable")]
    return bad_rows_error(
        [(where(row), f"{documents.lengths[row]:,} tokens") for row in longest_first[:SHOWN].tolist()],
        len(long),
        what=f"{len(long):,} of {len(documents.lengths):,} rows are longer than max_length={limit}, "
        f"by {lost:,} tokens in total",
        key="data.overflow",
        fix=f"raise `data.max_length` to {lengths.max()}, or choose `data.overflow`: truncate, split or drop",
    )
