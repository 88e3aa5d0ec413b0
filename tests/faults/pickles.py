"""A pickle that makes a directory when it is read, in the two forms that torch reads."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import torch


class Malicious:
    """Whoever reads its pickle without restriction runs `os.mkdir(mark)`."""

    def __init__(self, mark: Path):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def plant_plain(path: Path, mark: Path) -> None:
    """A bare pickle, as torch wrote before its zip files."""
    path.write_bytes(pickle.dumps(Malicious(mark), protocol=2))


def plant_zip(path: Path, mark: Path) -> None:
    """What `torch.save` makes, with honest neighbours."""
    torch.save({"state": {}, "param_groups": [], "step": torch.zeros(2), "more": Malicious(mark)}, path)


PLANT: dict[str, Callable[[Path, Path], None]] = {"plain": plant_plain, "zip": plant_zip}


def runs(read: Callable[[], object], mark: Path) -> bool:
    """Whether `read` made the directory; what it raises is no matter."""
    try:
        read()
    except Exception:
        pass
    if mark.exists():
        mark.rmdir()
        return True
    return False
