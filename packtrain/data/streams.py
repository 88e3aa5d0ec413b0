"""Rows of a source one after another: none is counted, parsed or kept before it is needed, for `data.streaming`.

    source = open_stream("train.jsonl.gz")
    for raw in source.read(start=1_000_000):    # what comes before is skipped: read, and neither parsed nor tokenised
        raw.row(), raw.where, raw.digest

A row's `digest` is a hash of all rows up to it, so that whoever comes back to a row knows whether the rows before it are
still the same. Files and datasets of the Hub are hashed as they are read. A saved dataset and generated rows have a
fingerprint of their contents, and are entered at any row.
"""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import xxhash

from packtrain.data import synthetic
from packtrain.data.compressed import CODECS, kind_of, open_packed, read_packed, unpacked
from packtrain.data.files import Place, find_places
from packtrain.data.readers import (
    BOM,
    CSV_FIELD_LIMIT,
    Reader,
    Row,
    attempt,
    check_header,
    first_line,
    parse_csv,
    parse_json,
    read_parquet_metadata,
    refuse_one_document,
    refuse_wide,
    rows_of_table,
)
from packtrain.data.report import BadRow
from packtrain.data.sources import load_from_hub, open_saved
from packtrain.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

_BYTES = 1 << 20  # read at once of a file
_ROWS = 256  # read at once of a table


class Raw(NamedTuple):
    """One row as it was read.

    where: its name for messages.
    value: the bytes of a line, or the row of a table.
    parse: makes the row of the value.
    digest: hex, of this row and all before it.
    """

    where: str
    value: Any
    parse: Callable[[Any], Row] | None
    digest: str = ""

    def row(self) -> Row | BadRow:
        """Returns the row, or what is wrong with it."""
        return self.value if self.parse is None else attempt(self.parse, self.value)


class Part(Protocol):
    """One file, dataset or generator of a source."""

    @property
    def label(self) -> str:
        """How messages call it."""
        ...

    @property
    def fingerprint(self) -> str | None:
        """Of its contents, where they are known without reading them; else None."""
        ...

    def __len__(self) -> int:
        """Counts the rows of a part with a fingerprint."""
        ...

    def read(self, start: int) -> Iterator[Raw]:
        """Yields the rows from one on, without their digests; without a fingerprint it is the first."""
        ...


class Source:
    """The rows of a source, in order.

    Args:
        parts: read one after another.
        num_rows: the first rows only; None for all.
        notes: statements about the files, for the report.
    """

    def __init__(self, parts: Sequence[Part], num_rows: int | None = None, notes: Sequence[str] = ()):
        self.parts, self.num_rows, self.notes = parts, num_rows, tuple(notes)

    def read(self, start: int = 0) -> Iterator[Raw]:
        """Yields the rows from number `start` on, until the source ends.

        Raises:
            DataError: a file cannot be read. A broken row raises nothing.
        """
        row, digest = 0, ""
        for part in self.parts:
            first = 0
            if part.fingerprint is not None:
                digest = _chained(digest, part.fingerprint.encode())
                first = min(max(start - row, 0), len(part))
                row += first
            for raw in part.read(first):
                if self.num_rows is not None and row >= self.num_rows:
                    return
                if part.fingerprint is None:
                    digest = _chained(digest, _bytes_of(raw.value))
                row += 1
                if row > start:
                    yield raw._replace(digest=digest)

    def head(self, count: int) -> Head:
        """Reads the first rows, to look at."""
        return Head([*islice(self.read(), count)], ", ".join(part.label for part in self.parts[:2]))


class Head:
    """The first rows of a source, as a `Reader`."""

    def __init__(self, raws: list[Raw], label: str):
        self._raws, self.label = raws, label
        self.fingerprint = raws[-1].digest if raws else ""

    def __len__(self) -> int:
        return len(self._raws)

    def read(self, start: int, stop: int) -> list[Row | BadRow]:
        return [raw.row() for raw in self._raws[start:stop]]

    def where(self, row: int) -> str:
        return self._raws[row].where


def open_stream(
    path: str | Sequence[str],
    *,
    name: str | None = None,
    split: str = "train",
    num_rows: int | None = None,
    seed: int = 0,
) -> Source:
    """Opens a source to be read once, from its beginning or from any row on; arguments as `open_rows`.

    Raises:
        DataError: nothing of that name, no such split, a file that can't be read in order, a `name` for a local file.
    """
    places = find_places(path, split)
    if name and any(place.files for place in places) and not any(place.on_hub for place in places):
        fix = "leave it out: a file or directory has no configurations"
        raise DataError("applies only to datasets of the Hub", key="data.name", value=name, fix=fix)
    parts = [part for place in places for part in _open(place, name, split, num_rows, seed)]
    return Source(parts, num_rows, [note for place in places for note in place.notes])


def _open(place: Place, name: str | None, split: str, num_rows: int | None, seed: int) -> Sequence[Part]:
    if place.generated:
        count = synthetic.DEFAULT_ROWS if num_rows is None else num_rows
        return [Indexed(synthetic.READERS[place.path](count, seed=seed, split=split))]
    if place.on_hub:
        dataset = load_from_hub(place.path, name, split, streaming=True)
        return [Tables(functools.partial(_tables_of, dataset), f"{place.path}/{split}")]
    if place.saved:
        return [Indexed(open_saved(Path(place.path).expanduser(), place.labels[0], split))]
    return [_OPENERS[kind_of(file)](file, label) for file, label in zip(place.files, place.labels, strict=True)]


# ------------------------------------------------------------------------------------------------------ parts


class Indexed:
    """Rows that can be read at any place, with a fingerprint of their contents."""

    def __init__(self, reader: Reader):
        self.reader, self.label, self.fingerprint = reader, reader.label, reader.fingerprint

    def __len__(self) -> int:
        return len(self.reader)

    def read(self, start: int) -> Iterator[Raw]:
        for first in range(start, len(self.reader), _ROWS):
            for row, value in enumerate(self.reader.read(first, first + _ROWS), first):
                yield Raw(self.reader.where(row), value, None)


class _InOrder:
    """A part that is read from its beginning."""

    fingerprint = None
    label: str

    def __len__(self) -> int:
        raise TypeError(f"nobody has counted the rows of {self.label}")


class JsonLines(_InOrder):
    """A file with one JSON object per line, also compressed."""

    def __init__(self, path: Path, label: str):
        self.path, self.label = path, label

    def read(self, start: int) -> Iterator[Raw]:
        rows = ((number, line) for number, line in enumerate(_lines(self.path, self.label), 1) if line.strip())
        first = [*islice(rows, 2)]
        if first:
            self._check_first(first[0][1])
        if len(first) > 1:
            refuse_one_document(first[0][1].strip(), self.label)
        for number, line in chain(first, rows):
            yield Raw(f"{self.label}, line {number}", line, parse_json)

    def _check_first(self, line: bytes) -> None:
        """Raises DataError for a JSON array, which is no file of lines."""


class Json(JsonLines):
    """JSON lines in a file called .json; an array has to be read as a whole."""

    def _check_first(self, line: bytes) -> None:
        if line.lstrip().startswith(b"["):
            what, fix = "is a JSON array, which is read as a whole", "write one object per line: `jq -c '.[]' FILE`"
            raise DataError(what, where=self.label, key="data.streaming", value=True, fix=fix)


class Csv(_InOrder):
    """A table of text, also compressed."""

    def __init__(self, path: Path, label: str, delimiter: str = ","):
        self.path, self.label, self.delimiter = path, label, delimiter

    def read(self, start: int) -> Iterator[Raw]:
        csv.field_size_limit(CSV_FIELD_LIMIT)
        taken: list[bytes] = []  # lines of the present record

        def text() -> Iterator[str]:
            for line in _lines(self.path, self.label):
                taken.append(line + b"\n")
                yield taken[-1].decode("utf-8", "surrogateescape")

        reader, first = csv.reader(text(), delimiter=self.delimiter, strict=True), 1
        try:
            header = [name.strip() for name in next(reader, [])]
            check_header(header, self.label)
            parse = functools.partial(parse_csv, header=header, delimiter=self.delimiter)
            taken.clear()
            first = reader.line_num + 1
            for fields in reader:
                if fields:
                    yield Raw(f"{self.label}, line {first}", b"".join(taken)[:-1], parse)
                taken.clear()
                first = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"invalid CSV record: {error}", where=f"{self.label}, line {first}") from None


class Tables(_InOrder):
    """Rows of Arrow tables that come one after another.

    Args:
        tables: yields them, from the first on.
        label: how messages call them.
    """

    def __init__(self, tables: Callable[[], Iterator[pa.Table]], label: str):
        self.tables, self.label = tables, label

    def read(self, start: int) -> Iterator[Raw]:
        row, tables = 0, self.tables()
        while True:
            try:
                table = next(tables, None)
            except Exception as error:  # network, a damaged file: its message says which
                what = f"cannot be read any further: {type(error).__name__}: {first_line(error)}"
                fix = "check the network and the file, and continue with resume=True"
                raise DataError(what, where=f"{self.label}, from row {row} on", fix=fix) from error
            if table is None:
                return
            for value in rows_of_table(table):
                yield Raw(f"{self.label}, row {row}", value, None)
                row += 1


def _parquet(path: Path, label: str) -> Tables:
    file = unpacked(path, label)
    read_parquet_metadata(file, label)
    return Tables(functools.partial(_tables_in, file), label)


_OPENERS: dict[str, Callable[[Path, str], Part]] = {
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".json": Json,
    ".csv": Csv,
    ".tsv": functools.partial(Csv, delimiter="\t"),
    ".parquet": _parquet,
}


def _tables_in(path: Path) -> Iterator[pa.Table]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_ROWS):
            yield pa.Table.from_batches([batch])


def _tables_of(dataset: Any) -> Iterator[pa.Table]:
    """Yields the tables of a `datasets.IterableDataset`."""
    return dataset.with_format("arrow").iter(batch_size=_ROWS)


def _lines(path: Path, label: str) -> Iterator[bytes]:
    """Yields the lines of a file without their newlines, also of a compressed one."""
    codec = CODECS.get(path.suffix.lower())
    rest, begun = b"", False
    with path.open("rb") if codec is None else open_packed(path, codec, label) as file:
        while block := file.read(_BYTES) if codec is None else read_packed(file, path, label, _BYTES):
            if not begun:
                refuse_wide(block, label)
                block, begun = block.removeprefix(BOM), True
            *lines, rest = (rest + block).split(b"\n")
            yield from lines
    if rest:
        yield rest


def _chained(digest: str, contents: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(digest.encode() + contents)


def _bytes_of(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    return json.dumps(value, default=str).encode()  # a BadRow is its reason
