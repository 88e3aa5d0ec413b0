"""Imports modules that users name, as in `my_package.my_module:function`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType


def import_module(name: str) -> ModuleType:
    """Imports a module; one in the current folder needs no PYTHONPATH."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        top = name.partition(".")[0]
        here = Path.cwd()
        if error.name != top or not ((here / f"{top}.py").is_file() or (here / top).is_dir()) or str(here) in sys.path:
            raise
        sys.path.append(str(here))
        return importlib.import_module(name)
