"""Compressed files, unpacked once into the cache, so that rows are read from their bytes as from a plain file's.

    <cache>/unpacked/<hash>     of the file's path, size and time; may be removed whenever no run reads it

`rows.jsonl.gz` gives the same rows, line numbers and tokens as `rows.jsonl`: only its name in messages differs.
"""

from __future__ import annotations

import contextlib
import json
import lzma
import os
import tempfile
from pathlib import Path
from typing import IO

from packtrain.data.store import SET_CACHE, cache_root, hash_files, hash_of
from packtrain.errors import DataError

CODECS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd", ".lz4": "lz4"}
_BLOCK = 1 << 24  # bytes unpacked at once


def kind_of(path: Path) -> str:
    """Returns the suffix that says what a file holds.

    >>> kind_of(Path("a/rows.jsonl")), kind_of(Path("a/rows.JSON.gz")), kind_of(Path("a/rows.gz"))
    ('.jsonl', '.json', '')
    """
    packed = path.suffix.lower() in CODECS
    return Path(path.stem).suffix.lower() if packed else path.suffix.lower()


def unpacked(path: Path, label: str) -> Path:
    """Returns the file with the bytes of `path`: itself, or where they were unpacked to.

    Args:
        path: any file; compressed if its name ends as a key of `CODECS`.
        label: how messages call it.

    Raises:
        DataError: the file is damaged or not compressed, or the cache has no room for its contents.
    """
    codec = CODECS.get(path.suffix.lower())
    if codec is None:
        return path
    root = cache_root() / "unpacked"
    aside = None
    try:
        target = root / hash_of(codec, *hash_files([path]).values())
        noted = target.with_suffix(".json")
        if _is_whole(target, noted):
            return target
        root.mkdir(parents=True, exist_ok=True)
        with open_packed(path, codec, label) as source, tempfile.NamedTemporaryFile(dir=root, delete=False) as file:
            aside = Path(file.name)
            while block := read_packed(source, path, label):
                file.write(block)
        (found,) = hash_files([aside]).values()
        os.replace(aside, target)  # whole, also where several ranks unpack at once
        aside.write_text(json.dumps(found))
        os.replace(aside, noted)
    except OSError as error:
        raise DataError(f"cannot unpack {label} into the cache: {error}", where=str(root), fix=SET_CACHE) from None
    finally:
        if aside is not None:
            with contextlib.suppress(FileNotFoundError):
                aside.unlink()
    return target


def _is_whole(target: Path, noted: Path) -> bool:
    """Returns whether a file in the cache is as it was unpacked: a drive, a crash or a hand may have changed it."""
    try:
        return json.loads(noted.read_text()) in hash_files([target]).values()
    except (OSError, ValueError):
        return False


class _Streams:
    """Reads the streams of a .xz file to its end. `lzma.open` leaves out, without a word, what comes after the first one
    and can't be unpacked."""

    def __init__(self, path: Path):
        self._file, self._decoder = path.open("rb"), lzma.LZMADecompressor()

    def __enter__(self) -> _Streams:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def read(self, size: int) -> bytes:
        while True:
            packed = b""
            if self._decoder.eof:
                packed = self._decoder.unused_data.lstrip(b"\0") or self._file.read(size).lstrip(b"\0")
                if not packed and not self._file.peek(1):
                    return b""
                if packed:
                    self._decoder = lzma.LZMADecompressor()
            elif self._decoder.needs_input and not (packed := self._file.read(size)):
                raise EOFError("it ends within a stream")
            if not self._decoder.eof and (block := self._decoder.decompress(packed, size)):
                return block


def open_packed(path: Path, codec: str, label: str) -> IO[bytes] | _Streams:
    """Opens a compressed file, to be read by `read_packed`.

    Raises:
        DataError: it is not compressed so, or nothing here reads that.
    """
    import pyarrow as pa

    try:
        if codec == "xz":  # which Arrow does not know
            return _Streams(path)
        if not pa.Codec.is_available(codec):
            what, fix = f"the installed pyarrow was built without {codec}", "pip install --force-reinstall pyarrow"
            raise DataError(what, where=label, fix=fix)
        return pa.input_stream(str(path), compression=codec)
    except OSError as error:
        raise _damaged(error, path, label) from None


def read_packed(source: IO[bytes] | _Streams, path: Path, label: str, size: int = _BLOCK) -> bytes:
    """Reads at most so many bytes of what was packed; none at the end.

    Raises:
        DataError: it is damaged.
    """
    try:
        return source.read(size)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise _damaged(error, path, label) from None


def _damaged(error: Exception, path: Path, label: str) -> DataError:
    what = f"cannot be unpacked: {str(error).strip() or type(error).__name__}"
    return DataError(what, where=label, fix=f"copy it again, or rename it if it is no {path.suffix} file")
