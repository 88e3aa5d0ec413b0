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


@pytest.mark.ci
@pytest.mark.slow  # each imports torch and transformers
@pytest.mark.parametrize("study", STUDIES)
def test_the_command_runs_from_anywhere(study, tmp_path):
    command = [sys.executable, str(RESULTS / study / "run.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "usage" in done.stdout.lower(), done.stderr
