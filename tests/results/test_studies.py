"""Every study says its command, and the command exists."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[2] / "results"
STUDIES = sorted(path.parent.name for path in RESULTS.glob("*/run.py"))


def test_there_are_some():
    assert {"attach", "audit", "packing", "rainbow", "zero"} <= set(STUDIES)


@pytest.mark.parametrize("study", STUDIES)
def test_pages_name_the_command(study):
    command = f"python results/{study}/run.py"
    index = (RESULTS / "README.md").read_text(encoding="utf-8")
    assert command in (RESULTS / study / "README.md").read_text(encoding="utf-8")
    assert command in index and f"]({study}/README.md)" in index
    assert command in (RESULTS / "LOG.md").read_text(encoding="utf-8")


def test_the_index_has_every_folder():
    index = (RESULTS / "README.md").read_text(encoding="utf-8")
    folders = [path.name for path in RESULTS.iterdir() if path.is_dir() and not path.name.startswith((".", "_"))]
    assert [name for name in folders if f"({name}/" not in index] == []


@pytest.mark.parametrize("study", [study for study in STUDIES if (RESULTS / study / "bench.json").exists()])
def test_pages_are_those_of_the_stored_figures(study):
    found = json.loads((RESULTS / study / "bench.json").read_text(encoding="utf-8"))
    page = import_module(f"results.{study}.run").markdown(found)
    assert (RESULTS / study / "README.md").read_text(encoding="utf-8") == page


HELP = """
import runpy, sys

path = list(sys.path)
for file in sys.argv[1:]:
    sys.path[:], sys.argv = path, [file, "--help"]
    try:
        runpy.run_path(file, run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, file
"""


@pytest.mark.ci
@pytest.mark.slow  # imports torch, transformers and TRL
def test_commands_run_from_anywhere(tmp_path):
    """All in one process, which imports the libraries once."""
    files = [str(RESULTS / study / "run.py") for study in STUDIES]
    command = [sys.executable, "-P", "-c", HELP, *files]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.lower().count("usage: run.py") == len(STUDIES)
