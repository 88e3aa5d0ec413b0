"""Where rows come from: files, directories of files, saved datasets, the Hub, or `packtrain:arithmetic`.

    rows = open_rows("train.jsonl")
    rows[16]          {"question": ..., "answer": ...}
    rows.where(16)    "train.jsonl, line 17"

Lines count from 1, as editors show them; rows of a table from 0, as `dataset[i]` does.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from packtrain.data import synthetic
from packtrain.data.formats import Ids, Reading, find_format, read_row, rename_columns
from packtrain.data.messages import Chat
from packtrain.data.readers import OPENERS, Reader, Row, TableReader
from packtrain.data.report import BadRow
from packtrain.data.store import hash_of, stat_files
from packtrain.errors import DataError, shorten

logger = logging.getLogger(__name__)

_LOOKED_AT = 100  # rows whose keys are the columns
_AT_ONCE = 1000  # rows read at once while iterating
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}


class Rows:
    """Raw rows of one or more readers, one after another; picklable, read on demand.

    Args:
        readers: see `packtrain.data.readers.Reader`.
        num_rows: the first rows only.
        request: plain data that says what was asked for, as a key for the cache.
        files: path -> [size, modification time in ns] of the files behind them.
    """

    def __init__(
        self,
        readers: list[Reader],
        *,
        num_rows: int | None = None,
        request: dict[str, object] | None = None,
        files: dict[str, list[int]] | None = None,
    ):
        self.request, self.files = request, files or {}
        self._readers = readers
        self._bounds = np.cumsum([0, *map(len, readers)])
        self._count = int(self._bounds[-1]) if num_rows is None else min(num_rows, int(self._bounds[-1]))
        found = {column: None for row in self.read(0, _LOOKED_AT) if isinstance(row, dict) for column in row}
        self.columns: list[str] = list(found)

    @property
    def fingerprint(self) -> str:
        """A hash of the contents: the same for a file moved elsewhere, another for a file changed."""
        return hash_of(self._count, [reader.fingerprint for reader in self._readers])

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
    path: str | Path, *, name: str | None = None, split: str = "train", num_rows: int | None = None, seed: int = 0
) -> Rows:
    """Opens rows without reading them all.

    Args:
        path: a JSONL, JSON, CSV, TSV or Parquet file; a directory of files of one kind; a directory written by
            `datasets`' `save_to_disk`; a Hub dataset; or `packtrain:arithmetic`.
        name: configuration of a Hub dataset.
        split: which split. Files of a directory belong to the split that their path names (`train-0001.parquet`,
            `test/part.jsonl`), all to `train` where none names one; a single file is `train`.
        num_rows: the first rows only; how many `packtrain:arithmetic` makes.
        seed: of `packtrain:arithmetic`.

    Raises:
        DataError: nothing of that name, no such split, an unreadable file, a `name` for a local file. Broken rows raise
            nothing yet.
    """
    request = describe_request(path, name=name, split=split, num_rows=num_rows, seed=seed)
    if str(path) in synthetic.READERS:
        if split not in synthetic.SPLITS:
            raise _no_split(path, split, list(synthetic.SPLITS))
        count = synthetic.DEFAULT_ROWS if num_rows is None else num_rows
        return Rows([synthetic.READERS[str(path)](count, seed=seed, split=split)], request=request)
    files = find_files(path, split)
    if files and name:
        fix = "leave it out: a file or directory has no configurations"
        raise DataError("applies only to datasets of the Hub", key="data.name", value=name, fix=fix)
    stats = stat_files(files)  # before reading: a file that changes meanwhile is found changed next time
    local = Path(path).expanduser()
    if not files:
        readers: list[Reader] = [_open_hub(str(path), name, split)]
    elif _is_saved(local):
        readers = [_open_saved(local, split)]
    else:
        root = local if local.is_dir() else local.parent
        readers = [OPENERS[file.suffix.lower()](file, file.relative_to(root).as_posix()) for file in files]
    rows = Rows(readers, num_rows=num_rows, request=request, files=stats)
    if not len(rows):
        raise DataError("contains no rows", where=str(path), key="data.path")
    first = rows.read(0, _LOOKED_AT)
    if all(isinstance(row, BadRow) for row in first):
        raise DataError(
            f"none of the first {len(first):,} rows can be read: {first[0]}", where=rows.where(0), key="data.path"
        )
    return rows


def describe_request(
    path: str | Path, *, name: str | None, split: str, num_rows: int | None, seed: int
) -> dict[str, object]:
    """Describes what `open_rows` was asked for, as plain data; local paths absolute."""
    local = Path(path).expanduser()
    return {
        "path": str(local.resolve()) if local.exists() and str(path) not in synthetic.READERS else str(path),
        "name": name,
        "split": split,
        "num_rows": num_rows,
        "seed": seed if str(path) in synthetic.READERS else None,
    }


def find_files(path: str | Path, split: str = "train") -> list[Path]:
    """Finds the files behind a local path; none for the Hub and `packtrain:arithmetic`.

    Raises:
        DataError: it looks local and is not there, or has no such split.
    """
    if str(path) in synthetic.READERS:
        return []
    path = Path(path).expanduser()
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.is_file()) if _is_saved(path) else _files_of(path, split)
    if path.is_file():
        if path.suffix.lower() not in OPENERS:
            what, fix = f"is not a supported kind of file ({', '.join(OPENERS)})", "convert, unpack or rename it"
            raise DataError(what, key="data.path", value=str(path), fix=fix)
        if split != "train":
            raise _no_split(path, split, ["train"])
        return [path]
    if path.suffix.lower() in OPENERS or not _HUB_NAME.fullmatch(str(path)):
        raise DataError("there is no such file or directory", key="data.path", value=str(path))
    return []


def texts(rows: Rows, format: str = "auto", reading: Reading | None = None) -> Iterator[str]:
    """Yields the text of every good row, piece by piece, to train a tokenizer on.

    Raises:
        DataError: the rows are tokenised already, or of no known format.
    """
    reading = reading or Reading()
    format, _ = find_format(rename_columns(rows.columns, reading.columns), format)
    for start in range(0, len(rows), _AT_ONCE):
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
            if isinstance(sample, Chat):
                pieces = [message["content"] for message in sample.messages if message.get("content")]
            else:
                pieces = [sample.prompt + sample.completion]
            for piece in pieces:
                yield piece.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair becomes "?"


def _is_saved(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _files_of(directory: Path, split: str) -> list[Path]:
    """Finds the data files of a directory that belong to a split."""
    files: dict[str, list[Path]] = {}
    try:
        paths = sorted(directory.rglob("*"))
    except OSError as error:
        fix = "name a directory of data files"
        raise DataError(
            f"the directory cannot be listed: {error}", key="data.path", value=str(directory), fix=fix
        ) from None
    for path in paths:
        inside = path.relative_to(directory)
        if path.is_file() and path.suffix.lower() in OPENERS and not any(p.startswith(".") for p in inside.parts):
            words = re.findall("[a-z]+", inside.with_suffix("").as_posix().lower())
            named = next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), "")
            files.setdefault(named, []).append(path)
    if not files:
        what = f"the directory contains no data files ({', '.join(OPENERS)}) and no saved dataset"
        raise DataError(what, key="data.path", value=str(directory))
    if set(files) == {""}:
        files = {"train": files[""]}
    chosen = files.get(_SPLIT_WORDS.get(split, split))
    if not chosen:
        raise _no_split(directory, split, sorted(name or "(unnamed)" for name in files))
    kinds = {path.suffix.lower() for path in chosen}
    if len(kinds) > 1:
        fix = "name one file, or keep only one kind of file in the directory"
        raise DataError(f"contains several kinds of files: {', '.join(sorted(kinds))}", where=str(directory), fix=fix)
    if unnamed := [path.name for path in files.get("", ()) if path not in chosen]:
        logger.warning(
            "%s: skipped files whose names say no split, because the names of others do: %s",
            directory,
            shorten(unnamed),
        )
    return chosen


def _open_saved(path: Path, split: str) -> TableReader:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever Arrow or JSON has to say about a damaged directory
        raise DataError(f"cannot be loaded as a saved dataset: {error}", where=str(path)) from None
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise _no_split(path, split, list(saved))
        return TableReader(saved[split], f"{path.name}/{split}")
    if split not in ("train", str(saved.split)):
        raise _no_split(path, split, [str(saved.split or "train")])
    return TableReader(saved, path.name)


def _open_hub(path: str, name: str | None, split: str) -> TableReader:
    import datasets

    try:
        dataset = datasets.load_dataset(path, name, split=split)
    except Exception as error:  # network, spelling, permission, configuration: its message says which
        what = f"cannot be loaded: {type(error).__name__}: {error}"
        fix = "check its name on the Hub, `data.name` (configuration), `data.split` and the network"
        raise DataError(what, key="data.path", value=path, fix=fix) from None
    return TableReader(dataset, f"{path}/{split}")


def _no_split(path: str | Path, split: str, known: list[str]) -> DataError:
    fix = f"its splits are: {', '.join(known)}"
    return DataError(f"{path} has no such split", key="data.split", value=split, fix=fix)
