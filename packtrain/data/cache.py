"""Tokenised rows on disk: found again by what they were made from, whole or not there at all.

    <cache>/tokens/<fingerprint>/   tokens*.arrow, lengths.npy, supervised.npy, store.json
    <cache>/requests/<hash>.json    "these paths and options gave that fingerprint", with size and time of the files

`<cache>` is an argument, else `$PACKTRAIN_CACHE`, else `$XDG_CACHE_HOME/packtrain`, else `~/.cache/packtrain`.
A fingerprint covers the contents of the rows and of the tokenizer, the chat template, the options and the
versions of what tokenises. A request is looked up without reading rows or loading a tokenizer: that is how a
plan is made in a fraction of a second. Stores are written aside and renamed, so a reader, or a second process
tokenising the same, never sees half of one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock

from packtrain.data.tokens import Documents, open_files
from packtrain.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STORE_VERSION = 2  # raise it when the same rows and options would give other tokens
_ABANDONED_AFTER = 24 * 3600  # seconds after which a staging directory is a dead process's
_TOKENIZER_FILES = ("tokenizer*", "*.model", "*.jinja", "vocab*", "merges*", "special_tokens_map*", "added_tokens*")


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """The cache directory in force."""
    if cache_dir or os.environ.get("PACKTRAIN_CACHE"):
        return Path(cache_dir or os.environ["PACKTRAIN_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "packtrain"


def hash_of(*parts: object) -> str:
    """SHA-256 (hex) of plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything that decides a tokenizer's output, whatever it is called and wherever it lies."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        contents = json.loads(backend.to_str())
        contents |= {"truncation": None, "padding": None}  # left behind by earlier calls
    else:
        contents = tokenizer.get_vocab()
    return hash_of(
        type(tokenizer).__name__,
        contents,
        tokenizer.chat_template,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        {package: version(package) for package in ("transformers", "tokenizers", "jinja2")},
    )


def tokenizer_key(
    name_or_path: str | None = None,
    *,
    revision: str | None = None,
    vocab_size: int | None = None,
    chat_template: str | Path | None = None,
) -> str:
    """What a recipe says of its tokenizer, as a key for requests; local files count by size and time."""
    files = []
    if name_or_path and Path(name_or_path).is_dir():
        files = [path for pattern in _TOKENIZER_FILES for path in Path(name_or_path).glob(pattern)]
    if chat_template:
        files.append(Path(chat_template))
    return hash_of(name_or_path, revision, vocab_size, stat_files([path for path in files if path.exists()]))


def stat_files(paths: list[Path]) -> dict[str, list[int]]:
    """Path -> [size in bytes, modification time in ns]."""
    stats = {str(path.resolve()): path.stat() for path in sorted(paths)}
    return {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}


def find_store(fingerprint: str, cache_dir: str | Path | None = None) -> Documents | None:
    """The documents of that fingerprint, if their files are there in the sizes they were written with."""
    return read_store(cache_root(cache_dir) / "tokens" / fingerprint)


def read_store(directory: Path) -> Documents | None:
    """The documents of one store, memory-mapped; None if it is not there or not whole."""
    try:
        facts = json.loads((directory / "store.json").read_text())
        files = facts.pop("files")
        if files != {name: (directory / name).stat().st_size for name in files}:
            return None
        return Documents(
            **facts,
            tokens=open_files([directory / name for name in files if name.endswith(".arrow")]),
            lengths=np.load(directory / "lengths.npy", mmap_mode="r"),
            supervised=np.load(directory / "supervised.npy", mmap_mode="r"),
            directory=directory,
            reopen=partial(_reopen, directory),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _reopen(directory: Path) -> Documents:
    documents = read_store(directory)
    if documents is None:
        raise DataError("the tokenised rows have been removed, or are damaged", where=str(directory))
    return documents


def one_builder(fingerprint: str, cache_dir: str | Path | None = None) -> FileLock:
    """A lock for the process that tokenises; other ranks, also on other hosts of a shared disk, wait and then read."""
    root = cache_root(cache_dir) / "locks"
    with contextlib.suppress(OSError):  # `staging` says what is wrong with the directory
        root.mkdir(parents=True, exist_ok=True)
    return FileLock(root / f"{fingerprint}.lock")


@contextlib.contextmanager
def staging(cache_dir: str | Path | None = None) -> Iterator[Path]:
    """A new directory to write a store into; whatever is left of it at the end is removed.

    Raises:
        DataError: the cache cannot be written to, or the rows can no longer be read.
    """
    root = cache_root(cache_dir) / "tokens"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(root)
        directory = Path(tempfile.mkdtemp(prefix=".staging-", dir=root))
    except OSError as error:
        fix = "set the environment variable PACKTRAIN_CACHE to a directory that can be written to"
        raise DataError(f"cannot write to the cache: {error.strerror}", where=str(root), fix=fix) from None
    try:
        yield directory
    except OSError as error:  # a full disk, or a file of rows that is gone
        raise DataError(f"tokenising failed: {error}", where=str(root)) from error
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def publish(directory: Path, facts: dict[str, object], cache_dir: str | Path | None = None) -> Documents:
    """Move a staged store to where it is looked for. If another process was faster, its store stands.

    Args:
        directory: holds `tokens*.arrow`, `lengths.npy`, `supervised.npy`.
        facts: `fingerprint`, `format`, `problems`, `notes` of the documents.
    """
    sizes = {path.name: path.stat().st_size for path in sorted(directory.iterdir())}
    (directory / "store.json").write_text(json.dumps(facts | {"files": sizes}))
    target = cache_root(cache_dir) / "tokens" / str(facts["fingerprint"])
    try:
        os.rename(directory, target)
    except OSError:  # there is one already
        if read_store(target) is None:  # a damaged one
            shutil.rmtree(target, ignore_errors=True)
            os.rename(directory, target)
    return _reopen(target)


def remember(
    request: dict[str, object], fingerprint: str, files: dict[str, list[int]], cache_dir: str | Path | None = None
) -> None:
    """Note that a request gave a fingerprint, from files of these sizes and times."""
    path = _request_path(request, cache_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps({"fingerprint": fingerprint, "files": files, "request": request}))
    os.replace(aside, path)


def recall(
    request: dict[str, object], files: dict[str, list[int]], cache_dir: str | Path | None = None
) -> Documents | str:
    """The documents that a request gave before, or why there is none to use: `files` are as they stand now."""
    try:
        noted = json.loads(_request_path(request, cache_dir).read_text())
    except (OSError, ValueError):
        return "these rows have not been tokenised with these options yet"
    if changed := _difference(noted["files"], files):
        return changed
    documents = find_store(noted["fingerprint"], cache_dir)
    return documents or "the tokenised rows have been removed from the cache, or are damaged"


def _difference(before: dict[str, list[int]], now: dict[str, list[int]]) -> str | None:
    for name in before.keys() - now.keys():
        return f"{name} is gone since the rows were tokenised"
    for name in now.keys() - before.keys():
        return f"{name} has been added since the rows were tokenised"
    for name, (size, _) in before.items():
        if now[name] != before[name]:
            how = f"from {size:,} to {now[name][0]:,} bytes" if now[name][0] != size else "at the same size"
            return f"{name} has changed since the rows were tokenised ({how})"
    return None


def _request_path(request: dict[str, object], cache_dir: str | Path | None) -> Path:
    return cache_root(cache_dir) / "requests" / f"{hash_of(STORE_VERSION, request)}.json"


def _remove_abandoned(root: Path) -> None:
    for directory in root.glob(".staging-*"):
        with contextlib.suppress(OSError):
            last_written = max(path.stat().st_mtime for path in (directory, *directory.iterdir()))
            if time.time() - last_written > _ABANDONED_AFTER:
                shutil.rmtree(directory, ignore_errors=True)
