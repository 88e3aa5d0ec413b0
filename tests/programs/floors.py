"""Prints the lowest version of every dependency that pyproject.toml allows, as a constraints file for pip.

    python tests/programs/floors.py > floors.txt

torch is left out: only some of its releases have builds for CPUs, so that it is pinned as in launch/constraints.txt.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
for requirement in [*project["dependencies"], *project["optional-dependencies"]["compare"]]:
    named = re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement)
    if named and named[1] != "torch":
        print(f"{named[1]}=={named[2]}")
