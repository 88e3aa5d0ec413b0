"""Which files a path stands for: each is read, or named with the reason why it is not.

data/                 every data file in it that belongs to the split
  train-0.jsonl.gz    read
  val.jsonl           not read, split validation
  notes.txt           not read, not a supported kind of file
  README.md           not read, hidden or documentation (only counted)
data/*.jsonl          the files that match, whatever split their names say
org/name              no file: a dataset of the Hub
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from packtrain.data import synthetic
from packtrain.data.compressed import CODECS, kind_of
from packtrain.data.readers import OPENERS
from packtrain.data.report import DOCUMENTATION
from packtrain.errors import DataError, shorten

_DOCUMENTATION = re.compile(r"(LICEN[SC]E|README)(\.(txt|rst))?|.*\.md", re.IGNORECASE)
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


@dataclass(kw_only=True)
class Place:
    """What one path of a recipe stands for.

    Attributes:
        path: as it is written.
        files: the files to read; all those of a saved dataset.
        labels: how messages call them.
        saved: whether it is a directory of `datasets.save_to_disk`.
        not_read: (file, reason) of the others.
        notes: statements for the report.
    """

    path: str
    files: list[Path] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    saved: bool = False
    not_read: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def generated(self) -> bool:
        return self.path in synthetic.READERS

    @property
    def on_hub(self) -> bool:
        return not self.files and not self.generated


def find_places(path: str | Path | Sequence[str | Path], split: str = "train") -> list[Place]:
    """Finds what a path, or each path of a list, stands for.

    Args:
        path: a file, a directory, a pattern (`data/*.jsonl`), a Hub name, `packtrain:arithmetic`; or a list of them.
        split: files of a directory belong to the split that their path names (`train-0001.parquet`,
            `test/part.jsonl`), all to `train` where no name says `train`; files named one by one are `train`.

    Raises:
        DataError: nothing is there, nothing matches, there is no such split, or a file is named twice.
    """
    if not path:
        raise DataError("names no rows", key="data.path", value=path, fix="name a file, a directory or a Hub dataset")
    if isinstance(path, str | Path):
        return [_find(str(path), split)]
    places, seen = [], {}
    for entry in map(str, path):
        place = _find(entry, split)
        if Path(entry).expanduser().is_dir():  # by their names alone, files of several directories would look the same
            inside = entry.rstrip("/")
            place.labels = [inside if place.saved else f"{inside}/{label}" for label in place.labels]
            place.not_read = [(f"{inside}/{label}", reason) for label, reason in place.not_read]
        elif Path(entry).expanduser().is_file():
            place.labels = [entry]
        for source in [str(file.resolve()) for file in place.files] or [entry]:
            if source in seen:
                what = f"names {Path(source).name if place.files else source} twice"
                fix = f"keep one of {seen[source]!r} and {entry!r}: to repeat rows, use `data.mixture`"
                raise DataError(what, key="data.path", value=list(map(str, path)), fix=fix)
            seen[source] = entry
        places.append(place)
    return places


def is_pattern(path: str | Path) -> bool:
    """Whether a path is a pattern; a file that is called so is none."""
    return glob.has_magic(str(path)) and not Path(path).expanduser().exists()


def is_local(path: str | Path) -> bool:
    """Whether a path stands for something other than a dataset of the Hub."""
    return str(path) in synthetic.READERS or is_pattern(path) or Path(path).expanduser().exists()


def no_split(path: str | Path, split: str, known: Sequence[str]) -> DataError:
    """Returns the error that a place has no such split."""
    fix = f"its splits are: {', '.join(known)}"
    return DataError(f"{path} has no such split", key="data.split", value=split, fix=fix)


def _find(entry: str, split: str) -> Place:
    if entry in synthetic.READERS:
        if split not in synthetic.SPLITS:
            raise no_split(entry, split, list(synthetic.SPLITS))
        return Place(path=entry)
    path = Path(entry).expanduser()
    if path.is_dir():
        if _is_saved(path):
            files = sorted(file for file in path.rglob("*") if file.is_file())
            return Place(path=entry, files=files, labels=[path.name] * len(files), saved=True)
        return _directory(entry, path, split)
    if is_pattern(entry):
        return _matches(entry, split)
    if path.is_file():
        if kind_of(path) not in OPENERS:
            fix = f"convert, unpack or rename it; what is read: {', '.join(OPENERS)}, also compressed ({', '.join(CODECS)})"
            raise DataError("is not a supported kind of file", key="data.path", value=entry, fix=fix)
        if split != "train":
            raise no_split(entry, split, ["train"])
        return Place(path=entry, files=[path], labels=[path.name])
    if kind_of(path) in OPENERS or not _HUB_NAME.fullmatch(entry):
        fix = "name a file or directory that exists; relative paths begin in the current directory"
        raise DataError("there is no such file or directory", key="data.path", value=entry, fix=fix)
    if _is_builder(entry):
        what = "is the name of a loader of `datasets`, not of data"
        raise DataError(what, key="data.path", value=entry, fix="name the file itself, for example data/train.jsonl")
    return Place(path=entry)


def _is_builder(name: str) -> bool:
    """Whether `datasets` takes a name for one of its own loaders (`json`, `csv`, ...), which read the current folder."""
    package = find_spec("datasets")
    folders = package.submodule_search_locations if package else None
    return bool(folders) and "/" not in name and Path(folders[0], "packaged_modules", name).is_dir()


def _is_saved(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _unreadable(path: Path) -> str | None:
    """Returns why a file is not data, or None."""
    if not path.is_file():
        return "a link to a directory, which is not followed" if path.is_dir() else "a broken link"
    return None if kind_of(path) in OPENERS else "not a supported kind of file"


def _directory(entry: str, directory: Path, split: str) -> Place:
    """Chooses the data files of a directory that belong to a split."""
    place, by_split = Place(path=entry), {}
    for path, label in _listed(directory):
        if _is_documentation(label):
            place.not_read.append((label, DOCUMENTATION))
        elif reason := _unreadable(path):
            place.not_read.append((label, reason))
        else:
            by_split.setdefault(_split_of(label), []).append((path, label))
    if not by_split:
        what = f"the directory contains no data files ({', '.join(OPENERS)}) and no saved dataset"
        raise DataError(what, key="data.path", value=entry)
    unnamed = by_split.pop("", [])
    if unnamed and "train" not in by_split:
        if by_split:
            names = shorten([label for _, label in unnamed])
            place.notes.append(f"files whose names say no split are read as train, as no other file is: {names}")
        by_split["train"], unnamed = unnamed, []
    wanted = _SPLIT_WORDS.get(split, split)
    if wanted not in by_split:
        raise no_split(entry, split, sorted(by_split))
    chosen = by_split.pop(wanted)
    place.files, place.labels = map(list, zip(*chosen, strict=True))
    place.not_read += [(label, "its name says no split, and those of others do") for _, label in unnamed]
    place.not_read += [(label, f"split {other}") for other, files in by_split.items() for _, label in files]
    _check_kinds(place)
    return place


def _matches(entry: str, split: str) -> Place:
    """Finds the files that match a pattern."""
    if split != "train":
        raise no_split(entry, split, ["train"])
    place = Place(path=entry)
    for label in sorted(glob.glob(os.path.expanduser(entry), recursive=True)):
        path = Path(label)
        if path.is_dir():
            place.not_read.append((label, "a directory; `**/` in a pattern stands for the directories below"))
        elif _is_documentation(path.name):
            place.not_read.append((label, DOCUMENTATION))
        elif reason := _unreadable(path):
            place.not_read.append((label, reason))
        else:
            place.files.append(path)
            place.labels.append(label)
    if not place.files:
        what = "matches no data file"
        raise DataError(what, key="data.path", value=entry, fix=f"what is read: {', '.join(OPENERS)}, also compressed")
    if other := [label for label in place.labels if _split_of(Path(label).name) not in ("", "train")]:
        place.notes.append(
            f"files that the pattern names are read as train, although their names say: {shorten(other)}"
        )
    _check_kinds(place)
    return place


def _is_documentation(label: str) -> bool:
    parts = Path(label).parts
    return any(part.startswith(".") for part in parts) or _DOCUMENTATION.fullmatch(parts[-1]) is not None


def _listed(directory: Path) -> list[tuple[Path, str]]:
    """Lists every file below a directory, and the links that are not followed, with their paths inside it."""

    def refuse(error: OSError) -> None:
        fix = "name a directory of data files"
        what = f"the directory cannot be listed: {error}"
        raise DataError(what, key="data.path", value=str(directory), fix=fix) from None

    found = []
    for folder, folders, names in os.walk(directory, onerror=refuse):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        found += [Path(folder, name) for name in (*names, *links)]
    return [(path, path.relative_to(directory).as_posix()) for path in sorted(found)]


def _split_of(label: str) -> str:
    """Returns the split that a path inside a directory names, or nothing.

    >>> _split_of("data/train-0001.parquet"), _split_of("dev.jsonl.gz"), _split_of("part-0.csv")
    ('train', 'validation', '')
    """
    words = re.findall("[a-z]+", label.lower())
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), "")


def _check_kinds(place: Place) -> None:
    """Raises DataError for files of several kinds, and for the same file twice: by a link, or plain and compressed."""
    kinds = sorted({kind_of(path) for path in place.files})
    if len(kinds) > 1:
        fix = f"name one kind of file by a pattern, for example {place.path.rstrip('/')}/*{kinds[0]}"
        raise DataError(f"contains several kinds of files: {', '.join(kinds)}", where=place.path, fix=fix)
    plain: dict[Path, str] = {}
    found: dict[tuple[int, int], str] = {}
    for path, label in zip(place.files, place.labels, strict=True):
        status = path.stat()
        other = found.setdefault((status.st_dev, status.st_ino), label)
        if other != label and status.st_ino:  # a file system without such numbers gives 0
            fix = "remove the link, or name the files to read in a list"
            raise DataError(f"contains the same file twice, by a link: {other} and {label}", where=place.path, fix=fix)
        bare = path.with_suffix("") if path.suffix.lower() in CODECS else path
        if bare in plain:
            fix = "remove one of them, or name the files to read in a list"
            raise DataError(f"contains the same file twice: {plain[bare]} and {label}", where=place.path, fix=fix)
        plain[bare] = label
