"""Files and tables -> raw rows, one reader per kind.

A reader holds no rows in memory and can be pickled, so that worker processes read their own share. A row that
cannot be read does not stop the others: `read` returns a `BadRow` with the reason in its place, and whoever
tokenises decides to stop or to skip.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from packtrain.data.report import BadRow
from packtrain.data.text_files import Row, open_csv, open_json, open_jsonl
from packtrain.errors import DataError

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa


class Reader(Protocol):
    """What `Rows` joins: the rows of one file, one dataset or one generator."""

    fingerprint: str  # of the contents

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> list[Row | BadRow]: ...

    def where(self, row: int) -> str: ...


class TableReader:
    """Rows of an Arrow-backed `datasets.Dataset`: a saved directory or a Hub dataset."""

    def __init__(self, dataset: datasets.Dataset, label: str):
        self.label, self.fingerprint = label, dataset._fingerprint  # theirs: of the contents and what made them
        self._dataset = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, start: int, stop: int) -> list[Row | BadRow]:
        return _rows_of_table(self._dataset[start:stop])

    def where(self, row: int) -> str:
        return f"{self.label}, row {row}"


class ParquetReader:
    """Rows of a Parquet file, one row group in memory at a time."""

    def __init__(self, path: Path, label: str):
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            metadata = pq.read_metadata(path)
        except pa.ArrowException as error:
            raise DataError(f"not a readable Parquet file: {_first_line(error)}", where=label) from None
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
            rows += _rows_of_table(self._group(group).slice(start - first, min(stop, end) - start))
            start = end
        return rows

    def _group(self, group: int) -> pa.Table:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._loaded is None or self._loaded[0] != group:
            try:
                self._loaded = group, pq.ParquetFile(self.path).read_row_group(group)
            except (pa.ArrowException, OSError) as error:
                where = f"{self.label}, row {self._bounds[group]} and on"
                raise DataError(f"damaged Parquet row group: {_first_line(error)}", where=where) from None
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


def _rows_of_table(table: pa.Table) -> list[Row | BadRow]:
    """Rows as they were before Arrow gave all structs of a column the same keys, with nulls where one had none."""
    try:
        rows = table.to_pylist()
        for column in (field.name for field in table.schema if _holds_structs(field.type)):
            for row in rows:
                row[column] = _without_nulls(row[column])
        return rows
    except UnicodeDecodeError as error:
        if len(table) == 1:
            return [BadRow(f"invalid UTF-8 at byte {error.start} of a column")]
        return [row for i in range(len(table)) for row in _rows_of_table(table.slice(i, 1))]


def _holds_structs(type: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_struct(type) or any(_holds_structs(type.field(i).type) for i in range(type.num_fields))


def _without_nulls(value: object) -> object:
    """The value with keys that have none left out, at any depth."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_line(error: BaseException) -> str:
    return str(error).split("\n", 1)[0]
