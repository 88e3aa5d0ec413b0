"""What an installed packtrain needs beside its modules goes into the wheel."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_file_of_the_package_is_packed():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["packtrain"]
    packed = {path for pattern in patterns for path in (ROOT / "packtrain").glob(pattern)}
    files = {path for path in (ROOT / "packtrain").rglob("*.*") if path.is_file() and "__pycache__" not in path.parts}
    assert packed and {path for path in files if path.suffix != ".py"} == packed
