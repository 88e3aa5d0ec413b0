"""Files and tables -> raw rows, one reader per kind.

A reader holds no rows in memory and can be pickled, so that worker processes read their own share. A row that
cannot be read does not stop the others: `read` returns a `BadRow` with the reason in its place, and whoever
tokenises decides to stop or to skip.

A text file (JSONL, JSON, CSV) is scanned once for the byte span of every row; parsing is left to the process that reads
the row. So nothing is held in memory but the spans, and no schema is inferred over rows: a column may hold text in one
row and a number in the next, only the odd row is bad, and it is named by its line. Tables are Parquet files and what
`datasets` loads.
"""

from __future__ import annotations

import codecs
import csv
import functools
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from packtrain.data.report import BadRow, reason_of
from packtrain.errors import DataError, shorten

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq


Row = dict[str, object]
_BLOCK = 1 << 24  # bytes read at once while scanning
BOM = b"\xef\xbb\xbf"
CSV_FIELD_LIMIT = 2**31 - 1  # csv's own guard of 131,072 characters is less than a long document


class Reader(Protocol):
    """A part of `Rows`: the rows of one file, one dataset or one generator."""

    fingerprint: str  # of the contents
    label: str  # how messages call it

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> list[Row | BadRow]: ...

    def where(self, row: int) -> str: ...


# ------------------------------------------------------------------------------------------------- text files


class TextReader:
    """Rows of a text file as byte spans.

    Args:
        path: the file; `label` is how messages call it.
        spans: int64 `[n, 2]`, first byte and end of every row.
        lines: int64 `[n]`, the line (from 1) on which it starts.
        parse: bytes of one row -> row; raises BadRow.
    """

    notes: tuple[str, ...] = ()  # what was skipped while the rows were found

    def __init__(
        self,
        path: Path,
        label: str,
        *,
        spans: np.ndarray,
        lines: np.ndarray,
        parse: Callable[[bytes], Row],
        fingerprint: str,
    ):
        self.path, self.label, self.fingerprint = path, label, fingerprint
        self._spans, self._lines, self._parse = spans, lines, parse

    def __len__(self) -> int:
        return len(self._spans)

    def read(self, start: int, stop: int) -> list[Row | BadRow]:
        spans = self._spans[start:stop]
        if not len(spans):
            return []
        first = int(spans[0, 0])
        with self.path.open("rb") as file:
            file.seek(first)
            block = file.read(int(spans[-1, 1]) - first)
        return [attempt(self._parse, block[a:b]) for a, b in (spans - first).tolist()]

    def where(self, row: int) -> str:
        return f"{self.label}, line {self._lines[row]}"


def open_jsonl(path: Path, label: str) -> TextReader:
    """Opens a file with one JSON object per line; lines of nothing but blanks are skipped, and counted in a note.

    Raises:
        DataError: the file is JSON, but not by lines.
    """
    _refuse_wide(path, label)
    spans, fingerprint = _scan_lines(path)
    blank = _is_blank(path, spans)
    rows = np.flatnonzero(~blank)
    _refuse_one_document(path, label, spans[rows])
    reader = TextReader(path, label, spans=spans[rows], lines=rows + 1, parse=parse_json, fingerprint=fingerprint)
    if count := int(blank.sum()):
        reader.notes = (f"{label}: skipped {count:,} empty line{'s' if count > 1 else ''}",)
    return reader


def _refuse_wide(path: Path, label: str) -> None:
    """Refuses a file that begins as UTF-16 and UTF-32 do, of which every byte would be read wrongly."""
    with path.open("rb") as file:
        refuse_wide(file.read(2), label)


def refuse_wide(start: bytes, label: str) -> None:
    """Raises DataError where the first bytes of a file are those of UTF-16 or UTF-32."""
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        what, fix = "is text in UTF-16 or UTF-32, and must be UTF-8", "convert it: `iconv -f UTF-16 -t UTF-8 FILE`"
        raise DataError(what, where=label, key="data.path", fix=fix)


def _refuse_one_document(path: Path, label: str, spans: np.ndarray) -> None:
    """Refuses a file whose first line opens a JSON object or array that later lines go on with."""
    if len(spans) < 2:
        return
    with path.open("rb") as file:
        file.seek(int(spans[0, 0]))
        first = file.read(int(min(spans[0, 1] - spans[0, 0], _BLOCK))).strip()
    refuse_one_document(first, label)


def refuse_one_document(first: bytes, label: str) -> None:
    """Raises DataError where the first of several lines opens a JSON object or array that the others go on with."""
    if first == b"{":
        what, fix = (
            "is pretty-printed JSON, and every line must be an object",
            "write one object per line: `jq -c . FILE`",
        )
        raise DataError(what, where=f"{label}, line 1", key="data.path", fix=fix)
    if first.startswith(b"[") and not first.endswith(b"]"):
        what, fix = "is a JSON array, and every line must be an object", "rename the file to .json"
        raise DataError(what, where=f"{label}, line 1", key="data.path", fix=fix)


def open_json(path: Path, label: str) -> TextReader:
    """Opens a JSON array of objects, or JSON lines under another name.

    Raises:
        DataError: the array is broken (rows after the break cannot be told apart).
    """
    with path.open("rb") as file:
        start = file.read(1 << 12).removeprefix(BOM).lstrip()
    if not start.startswith(b"["):
        return open_jsonl(path, label)
    contents = path.read_bytes()
    try:
        text = contents.decode("utf-8")
    except UnicodeDecodeError as error:
        line = contents.count(b"\n", 0, error.start) + 1
        raise DataError(f"invalid UTF-8 at byte {error.start}", where=f"{label}, line {line}") from None
    spans, lines = _scan_array(text, label)
    fingerprint = hashlib.sha256(contents).hexdigest()
    return TextReader(path, label, spans=spans, lines=lines, parse=parse_json, fingerprint=fingerprint)


def open_csv(path: Path, label: str, delimiter: str = ",") -> TextReader:
    """Opens a table of text: a header line, then one record per row; fields may hold quoted newlines; all values are text.

    Raises:
        DataError: no usable header, or quoting so broken that records cannot be told apart.
    """
    _refuse_wide(path, label)
    csv.field_size_limit(CSV_FIELD_LIMIT)
    line_spans, fingerprint = _scan_lines(path)
    records = []  # (first line, end line) of every record, from 0
    with path.open("rb") as file:
        if file.read(len(BOM)) != BOM:
            file.seek(0)
        text = (line.decode("utf-8", "surrogateescape") for line in file)
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        start = 0
        try:
            header = [name.strip() for name in next(reader, [])]
            start = reader.line_num
            for fields in reader:
                if fields:
                    records.append((start, reader.line_num))
                start = reader.line_num
        except csv.Error as error:
            raise DataError(f"invalid CSV record: {error}", where=f"{label}, line {start + 1}") from None
    check_header(header, label)
    bounds = np.array(records, dtype=np.int64).reshape(-1, 2)
    spans = np.stack([line_spans[bounds[:, 0], 0], line_spans[bounds[:, 1] - 1, 1]], axis=1)
    parse = functools.partial(parse_csv, header=header, delimiter=delimiter)
    return TextReader(path, label, spans=spans, lines=bounds[:, 0] + 1, parse=parse, fingerprint=fingerprint)


def check_header(header: list[str], label: str) -> None:
    """Raises DataError for the names of a table's columns where some are empty or repeated."""
    if header and not header[0] and all(header[1:]):
        fix = "write it with `to_csv(..., index=False)`, or give the column a name"
        raise DataError(
            "the first column has no name; pandas writes its index so", where=f"{label}, line 1", value=header, fix=fix
        )
    if not all(header) or len(set(header)) < len(header) or not header:
        fix = "give every column its own name in the first line"
        raise DataError(
            "the header has empty or repeated column names", where=f"{label}, line 1", value=header, fix=fix
        )


def attempt(parse: Callable[[bytes], Row], block: bytes) -> Row | BadRow:
    """Parses a row, or returns what is wrong with it."""
    try:
        return parse(block)
    except BadRow as bad:
        return bad


def _decode(block: bytes) -> str:
    try:
        return block.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(f"invalid UTF-8 at byte {error.start} of the row") from None


def parse_json(block: bytes) -> Row:
    """Reads a line of JSON; raises BadRow where it is no object."""
    text = _decode(block)
    try:
        row = json.loads(text, object_pairs_hook=_object_of)
    except BadRow:
        raise
    except json.JSONDecodeError as error:
        raise BadRow(f"invalid JSON: {reason_of(error)} at column {error.pos + 1}") from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; thousands of brackets
        raise BadRow(f"cannot be read as JSON: {error}") from None
    if not isinstance(row, dict):
        raise BadRow(f"is not a JSON object: {shorten(row, 40)}")
    return row


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for n, (key, _) in enumerate(pairs) if any(key == other for other, _ in pairs[:n]))
        raise BadRow(f"contains the key '{twice}' twice")
    return found


def parse_csv(block: bytes, *, header: list[str], delimiter: str) -> Row:
    """Reads a record of a table of text; raises BadRow where it has other fields than the header."""
    csv.field_size_limit(CSV_FIELD_LIMIT)
    try:
        fields = next(csv.reader([_decode(block)], delimiter=delimiter, strict=True), [])
    except csv.Error as error:  # a file that has changed since its records were found
        raise BadRow(f"invalid CSV record: {error}") from None
    if len(fields) != len(header):
        raise BadRow(f"has {len(fields)} fields, and the header names {len(header)}")
    return dict(zip(header, fields, strict=True))


def _scan_lines(path: Path) -> tuple[np.ndarray, str]:
    """Finds the byte spans of all lines without their newline, int64 `[lines, 2]`, and the SHA-256 of the file."""
    digest, ends, size = hashlib.sha256(), [], 0
    start = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            if size == 0 and block.startswith(BOM):
                start = len(BOM)
            digest.update(block)
            ends.append(np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n")) + size)
            size += len(block)
    newlines = np.concatenate(ends or [np.empty(0, dtype=np.int64)])
    starts = np.concatenate([[start], newlines + 1])
    stops = np.concatenate([newlines, [size]])
    spans = np.stack([starts, stops], axis=1).astype(np.int64)
    return (spans if starts[-1] < size else spans[:-1]), digest.hexdigest()


def _is_blank(path: Path, spans: np.ndarray) -> np.ndarray:
    """Returns bool `[lines]`: lines of nothing, or of nothing but blanks (the `\\r` of a Windows file is one)."""
    blank = spans[:, 1] <= spans[:, 0]
    rest = np.flatnonzero(~blank)
    if rest.size:
        contents = np.memmap(path, dtype=np.uint8, mode="r")
        begin_blank = rest[np.isin(contents[spans[rest, 0]], np.frombuffer(b" \t\r", dtype=np.uint8))]
        for line in begin_blank.tolist():
            blank[line] = not bytes(contents[spans[line, 0] : spans[line, 1]]).strip()
    return blank


def _scan_array(text: str, label: str) -> tuple[np.ndarray, np.ndarray]:
    """Finds the byte spans and lines of the elements of a JSON array."""
    decode, blanks = json.JSONDecoder().raw_decode, re.compile(r"\s*", re.ASCII)
    bounds, line, seen = [], 1, 0  # `seen`: characters whose newlines are in `line`
    lines = []

    def skip(at: int) -> int:
        return blanks.match(text, at).end()

    def broken(what: str, at: int) -> DataError:
        return DataError(f"invalid JSON array: {what}", where=f"{label}, line {text.count(chr(10), 0, at) + 1}")

    at = skip(text.index("[") + 1)
    while text[at : at + 1] != "]":
        try:
            _, end = decode(text, at)
        except json.JSONDecodeError as error:
            raise broken(reason_of(error), error.pos) from None
        except (ValueError, RecursionError) as error:
            raise broken(error, at) from None
        line, seen = line + text.count("\n", seen, at), at
        bounds.append((at, end))
        lines.append(line)
        at = skip(end)
        if text[at : at + 1] == ",":
            at = skip(at + 1)
        elif text[at : at + 1] != "]":
            raise broken("expected ',' or ']'", at)
    if skip(at + 1) != len(text):
        raise broken("unexpected text after its end", skip(at + 1))
    spans = np.array(bounds, dtype=np.int64).reshape(-1, 2)
    return (spans if text.isascii() else _bytes_of(text, spans)), np.array(lines, dtype=np.int64)


def _bytes_of(text: str, spans: np.ndarray) -> np.ndarray:
    """Turns character positions into byte positions in UTF-8."""
    flat = spans.ravel().tolist()
    sizes = [len(text[a:b].encode("utf-8")) for a, b in zip([0, *flat[:-1]], flat, strict=True)]
    return np.cumsum(sizes, dtype=np.int64).reshape(-1, 2)


# ----------------------------------------------------------------------------------------------------- tables


class TableReader:
    """Rows of an Arrow-backed `datasets.Dataset`: a saved directory or a Hub dataset."""

    def __init__(self, dataset: datasets.Dataset, label: str):
        self.label, self.fingerprint = label, dataset._fingerprint  # of the contents and what made them
        self._dataset = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, start: int, stop: int) -> list[Row | BadRow]:
        return rows_of_table(self._dataset[start:stop])

    def where(self, row: int) -> str:
        return f"{self.label}, row {row}"


def read_parquet_metadata(path: Path, label: str) -> pq.FileMetaData:
    """Reads the end of a Parquet file, which says what is in it.

    Raises:
        DataError: there is none, or several columns have one name.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
    except pa.ArrowException as error:
        raise DataError(f"is not a readable Parquet file: {first_line(error)}", where=label) from None
    names = metadata.schema.to_arrow_schema().names
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        fix = "give every column its own name"
        raise DataError("contains several columns of one name", where=label, key="data.path", value=twice, fix=fix)
    return metadata


class ParquetReader:
    """Rows of a Parquet file, one row group in memory at a time."""

    def __init__(self, path: Path, label: str):
        metadata = read_parquet_metadata(path, label)
        groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self.path, self.label, self.fingerprint = path, label, _hash_file(path)
        self._bounds = np.cumsum([0, *groups])  # [groups + 1]
        self._loaded: tuple[int, pa.Table] | None = None

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_loaded": None}

    def read(self, start: int, stop: int) -> list[Row | BadRow]:
        rows: list[Row | BadRow] = []
        while start < min(stop, len(self)):
            group = int(np.searchsorted(self._bounds, start, side="right")) - 1
            first, end = self._bounds[group : group + 2].tolist()
            rows += rows_of_table(self._group(group).slice(start - first, min(stop, end) - start))
            start = end
        return rows

    def _group(self, group: int) -> pa.Table:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._loaded is None or self._loaded[0] != group:
            try:
                self._loaded = group, pq.ParquetFile(self.path).read_row_group(group)
            except (pa.ArrowException, OSError) as error:
                where = f"{self.label}, from row {self._bounds[group]} on"
                raise DataError(f"damaged Parquet row group: {first_line(error)}", where=where) from None
        return self._loaded[1]

    def where(self, row: int) -> str:
        return f"{self.label}, row {row}"


OPENERS: dict[str, Callable[[Path, str], Reader]] = {
    ".jsonl": open_jsonl,
    ".ndjson": open_jsonl,
    ".json": open_json,
    ".csv": open_csv,
    ".tsv": functools.partial(open_csv, delimiter="\t"),
    ".parquet": ParquetReader,
}


def rows_of_table(table: pa.Table) -> list[Row | BadRow]:
    """Returns rows as they were before Arrow gave all structs of a column the same keys, with nulls where one had none."""
    try:
        rows = table.to_pylist()
        for column in (field.name for field in table.schema if _holds_structs(field.type)):
            for row in rows:
                row[column] = _without_nulls(row[column])
        return rows
    except UnicodeDecodeError as error:
        if len(table) == 1:
            return [BadRow(f"invalid UTF-8 at byte {error.start} of a column")]
        return [row for i in range(len(table)) for row in rows_of_table(table.slice(i, 1))]


def _holds_structs(type: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_struct(type) or any(_holds_structs(type.field(i).type) for i in range(type.num_fields))


def _without_nulls(value: object) -> object:
    """Returns the value without keys that are null, at any depth."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def has_changed(reader: Reader) -> bool:
    """Returns whether the file behind a reader has other contents than when it was opened; False where there is none."""
    path = getattr(reader, "path", None)
    return path is not None and _hash_file(path) != reader.fingerprint


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_line(error: BaseException) -> str:
    """Returns the first line of what an error says."""
    return str(error).split("\n", 1)[0]
