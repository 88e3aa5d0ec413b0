"""Tokenised rows on disk: found again by what they were made from, whole or not there at all.

    <cache>/tokens/<fingerprint>/   tokens*.arrow, lengths.npy, supervised.npy, store.json
    <cache>/requests/<hash>.json    "these paths and options gave that fingerprint", with size and time of the files

`<cache>` is an argument, else `$PACKTRAIN_CACHE`, else the platform's own (Linux: `$XDG_CACHE_HOME/packtrain`, else
`~/.cache/packtrain`).

A fingerprint covers the contents of the rows and of the tokenizer, the chat template, the options and the
versions of what tokenises. A request is looked up without reading rows or loading a tokenizer: that is how a
plan is made in a fraction of a second. Stores are written aside and renamed, so a reader, or a second process
tokenising the same, never sees half of one. `store.json` holds a hash of every file, and whoever opens a store hashes
its files again, at the speed of reading them: a damaged store is tokenised anew, with a line in the log.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from filelock import FileLock
from platformdirs import user_cache_path

from packtrain.data.tokens import Documents, open_files
from packtrain.errors import DataError
from packtrain.recipe.sections import ModelSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

STORE_VERSION = 5  # raise it when the same rows and options would give other tokens, or other facts of them
_ABANDONED_AFTER = 24 * 3600  # seconds after which a staging directory is a dead process's
SET_CACHE = "set the environment variable PACKTRAIN_CACHE to a directory that can be written to"
_READ_AT_ONCE = 1 << 22  # bytes
_TOKENIZER_FILES = ("tokenizer*", "*.model", "*.jinja", "vocab*", "merges*", "special_tokens_map*", "added_tokens*")


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """Returns the directory of the cache.

    Raises:
        DataError: it would lie in a home directory, and the user has none.
    """
    given = cache_dir or os.environ.get("PACKTRAIN_CACHE")
    try:
        return (Path(given) if given else user_cache_path("packtrain", appauthor=False)).expanduser()
    except RuntimeError:
        raise DataError(
            "there is no directory for the cache, because the user has no home directory", fix=SET_CACHE
        ) from None


def hash_of(*parts: object) -> str:
    """Returns the SHA-256 (hex) of plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# Attributes of a tokenizer that say where it came from, or how it pads and truncates, which is done elsewhere.
_WITHOUT_EFFECT = {
    "_tokenizer", "chat_template", "name_or_path", "init_inputs", "init_kwargs", "files_loaded", "_processor_class",
    "verbose", "model_max_length", "padding_side", "truncation_side", "deprecation_warnings",
    "_in_target_context_manager", "_should_update_post_processor",
}  # fmt: skip


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hashes everything that decides a tokenizer's output, whatever it is called and wherever it lies: its backend, chat
    template and special tokens, and every attribute that may (`split_special_tokens`, `add_bos_token`, ...)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        contents: Any = tokenizer.get_vocab()
    else:  # JSON; before its tokens stands how it pads and truncates, left behind by earlier calls
        contents = backend.to_str().split('"added_tokens":', 1)[-1]
    attributes = {name: value for name, value in vars(tokenizer).items() if name not in _WITHOUT_EFFECT}
    return hash_of(
        type(tokenizer).__name__,
        contents,
        tokenizer.chat_template,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        {name: _plain(value) for name, value in attributes.items()},
        {package: version(package) for package in ("transformers", "tokenizers", "jinja2")},
    )


def _plain(value: Any) -> Any:
    """Returns plain data that is the same for equal values, also in another process."""
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if hasattr(value, "serialized_model_proto"):  # SentencePiece, of tokenizers that run in Python
        return hashlib.sha256(value.serialized_model_proto()).hexdigest()
    plain = value is None or isinstance(value, str | int | float)
    return value if plain else str(value) if type(value).__str__ is not object.__str__ else type(value).__name__


def tokenizer_key(model: ModelSection) -> str:
    """Returns a key for what a recipe says of its tokenizer, to be used in requests; local files count by size and time."""
    name, files = model.tokenizer_name_or_path or model.model_name_or_path, []
    if name and Path(name).is_dir():
        files = [path for pattern in _TOKENIZER_FILES for path in Path(name).glob(pattern)]
    if model.chat_template:
        files.append(Path(model.chat_template))
    existing = [path for path in files if path.exists()]
    return hash_of(name, model.revision, model.tokenizer_vocab_size, stat_files(existing))


def stat_files(paths: list[Path]) -> dict[str, list[int]]:
    """Returns path -> [size in bytes, modification time in ns]."""
    stats = {str(path.resolve()): path.stat() for path in sorted(paths)}
    return {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}


def find_store(fingerprint: str, cache_dir: str | Path | None = None) -> Documents | None:
    """Returns the documents of that fingerprint, if their files are there as they were written."""
    return read_store(cache_root(cache_dir) / "tokens" / fingerprint)


def read_store(directory: Path, *, verify: bool = True) -> Documents | None:
    """Opens the documents of one store, memory-mapped; None if it is not there, not whole, or not as it was written.

    Args:
        verify: whether to hash its files; a data-loading worker maps what its parent has verified.
    """
    try:
        facts = json.loads((directory / "store.json").read_text())
        files, facts["problems"] = facts.pop("files"), [(row, reason) for row, reason in facts["problems"]]
        if verify and files != hash_files(directory / name for name in files):
            return None
        return Documents(
            **facts,
            tokens=open_files([directory / name for name in files if name.endswith(".arrow")]),
            lengths=np.load(directory / "lengths.npy", mmap_mode="r"),
            supervised=np.load(directory / "supervised.npy", mmap_mode="r"),
            directory=directory,
            reopen=partial(_reopen, directory),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _reopen(directory: Path) -> Documents:
    documents = read_store(directory, verify=False)
    if documents is None:
        raise DataError("the tokenised rows were removed, or are damaged", where=str(directory))
    return documents


def hash_files(paths: Iterable[Path]) -> dict[str, list[int | str]]:
    """Returns name -> [size in bytes, XXH3 of the contents], several files at a time."""

    def hashed(path: Path) -> tuple[str, list[int | str]]:
        digest, size = xxhash.xxh3_128(), 0
        with path.open("rb") as file:
            while block := file.read(_READ_AT_ONCE):
                digest.update(block)
                size += len(block)
        return path.name, [size, digest.hexdigest()]

    with ThreadPoolExecutor() as threads:
        return dict(threads.map(hashed, paths))


@contextlib.contextmanager
def one_builder(fingerprint: str, cache_dir: str | Path | None = None) -> Iterator[None]:
    """Lets one process at a time make a store; other ranks, also on other hosts of a shared disk, wait and then read.

    Raises:
        DataError: the cache cannot be written to.
    """
    root = cache_root(cache_dir) / "locks"
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / f"{fingerprint}.lock", mode=0o666 & ~_umask())
        lock.acquire()
    except OSError as error:
        raise DataError(f"cannot write to the cache: {error.strerror}", where=str(root), fix=SET_CACHE) from None
    try:
        yield
    finally:
        lock.release()


def _umask() -> int:
    """Returns the permissions that new files of this process don't get; there is no way to read but to set them."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def staging(cache_dir: str | Path | None = None) -> Iterator[Path]:
    """Makes a directory to write a store into; whatever is left of it at the end is removed.

    Raises:
        DataError: the cache cannot be written to, or the rows can no longer be read.
    """
    root = cache_root(cache_dir) / "tokens"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(root)
        directory = Path(tempfile.mkdtemp(prefix=".staging-", dir=root))
    except OSError as error:
        raise DataError(f"cannot write to the cache: {error.strerror}", where=str(root), fix=SET_CACHE) from None
    try:
        yield directory
    except OSError as error:  # a full disk, or a file of rows that is gone
        raise DataError(f"tokenising failed: {error}", where=str(root)) from error
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def publish(directory: Path, facts: dict[str, object], cache_dir: str | Path | None = None) -> Documents:
    """Moves a staged store to where it is looked for. If another process was faster, its store stands.

    Args:
        directory: holds `tokens*.arrow`, `lengths.npy`, `supervised.npy`.
        facts: `fingerprint`, `format`, `prompts`, `problems`, `notes` of the documents.
    """
    files = hash_files(path for path in sorted(directory.iterdir()) if path.is_file())
    (directory / "store.json").write_text(json.dumps(facts | {"files": files}))
    for path in (*directory.iterdir(), directory):  # before it gets its name, also on a machine that loses power
        path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())  # `mkdtemp` makes what one user alone can read
        _flush(path)
    target = cache_root(cache_dir) / "tokens" / str(facts["fingerprint"])
    try:
        os.rename(directory, target)
    except OSError:  # there is one already
        if read_store(target) is None:
            _replace(target, directory)
    _flush(target.parent)
    return _reopen(target)


def _replace(damaged: Path, directory: Path) -> None:
    shutil.rmtree(damaged, ignore_errors=True)
    try:
        os.rename(directory, damaged)
    except OSError as error:
        what, fix = f"is damaged, and cannot be replaced: {error.strerror}", f"remove it, or {SET_CACHE}"
        raise DataError(what, where=str(damaged), fix=fix) from None
    logger.warning("the tokenised rows in %s were damaged, and have been tokenised again", damaged)


def _flush(path: Path) -> None:
    """Writes a file or the entries of a directory to the drive."""
    with contextlib.suppress(OSError):  # not every file system can
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def remember(
    request: dict[str, object],
    fingerprint: str,
    files: dict[str, list[int]],
    counts: Sequence[tuple[str, int]],
    cache_dir: str | Path | None = None,
) -> None:
    """Notes that a request gave a fingerprint, from files of these sizes and times, with so many rows each (`counts`)."""
    path = _request_path(request, cache_dir)
    noted = {"fingerprint": fingerprint, "files": files, "counts": counts, "request": request}
    with contextlib.suppress(OSError):  # of a cache that can only be read; the rows are then found by their contents
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps(noted))
        os.replace(aside, path)


def recall(
    request: dict[str, object], files: dict[str, list[int]], cache_dir: str | Path | None = None
) -> tuple[Documents, tuple[tuple[str, int], ...]] | str:
    """Returns the documents that a request gave before and the rows of each file, or why there are none to use.

    Args:
        files: as they stand now.
    """
    try:
        noted = json.loads(_request_path(request, cache_dir).read_text())
        before, fingerprint = noted["files"], str(noted["fingerprint"])
        counts = tuple((str(file), int(rows)) for file, rows in noted["counts"])
        changed = _difference(before, files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not there, or damaged
        return "these rows have not been tokenised with these options yet"
    return changed or _documents_of(fingerprint, cache_dir, counts)


def _documents_of(
    fingerprint: str, cache_dir: str | Path | None, counts: tuple[tuple[str, int], ...]
) -> tuple[Documents, tuple[tuple[str, int], ...]] | str:
    documents = find_store(fingerprint, cache_dir)
    return (
        "the tokenised rows were removed from the cache, or are damaged" if documents is None else (documents, counts)
    )


def _difference(before: dict[str, list[int]], now: dict[str, list[int]]) -> str | None:
    for name in before.keys() - now.keys():
        return f"{name} was removed after the rows were tokenised"
    for name in now.keys() - before.keys():
        return f"{name} was added after the rows were tokenised"
    for name, (size, _) in before.items():
        if now[name] != before[name]:
            how = f"from {size:,} to {now[name][0]:,} bytes" if now[name][0] != size else "at the same size"
            return f"{name} changed after the rows were tokenised ({how})"
    return None


def _request_path(request: dict[str, object], cache_dir: str | Path | None) -> Path:
    return cache_root(cache_dir) / "requests" / f"{hash_of(STORE_VERSION, request)}.json"


def _remove_abandoned(root: Path) -> None:
    for directory in root.glob(".staging-*"):
        with contextlib.suppress(OSError):
            last_written = max(path.stat().st_mtime for path in (directory, *directory.iterdir()))
            if time.time() - last_written > _ABANDONED_AFTER:
                shutil.rmtree(directory, ignore_errors=True)
