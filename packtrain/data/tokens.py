"""Tokens of documents in Arrow buffers: read as numpy views, without a Python object per token.

An Arrow list column is, chunk by chunk, one flat buffer of values and one of offsets:

    documents  [5 6 7] [8 9] [4]          values   5 6 7 8 9 4
                                          offsets  0     3   5 6

so a document is a slice of a buffer, and a batch of documents one `np.concatenate` of slices. The buffers are
memory maps of the files: opening costs nothing, workers share pages, and a pickle holds paths instead of data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from packtrain.data.formats import IGNORED, MASKS
from packtrain.data.tokenised import labels_of, other_length, wrong, wrong_values
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
        """Returns (values, offsets `[documents + 1]`) of one chunk."""
        import pyarrow as pa

        if pa.types.is_fixed_size_list(chunk.type):
            chunk = chunk.cast(pa.list_(chunk.type.value_type))
        if not (pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type)):
            raise DataError(f"column '{self.name}' has the type {chunk.type}, not lists of integers")
        values = chunk.values
        if pa.types.is_boolean(values.type):
            values = values.cast(pa.uint8())
        if not pa.types.is_integer(values.type):
            raise DataError(f"column '{self.name}' has lists of {values.type}, not of integers")
        if chunk.null_count or values.null_count:
            raise DataError(f"column '{self.name}' contains nulls")
        return values.to_numpy(), chunk.offsets.to_numpy()

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def lengths(self) -> np.ndarray:
        """Returns int32 `[documents]`, tokens of each."""
        parts = [np.diff(offsets) for _, offsets in self._chunks]
        return np.concatenate(parts or [np.empty(0)]).astype(np.int32)

    def documents_with(self, test: Callable[[np.ndarray], np.ndarray]) -> list[int]:
        """Finds the documents of which some token passes `test`, values `[k]` -> bool `[k]`."""
        found = []
        for (values, offsets), first in zip(self._chunks, self._bounds.tolist(), strict=False):
            positions = np.flatnonzero(test(values[offsets[0] : offsets[-1]])) + offsets[0]
            found += (np.unique(np.searchsorted(offsets, positions, side="right")) - 1 + first).tolist()
        return found

    def gather(self, documents: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """Returns tokens `starts..stops` of each document, end to end: int64 `[sum(stops - starts)]`."""
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
    def _factors(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Runs of tokens with a factor other than 0 and 1, `[runs, 3]` (first, one behind the last, factor), and the
        first run of each document, `[documents + 1]`; None where there is no such run."""
        if "factors" not in self._table.column_names:
            return None
        lists = self._table["factors"].combine_chunks()
        offsets = lists.offsets.to_numpy().astype(np.int64)
        runs = lists.values.to_numpy()[offsets[0] : offsets[-1]].reshape(-1, 3)
        return (runs, (offsets - offsets[0]) // 3) if len(runs) else None

    @property
    def has_factors(self) -> bool:
        """Whether a token has a factor of the loss other than 1."""
        return self._factors is not None

    def factors(self, documents: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray | None:
        """Returns the factors of the loss of the pieces' tokens, end to end: float32 `[T]`; None where all are 1."""
        if self._factors is None:
            return None
        runs, firsts = self._factors
        bounds = np.cumsum([0, *(stops - starts)])
        factors = np.ones(bounds[-1], dtype=np.float32)
        for piece, document in enumerate(documents.tolist()):
            for first, last, factor in runs[firsts[document] : firsts[document + 1]]:
                first, last = max(int(first), starts[piece]), min(int(last), stops[piece])
                if first < last:
                    at = bounds[piece] - starts[piece]
                    factors[at + first : at + last] = factor
        return factors

    @cached_property
    def _table(self) -> pa.Table:
        return self._open_table()

    def _column(self, name: str) -> ListColumn:
        return ListColumn(name, self._table[name])

    def gather(self, documents: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (input_ids, labels) of the pieces, end to end, int64 `[T]` each."""
        input_ids = self.input_ids.gather(documents, starts, stops)  # [T]
        given = None if self._labels is None else self._labels.gather(documents, starts, stops)
        masks = (mask.gather(documents, starts, stops) for mask in self._masks)  # read only where they are needed
        labels = labels_of(input_ids, given, masks)  # [T]
        lengths = stops - starts
        labels[(np.cumsum(lengths) - lengths)[lengths > 0]] = IGNORED
        return input_ids, labels

    def count_supervised(self, documents: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """Counts the supervised tokens of each piece, int32 `[pieces]`; pieces hold a token at least."""
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
        """Returns (document, reason) for what tokens made elsewhere may have wrong; ours are checked while encoding."""
        lengths = self.input_ids.lengths()
        found = [(document, "'input_ids' is empty") for document in np.flatnonzero(lengths == 0).tolist()]
        padding = [self._column("attention_mask")] if "attention_mask" in self._table.column_names else []
        for column in (self.input_ids, *(self._masks if self._labels is None else [self._labels]), *padding):
            bad, others = column.documents_with(partial(wrong_values, column.name)), column.lengths()
            found += [(document, wrong(column.name)) for document in bad]
            for document in np.flatnonzero(others != lengths).tolist():
                found.append((document, other_length(column.name, others[document], lengths[document])))
        reason = "'attention_mask' has zeros, so the row is padded; tokenise without padding"
        found += [
            (document, reason) for column in padding for document in column.documents_with(lambda mask: mask == 0)
        ]
        return found


class AnyTokens(Protocol):
    """What examples ask of the tokens of documents: `Tokens`, or those of several sources."""

    @property
    def blanks(self) -> np.ndarray | None: ...

    @property
    def has_factors(self) -> bool: ...

    def gather(self, documents: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...

    def factors(self, documents: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray | None: ...

    def count_supervised(self, documents: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Tokenised rows: document i is row i, empty where the row is bad.

    Attributes:
        lengths, supervised: int32 `[documents]`, tokens and supervised tokens.
        contents: a hash of the tokens, of which are supervised and of their factors: the same whatever made them.
        prompts: see `DataReport.prompts`.
        problems: (row, reason) of every bad row.
        notes: statements for the report.
        directory, reopen: where they are stored, and what unpickling calls instead of copying arrays; None for
            those of a dataset.
        parts: of each source, where they are those of several.
        found: whether they were tokenised before, rather than just now.
    """

    fingerprint: str
    format: str
    tokens: AnyTokens
    lengths: np.ndarray
    supervised: np.ndarray
    contents: str
    prompts: Sequence[str] = ()
    problems: Sequence[tuple[int, str]] = ()
    notes: Sequence[str] = ()
    directory: Path | None = None
    reopen: Callable[[], Documents] | None = None
    parts: Sequence[Documents] = ()
    found: bool = True

    def __reduce_ex__(self, protocol):
        return super().__reduce_ex__(protocol) if self.reopen is None else (self.reopen, ())

    @property
    def bytes_stored(self) -> int:
        """Bytes of their files; 0 where they are not stored."""
        return sum(path.stat().st_size for path in self.directory.iterdir()) if self.directory is not None else 0


def hash_table(table: pa.Table) -> str:
    """Returns the SHA-256 (hex) of the tokens of a table, of which are supervised, and of their factors."""
    digests = []
    for name in ("input_ids", "labels", "learnt", "factors"):
        lengths, values = hashlib.sha256(name.encode()), hashlib.sha256()
        for chunk in table[name].chunks if name in table.column_names else ():
            offsets = chunk.offsets.to_numpy()
            lengths.update(np.diff(offsets).astype("<i8").tobytes())
            values.update(chunk.values.to_numpy()[offsets[0] : offsets[-1]].data)
        digests += [lengths.hexdigest(), values.hexdigest()]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def open_files(paths: Sequence[Path]) -> Tokens:
    """Opens tokens in Arrow stream files (as `datasets` writes them), memory-mapped."""
    return Tokens(partial(_table_of_files, [str(path) for path in paths]))


def open_dataset(dataset: datasets.Dataset) -> Tokens:
    """Opens tokens in a `datasets.Dataset`; copied only where it is a selection or a shuffle of its table."""
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
            f"the dataset must have rows with a column 'input_ids', and it has {found}",
            fix="tokenise the rows first, for example with `dataset.map(lambda row: tokenizer(row['text']))`; "
            "`packtrain.load_examples` does so for the rows of a recipe",
        )
    batches = dataset.select_columns(columns).with_format("arrow").iter(batch_size=10_000)
    return pa.concat_tables(batches)
