"""A directory and its manifest: which files it has, their sizes and SHA-256, and what they are of. Files only, no torch.

    checkpoint-40/
        model.safetensors  optimizer.pt  ...
        packtrain_manifest.json      written last, by an atomic rename, after everything else is on the drive

So a directory without a manifest is unfinished, whenever the process was killed, and one whose bytes have changed
since is found out. The manifest holds a hash of itself. It proves integrity, not authorship: whoever can write the
directory can write its manifest too.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from packtrain.errors import CheckpointError

MANIFEST = "packtrain_manifest.json"
UNFINISHED = ".packtrain_unfinished"  # marks a directory of ours that is being written or removed
_OF_OURS = {MANIFEST, f"{MANIFEST}.new", UNFINISHED}
_FORMAT = 1
_LONGEST_NAME = 4096  # characters
_THREADS = 8  # hashing leaves Python's lock alone


def begin(directory: Path) -> None:
    """Makes `directory` and marks it as unfinished."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / UNFINISHED).touch()


def seal(directory: Path, facts: Mapping[str, Any]) -> None:
    """Hashes every file of `directory`, sees all of it onto the drive, and writes its manifest with `facts`.

    Raises:
        OSError: a full drive, say; the directory stays without a manifest.
    """
    paths = sorted(_files(directory))
    with ThreadPoolExecutor(_THREADS) as threads:
        digests = threads.map(_hash_and_sync, paths)
        files = {
            path.relative_to(directory).as_posix(): {"size": path.stat().st_size, "sha256": digest}
            for path, digest in zip(paths, digests, strict=True)
        }
    for folder, _, _ in os.walk(directory):
        _sync(Path(folder))
    manifest = {"format": _FORMAT, **facts, "files": files}
    aside = directory / f"{MANIFEST}.new"
    aside.write_text(json.dumps(manifest | {"sha256": _self_hash(manifest)}, indent=1) + "\n", encoding="utf-8")
    _sync(aside)
    aside.rename(directory / MANIFEST)
    (directory / UNFINISHED).unlink(missing_ok=True)
    _sync(directory)
    _sync(directory.parent)


def read_manifest(directory: Path) -> dict[str, Any]:
    """Reads the manifest of a finished directory; its files are not looked at.

    Raises:
        CheckpointError: there is none, or it has changed.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        told = manifest.pop("sha256")
        if told != _self_hash(manifest) or not all(_is_told(*item) for item in manifest["files"].items()):
            raise ValueError("the hash does not match, or is of something else")
        if not all(type(manifest[name]) is int for name in ("step", "sealed_at")):
            raise TypeError("not the numbers of a checkpoint")
    except FileNotFoundError:
        if not directory.is_dir():
            raise CheckpointError("there is no such directory", where=str(directory)) from None
        ours = (directory / UNFINISHED).exists()
        what = (
            "is unfinished: it has no manifest"
            if ours
            else "has no manifest: packtrain did not write it, or the manifest was lost"
        )
        fix = "start from its weights instead (model.model_name_or_path); engines' files may run code when they are loaded"
        raise CheckpointError(what, where=str(directory), key=MANIFEST, fix=None if ours else fix) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # damaged, or written by others
        raise CheckpointError("has a damaged manifest", where=str(directory), key=MANIFEST) from None
    if manifest.get("format") != _FORMAT:
        what = "has a format that this release of packtrain does not know"
        raise CheckpointError(what, where=str(directory), key="format", value=manifest.get("format"))
    return manifest


def verify(directory: Path, manifest: Mapping[str, Any], *, later: Collection[str] = ()) -> None:
    """Compares every file with what `manifest` says, and lets no further file stand next to them.

    Args:
        later: names at the top of `directory`, of files and directories that came after the manifest.

    Raises:
        CheckpointError: names each file that is missing, truncated, changed or added.
    """
    with ThreadPoolExecutor(_THREADS) as threads:
        faults = threads.map(lambda item: _fault(directory, *item), manifest["files"].items())
        found = [fault for fault in faults if fault]
    names = (path.relative_to(directory) for path in _files(directory, links=True))
    added = (name for name in names if name.as_posix() not in manifest["files"] and name.parts[0] not in later)
    found += [f"{name} was added to it (move it elsewhere)" for name in sorted(added)]
    if found:
        raise CheckpointError("is damaged: " + "; ".join(found), where=str(directory))


def is_sealed(directory: Path) -> bool:
    """Returns whether it has a manifest that can be read, and is no link."""
    try:
        return not directory.is_symlink() and bool(read_manifest(directory))
    except CheckpointError:
        return False


def _is_told(name: str, told: Mapping[str, Any]) -> bool:
    """Returns whether an entry of `files` is of a file that can be: a name to be printed, a size and a hash."""
    named = name.isprintable() and 0 < len(name) < _LONGEST_NAME
    return named and type(told["size"]) is int and isinstance(told["sha256"], str)


def _fault(directory: Path, name: str, told: Mapping[str, Any]) -> str | None:
    path = directory / name
    if Path(name).is_absolute() or ".." in Path(name).parts or path.is_symlink():
        return f"{name} points outside of it"
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return f"{name} is no file"
        size = status.st_size
        if size != told["size"]:
            return f"{name} has {size:,} bytes instead of {told['size']:,}"
        if _hash(path) != told["sha256"]:
            return f"{name} has changed since it was written (SHA-256)"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None


def _files(directory: Path, *, links: bool = False) -> Iterator[Path]:
    """Yields all files but our own. Raises CheckpointError at a link, unless `links` are wanted, too."""
    for folder, folders, names in os.walk(directory):
        for name in (*names, *(name for name in folders if Path(folder, name).is_symlink())):
            path = Path(folder, name)
            if path.parent == directory and name in _OF_OURS:
                continue
            if path.is_symlink() and not links:
                raise CheckpointError("is a link, which cannot be verified", where=str(path))
            if not links and not path.is_file():
                raise CheckpointError("is no file, and cannot be verified", where=str(path))
            yield path


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_and_sync(path: Path) -> str:
    _sync(path)
    return _hash(path)


def _sync(path: Path) -> None:
    """Sees a file or a directory onto the drive."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _self_hash(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
