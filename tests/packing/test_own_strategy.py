"""A strategy in a file of the current folder is found without PYTHONPATH."""

from __future__ import annotations

import sys

import pytest

from packtrain.errors import PlanError
from packtrain.packing.plan import make_plan
from packtrain.packing.strategies import resolve_strategy

PAIRS = """
def pairs(lengths, capacity, key):
    return [list(range(i, min(i + 2, len(lengths)))) for i in range(0, len(lengths), 2)]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(tmp_path))])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_file_of_the_current_folder_is_found(folder):
    (folder / "my_pairs_strategy.py").write_text(PAIRS)
    plan = make_plan([3, 4, 5, 6], strategy="my_pairs_strategy:pairs", max_tokens=12, examples_per_step=2)
    assert sorted(len(batch) for step in range(plan.total_steps) for batch in plan.layout_of(step)) == [2, 2]


def test_a_module_that_is_nowhere_is_refused(folder):
    before = list(sys.path)
    with pytest.raises(PlanError, match="could not import the strategy"):
        resolve_strategy("no_such_module:pairs")
    assert sys.path == before


def test_an_import_that_fails_within_the_file_is_what_is_said(folder):
    (folder / "my_broken_strategy.py").write_text("import no_such_library\n")
    with pytest.raises(PlanError, match="no_such_library"):
        resolve_strategy("my_broken_strategy:pairs")
