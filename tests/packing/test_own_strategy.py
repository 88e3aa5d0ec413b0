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


@pytest.mark.parametrize("name", ["os:system", "shutil:rmtree", "subprocess:Popen", "builtins:print", "math:pi"])
def test_what_is_no_strategy_is_refused_before_it_is_called(name):
    with pytest.raises(PlanError, match=r"is not a function( of \(lengths, capacity, key\))?"):
        resolve_strategy(name)


def test_functions_of_three_arguments_are_taken(folder):
    (folder / "three.py").write_text(
        "from functools import partial\n"
        "def pack(lengths, capacity, key): return [[i] for i in range(len(lengths))]\n"
        "def optional(lengths, capacity, key, power=2): return pack(lengths, capacity, key)\n"
        "def any(*given): return pack(*given)\n"
        "bound = partial(optional, power=3)\n"
        "class Packer:\n    def __call__(self, lengths, capacity, key): return pack(lengths, capacity, key)\n"
        "packer = Packer()\n"
    )
    for name in ("pack", "optional", "any", "bound", "packer"):
        assert resolve_strategy(f"three:{name}").scope == "epoch"
