"""Token columns in Arrow buffers: documents are read as numpy views, without a Python object per token.

An Arrow list column is, chunk by chunk, one flat buffer of values and one of offsets:

    documents  [5 6 7] [8 9] [4]          values   5 6 7 8 9 4
                                          offsets  0     3   5 6

so a document is a slice of a buffer, and a batch of documents one `np.concatenate` of slices. The buffers are
memory maps of the files: opening costs nothing, workers share pages, and a pickle holds paths instead of data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from packtrain.data.formats import IGNORED, MASKS
from packtrain.errors import DataError

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

_MASKS = ("learnt", *MASKS)  # ours, and those of datasets tokenised elsewhere
_COUNTED_AT_ONCE = 1 << 22  # tokens


class ListColumn:
    """A `list<integer>` column as numpy views of its chunks.

    Args:
        name: for messages.
        column: the Arrow column; its buffers are kept alive by the views.

    Raises:
        DataError: not lists of integers, or with nulls.
    """

    def __init__(self, name: str, column: pa.ChunkedArray):
        self.name = name
        self._chunks = [self._views(chunk) for chunk in column.chunks if len(chunk)]
        self._bounds = np.cumsum([0, *(len(offsets) - 1 for _, offsets in self._chunks)])  # [chunks + 1]

    def _views(self, chunk: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        """(values, offsets `[documents + 1]`) of one chunk."""
        import pyarrow as pa

        if pa.types.is_fixed_size_list(chunk.type):
            chunk = chunk.cast(pa.list_(chunk.type.value_type))
        if not (pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type)):
            raise DataError(f"column '{self.name}' holds {chunk.type}, not lists of integers")
        values = chunk.values
        if pa.types.is_boolean(values.type):
            values = values.cast(pa.uint8())
        if not pa.types.is_integer(values.type):
            raise DataError(f"column '{self.name}' holds lists of {values.type}, not of integers")
        if chunk.null_count or values.null_count:
            raise DataError(f"column '{self.name}' holds nulls")
        return values.to_numpy(), chunk.offsets.to_numpy()

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def lengths(self) -> np.ndarray:
        """int32 `[documents]`."""
        parts = [np.diff(offsets) for _, offsets in self._chunks]
        return np.concatenate(parts or [np.empty(0)]).astype(np.int32)

    def documents_with(self, test: Callable[[np.ndarray], np.ndarray]) -> list[int]:
        """Documents of which some token passes `test`, values `[k]` -> bool `[k]`."""
        found = []
        for (values, offsets), first in zip(self._chunks, self._bounds.tolist(), strict=False):
            positions = np.flatnonzero(test(values[offsets[0] : offsets[-1]])) + offsets[0]
            found += (np.unique(np.searchsorted(offsets, positions, side="right")) - 1 + first).tolist()
        return found

    def gather(self, documents: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """Tokens `starts..stops` of each document, end to end: int64 `[sum(stops - starts)]`."""
        chunk = np.searchsorted(self._bounds, documents, side="right") - 1
        local = documents - self._bounds[chunk]
        views = [np.empty(0, dtype=np.int64)]
        for c, document, start, stop in zip(
            chunk.tolist(), local.tolist(), starts.tolist(), stops.tolist(), strict=True
        ):
            values, offsets = self._chunks[c]
            first = int(offsets[document])
            views.append(values[first + start : first + stop])
        return np.concatenate(views, dtype=np.int64, casting="unsafe")  # "unsafe": uint64 is an integer too


class Tokens:
    """Input ids and labels of documents; where the labels come from depends on the columns present.

    With `labels` they are read; else they are the input ids, ignored where a mask column says 0. The first label
    of whatever is read is ignored: nothing before it predicts it.

    Args:
        open_table: gives the Arrow table; called at the first use, and again after unpickling.
    """

    def __init__(self, open_table: Callable[[], pa.Table]):
        self._open_table = open_table

    def __reduce__(self):
        return Tokens, (self._open_table,)

    @cached_property
    def input_ids(self) -> ListColumn:
        return self._column("input_ids")

    @cached_property
    def _labels(self) -> ListColumn | None:
        return self._column("labels") if "labels" in self._table.column_names else None

    @cached_property
    def _masks(self) -> list[ListColumn]:
        return [self._column(name) for name in _MASKS if name in self._table.column_names]

    @cached_property
    def blanks(self) -> np.ndarray | None:
        """int32 `[documents]`: blank tokens at the end of each, behind its eos; None where that isn't known."""
        return self._table["blanks"].to_numpy() if "blanks" in self._table.column_names else None

    @cached_property
    def _table(self) -> pa.Table:
        return self._open_table()

    def _column(self, name: str) -> ListColumn:
        return ListColumn(name, self._table[name])

    def gather(self, documents: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids, labels) of the pieces, end to end, int64 `[T]` each."""
        input_ids = self.input_ids.gather(documents, starts, stops)  # [T]
        if self._labels is not None:
            labels = self._labels.gather(documents, starts, stops)  # [T]
        else:
            labels = input_ids.copy()
            for mask in self._masks:
                labels[mask.gather(documents, starts, stops) == 0] = IGNORED
        lengths = stops - starts
        labels[(np.cumsum(lengths) - lengths)[lengths > 0]] = IGNORED
        return input_ids, labels

    def count_supervised(self, documents: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """Supervised tokens of each piece, int32 `[pieces]`; pieces hold a token at least."""
        lengths = (stops - starts).astype(np.int64)
        if self._labels is None and not self._masks:
            return (lengths - 1).astype(np.int32)
        counts = np.empty(len(documents), dtype=np.int32)
        batch = np.cumsum(lengths) // _COUNTED_AT_ONCE
        for pieces in np.split(np.arange(len(documents)), np.flatnonzero(np.diff(batch)) + 1):
            if len(pieces):
                _, labels = self.gather(documents[pieces], starts[pieces], stops[pieces])
                firsts = np.cumsum(lengths[pieces]) - lengths[pieces]
                counts[pieces] = np.add.reduceat(labels != IGNORED, firsts, dtype=np.int32)
        return counts

    def problems(self) -> list[tuple[int, str]]:
        """(document, reason) for what tokens made elsewhere may have wrong; ours are checked while encoding."""
        lengths = self.input_ids.lengths()
        found = [(document, "'input_ids' is empty") for document in np.flatnonzero(lengths == 0).tolist()]
        negative = self.input_ids.documents_with(lambda ids: ids < 0)
        found += [(document, "'input_ids' holds a negative id") for document in negative]
        if self._labels is not None:
            negative = self._labels.documents_with(lambda labels: (labels < 0) & (labels != IGNORED))
            found += [(document, f"'labels' holds a negative id other than {IGNORED}") for document in negative]
        for column in self._masks if self._labels is None else [self._labels]:
            others = column.lengths()
            for document in np.flatnonzero(others != lengths).tolist():
                reason = f"'{column.name}' has {others[document]} entries for {lengths[document]} input_ids"
                found.append((document, reason))
        if "attention_mask" in self._table.column_names:
            reason = "'attention_mask' has zeros: the row holds padding; tokenise without padding"
            padded = self._column("attention_mask").documents_with(lambda mask: mask == 0)
            found += [(document, reason) for document in padded]
        return found


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Tokenised rows: document i is row i, empty where the row is bad.

    Attributes:
        lengths, supervised: int32 `[documents]`, tokens and supervised tokens.
        problems: (row, reason) of every bad row.
        notes: statements for the report.
        directory, reopen: where they are stored, and what unpickling calls instead of copying arrays; None for
            those of a dataset.
    """

    fingerprint: str
    format: str
    tokens: Tokens
    lengths: np.ndarray
    supervised: np.ndarray
    problems: Sequence[tuple[int, str]] = ()
    notes: Sequence[str] = ()
    directory: Path | None = None
    reopen: Callable[[], Documents] | None = None

    def __reduce_ex__(self, protocol):
        return super().__reduce_ex__(protocol) if self.reopen is None else (self.reopen, ())


def open_files(paths: Sequence[Path]) -> Tokens:
    """Tokens in Arrow stream files (as `datasets` writes them), memory-mapped."""
    return Tokens(partial(_table_of_files, [str(path) for path in paths]))


def open_dataset(dataset: datasets.Dataset) -> Tokens:
    """Tokens in a `datasets.Dataset`; copied only where it is a selection or a shuffle of its table."""
    return Tokens(partial(_table_of_dataset, dataset))


def _table_of_files(paths: list[str]) -> pa.Table:
    import pyarrow as pa

    return pa.concat_tables(pa.ipc.open_stream(pa.memory_map(path)).read_all() for path in paths)


def _table_of_dataset(dataset: datasets.Dataset) -> pa.Table:
    import pyarrow as pa

    wanted = ("input_ids", "labels", "attention_mask", *_MASKS)
    columns = [name for name in dataset.column_names if name in wanted]
    if "input_ids" not in columns or not len(dataset):
        found = f"{len(dataset)} rows with {', '.join(dataset.column_names) or 'no columns'}"
        raise DataError(
            f"no rows with a column 'input_ids': {found}", fix="tokenise the rows first, or use `build_examples`"
        )
    batches = dataset.select_columns(columns).with_format("arrow").iter(batch_size=10_000)
    return pa.concat_tables(batches)
