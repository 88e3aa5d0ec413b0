"""Rows of files (see `packtrain.data.files`), saved datasets, the Hub, or `packtrain:arithmetic`.

    rows = open_rows("train.jsonl")
    rows[16]          {"question": ..., "answer": ...}
    rows.where(16)    "train.jsonl, line 17"

Lines count from 1, as editors show them; rows of a table from 0, as `dataset[i]` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from packtrain.data import synthetic
from packtrain.data.compressed import kind_of, unpacked
from packtrain.data.files import Place, find_places, is_local, is_pattern, no_split
from packtrain.data.formats import Kind, Reading, find_format, read_row, rename_columns
from packtrain.data.messages import Chat
from packtrain.data.readers import OPENERS, Reader, Row, TableReader, has_changed
from packtrain.data.report import BadRow
from packtrain.data.samples import Answers, Ids, Pair, Text, Words
from packtrain.data.store import hash_of, stat_files
from packtrain.errors import DataError

LOOKED_AT = 100  # rows whose keys are the columns
_AT_ONCE = 1000  # rows read at once while iterating
CORPUS_ROWS = 20_000  # a tokenizer is trained at every start, and more rows change its vocabulary little


class Rows:
    """Raw rows of one or more readers, one after another; picklable, read on demand.

    Args:
        readers: see `packtrain.data.readers.Reader`.
        num_rows: the first rows only.
        request: plain data that says what was asked for, as a key for the cache.
        files: path -> [size, modification time in ns] of the files behind them.
        not_read: (file, reason) of files next to them.
        notes: statements about the files, for the report.

    Attributes:
        parts: the rows of each source of a mixture; otherwise these rows alone.
    """

    def __init__(
        self,
        readers: list[Reader],
        *,
        num_rows: int | None = None,
        request: dict[str, object] | None = None,
        files: dict[str, list[int]] | None = None,
        not_read: Sequence[tuple[str, str]] = (),
        notes: Sequence[str] = (),
    ):
        self.request, self.files = request, files or {}
        self.not_read, self.notes = not_read, notes
        self.parts: list[Rows] = [self]
        self._readers = readers
        self._bounds = np.cumsum([0, *map(len, readers)])
        self._count = int(self._bounds[-1]) if num_rows is None else min(num_rows, int(self._bounds[-1]))
        found = {column: None for row in self.read(0, LOOKED_AT) if isinstance(row, dict) for column in row}
        self.columns: list[str] = list(found)

    @classmethod
    def join(cls, parts: list[Rows]) -> Rows:
        """Puts the rows of several sources one after another; each keeps its own columns and format."""
        rows = cls(parts)
        rows.parts = parts
        rows.columns = list(dict.fromkeys(column for part in parts for column in part.columns))
        return rows

    @property
    def label(self) -> str:
        """The name of the first reader, for rows that are a part of others."""
        return self._readers[0].label

    @property
    def counts(self) -> list[tuple[str, int]]:
        """(file or dataset, rows) of each reader; rows beyond `num_rows` don't count."""
        ends = np.minimum(self._bounds, self._count)
        return [(reader.label, count) for reader, count in zip(self._readers, np.diff(ends).tolist(), strict=True)]

    @property
    def skipped(self) -> list[str]:
        """What readers left out while they looked for rows: statements for the report."""
        return [note for reader in self._readers for note in getattr(reader, "notes", ())]

    @property
    def fingerprint(self) -> str:
        """A hash of the contents: the same for a file moved elsewhere, another for a file changed."""
        return hash_of(self._count, [reader.fingerprint for reader in self._readers])

    def changed(self) -> str | None:
        """Names a file whose contents are no longer those that were opened; None where all are."""
        return next((reader.label for reader in self._readers if has_changed(reader)), None)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> Row:
        """Reads one row.

        Raises:
            DataError: it cannot be read.
        """
        if not 0 <= row < len(self):
            raise IndexError(row)
        (found,) = self.read(row, row + 1)
        return self._good(found, row)

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), _AT_ONCE):
            for row, found in enumerate(self.read(start, start + _AT_ONCE), start):
                yield self._good(found, row)

    def read(self, start: int, stop: int) -> list[Row | BadRow]:
        """Reads rows `start..stop`, with a `BadRow` in the place of each that cannot be read."""
        rows: list[Row | BadRow] = []
        stop = min(stop, len(self))
        while start < stop:
            reader, first = self._locate(start)
            end = min(stop, first + len(reader))
            rows += reader.read(start - first, end - first)
            start = end
        return rows

    def where(self, row: int) -> str:
        """Names a row for messages: `train.jsonl, line 17`."""
        reader, first = self._locate(row)
        return reader.where(row - first)

    def _locate(self, row: int) -> tuple[Reader, int]:
        """Returns the reader of a row, and that reader's first row."""
        part = int(np.searchsorted(self._bounds, row, side="right")) - 1
        return self._readers[part], int(self._bounds[part])

    def _good(self, found: Row | BadRow, row: int) -> Row:
        if isinstance(found, BadRow):
            raise DataError(str(found), where=self.where(row))
        return found


def open_rows(
    path: str | Path | Sequence[str | Path],
    *,
    name: str | None = None,
    split: str = "train",
    num_rows: int | None = None,
    seed: int = 0,
) -> Rows:
    """Opens rows without reading them all.

    Args:
        path: a JSONL, JSON, CSV, TSV or Parquet file, also compressed; a directory of files of one kind; a pattern
            (`data/*.jsonl`); a directory written by `datasets`' `save_to_disk`; a Hub dataset; `packtrain:arithmetic`;
            or a list of these, read one after another.
        name: configuration of a Hub dataset.
        split: which split, see `files.find_places`.
        num_rows: the first rows only; how many `packtrain:arithmetic` makes.
        seed: of `packtrain:arithmetic`.

    Raises:
        DataError: nothing of that name, no such split, an unreadable file, a `name` for a local file. Broken rows raise
            nothing yet.
    """
    places = find_places(path, split)
    request = describe_request(path, name=name, split=split, num_rows=num_rows, seed=seed)
    if name and any(place.files for place in places) and not any(place.on_hub for place in places):
        fix = "leave it out: a file or directory has no configurations"
        raise DataError("applies only to datasets of the Hub", key="data.name", value=name, fix=fix)
    files = [file for place in places for file in place.files]
    stats = stat_files(files)  # before reading: a file that changes meanwhile is found changed next time
    rows = Rows(
        [reader for place in places for reader in _open(place, name, split, num_rows, seed)],
        num_rows=num_rows,
        request=request,
        files=stats,
        not_read=[each for place in places for each in place.not_read],
        notes=[note for place in places for note in place.notes],
    )
    refuse_unreadable(rows, ", ".join(place.path for place in places))
    return rows


def refuse_unreadable(rows: Rows, shown: str) -> None:
    """Raises DataError where there are no rows, or the first ones are all broken; `shown` names their source."""
    if not len(rows):
        raise DataError("contains no rows", where=shown, key="data.path")
    first = rows.read(0, LOOKED_AT)
    if all(isinstance(row, BadRow) for row in first):
        raise DataError(
            f"none of the first {len(first):,} rows can be read: {first[0]}", where=rows.where(0), key="data.path"
        )


def describe_request(
    path: str | Path | Sequence[str | Path], *, name: str | None, split: str, num_rows: int | None, seed: int
) -> dict[str, object]:
    """Describes what `open_rows` was asked for, as plain data; local paths absolute."""
    paths = [path] if isinstance(path, str | Path) else path
    absolute = [_absolute(str(each)) for each in paths]
    return {
        "path": absolute[0] if isinstance(path, str | Path) else absolute,
        "name": name,
        "split": split,
        "num_rows": num_rows,
        "seed": seed if any(str(each) in synthetic.READERS for each in paths) else None,
    }


def _absolute(path: str) -> str:
    if path in synthetic.READERS or not is_local(path):
        return path
    local = Path(path).expanduser()
    return str(local.absolute() if is_pattern(path) else local.resolve())


def _open(place: Place, name: str | None, split: str, num_rows: int | None, seed: int) -> Sequence[Reader]:
    if place.generated:
        count = synthetic.DEFAULT_ROWS if num_rows is None else num_rows
        return [synthetic.READERS[place.path](count, seed=seed, split=split)]
    if place.on_hub:
        return [TableReader(load_from_hub(place.path, name, split), f"{place.path}/{split}")]
    if place.saved:
        return [open_saved(Path(place.path).expanduser(), place.labels[0], split)]
    named = zip(place.files, place.labels, strict=True)
    return [OPENERS[kind_of(file)](unpacked(file, label), label) for file, label in named]


def texts(rows: Rows, format: str = "auto", reading: Reading | None = None, *, kind: Kind = "example") -> Iterator[str]:
    """Yields the text of the good ones among the first `CORPUS_ROWS` rows, piece by piece, to train a tokenizer on.

    `kind` is as `find_format` has it.

    Raises:
        DataError: the rows are tokenised already, or of no known format.
    """
    reading = reading or Reading()
    format, _ = find_format(rename_columns(rows.columns, reading.columns), format, kind=kind)
    for start in range(0, min(len(rows), CORPUS_ROWS), _AT_ONCE):
        for row in rows.read(start, start + _AT_ONCE):
            if isinstance(row, BadRow):
                continue
            try:
                sample = read_row(row, format, reading)
            except BadRow:
                continue
            if isinstance(sample, Ids):
                fix = "name the tokenizer they were made with in `model.tokenizer_name_or_path`"
                raise DataError("the rows are token ids: there is no text to train a tokenizer on", fix=fix)
            for piece in _pieces(sample):
                yield piece.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair becomes "?"


def _pieces(sample: Text | Chat | Pair | Answers | Words) -> list[str]:
    if isinstance(sample, Pair | Answers):
        parts = sample.answers if isinstance(sample, Answers) else (sample.chosen, sample.rejected)
        return [piece for part in parts for piece in _pieces(part)]
    if isinstance(sample, Words):
        return [sample.text]
    if isinstance(sample, Chat):
        return [message["content"] for message in sample.messages if message.get("content")]
    return [sample.prompt + sample.completion]


def open_saved(path: Path, label: str, split: str) -> TableReader:
    """Opens a directory that `save_to_disk` of `datasets` has written.

    Raises:
        DataError: it is damaged, or has no such split.
    """
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever Arrow or JSON has to say about a damaged directory
        raise DataError(f"cannot be loaded as a saved dataset: {error}", where=str(path)) from None
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise no_split(path, split, list(saved))
        return TableReader(saved[split], f"{label}/{split}")
    if split not in ("train", str(saved.split)):
        raise no_split(path, split, [str(saved.split or "train")])
    return TableReader(saved, label)


def load_from_hub(path: str, name: str | None, split: str, *, streaming: bool = False) -> Any:
    """Loads a dataset of the Hub: a `datasets.Dataset`, or an `IterableDataset` that is downloaded while it is read.

    Raises:
        DataError: it can't be loaded.
    """
    import datasets

    try:
        return datasets.load_dataset(path, name, split=split, streaming=streaming)
    except Exception as error:  # network, spelling, permission, configuration: its message says which
        what = f"cannot be loaded: {type(error).__name__}: {error}"
        fix = "check its name on the Hub, `data.name` (configuration), `data.split` and the network"
        raise DataError(what, key="data.path", value=path, fix=fix) from None
