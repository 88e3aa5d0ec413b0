"""A strategy in a file of the current folder is found without PYTHONPATH."""

from __future__ import annotations

import sys
from importlib import import_module

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


STRATEGIES_THAT_LOSE = """
from packtrain.packing.strategies import Strategy

def deal(lengths, *, micro_steps, ranks, capacity, cost):
    return [range(i, len(lengths), micro_steps * ranks) for i in range(micro_steps * ranks)]
def lose(lengths, **given):
    return [part[1:] for part in deal(lengths, **given)]
def few(lengths, **given):
    return deal(lengths, **given)[:-1]
def cut(lengths, capacity, key):
    whole = [[(i, 0, n)] for i, n in enumerate(lengths[:-1])]
    return [*whole, [(len(lengths) - 1, 0, 2)], [(len(lengths) - 1, 2, lengths[-1])]]
def cut_off(lengths, capacity, key):
    return cut(lengths, capacity, key)[:-1]
def too_full(lengths, capacity, key):
    return [[row for pack in cut(lengths, capacity, key) for row in pack]]
def one(lengths, capacity, key, max_documents=None):
    return [[i] for i in range(len(lengths))]

deals, loses, fews = (Strategy(function=each, scope="step") for each in (deal, lose, few))
cuts, cuts_off, too_fulls = (Strategy(function=each, splits=True) for each in (cut, cut_off, too_full))
flags_missing = Strategy(function=cut)
"""


def test_a_strategy_object_can_lose_nothing_either(folder):
    (folder / "objects.py").write_text(STRATEGIES_THAT_LOSE)
    lengths = [3, 4, 5, 6]

    def layouts(name: str, **more) -> list:
        size = {"max_tokens": 12, "examples_per_step": 4, "world_size": 2} | more
        plan = make_plan(lengths, strategy=f"objects:{name}", **size)
        return [part.example_ids.tolist() for step in range(plan.total_steps) for part in plan.layout_of(step)]

    assert sorted(sum(layouts("deals"), [])) == [0, 1, 2, 3]
    assert len(set(sum(layouts("cuts"), []))) == 4
    for name, message in [
        ("loses", "index 0 occurs 0 times"),
        ("fews", "must return 1 x 2 micro-batches, and returned 1"),
        ("cuts_off", "must place every token exactly once"),
        ("too_fulls", "a pack of 18 tokens, more than the capacity of 12"),
        ("flags_missing", "lists of lists"),
    ]:
        with pytest.raises(PlanError, match=message):
            layouts(name)
    assert len(layouts("one", max_documents=1, world_size=1)) == 4


@pytest.mark.parametrize(
    ("body", "message", "fix"),
    [
        ("[[0], [1]]", "index 2 occurs 0 times", "every index from 0 to 2 in exactly one pack"),
        ("[[0], [1], [2], [0]]", "index 0 occurs 2 times", "every index from 0 to 2 in exactly one pack"),
        ("[[0], [1], [2], [3]]", "index 3 is not one of them", "indices into `lengths`, from 0 to 2"),
        ("[[-1], [1], [2]]", "index -1 is not one of them", "indices into `lengths`, from 0 to 2"),
        ("[lengths]", "index 4 is not one of them", "not the lengths themselves"),
        ("[[0, 1, 2]]", "a pack of 15 tokens", "begin another pack"),
        ("None", "'NoneType' object is not iterable", "returns lists of indices"),
    ],
)
def test_a_strategy_with_a_fault_is_told_what_to_return(folder, monkeypatch, body, message, fix):
    (folder / "faulty.py").write_text(f"def pack(lengths, capacity, key): return {body}\n")
    monkeypatch.delitem(sys.modules, "faulty", raising=False)
    with pytest.raises(PlanError, match=message) as caught:
        make_plan([4, 5, 6], strategy="faulty:pack", max_tokens=12, examples_per_step=3)
    assert fix in (caught.value.fix or "")


def test_packs_of_packtrains_own_packers_are_checked_too(folder):
    (folder / "borrowed.py").write_text(
        "from packtrain.packing.strategies import bfd\n"
        "def whole(lengths, capacity, key): return bfd(lengths, capacity, key)\n"
        "def part(lengths, capacity, key): return bfd(lengths[:-1], capacity, key)\n"
        "def many(lengths, capacity, key, max_documents=None): return bfd(lengths, capacity, key)\n"
    )
    size = {"max_tokens": 20, "examples_per_step": 4}
    assert make_plan([3, 4, 5, 6], strategy="borrowed:whole", **size).total_steps == 1
    with pytest.raises(PlanError, match="index 3 occurs 0 times"):
        make_plan([3, 4, 5, 6], strategy="borrowed:part", **size)
    with pytest.raises(PlanError, match="a pack of 4 documents, more than max_documents = 2"):
        make_plan([3, 4, 5, 6], strategy="borrowed:many", max_documents=2, **size)


STRATEGIES_THAT_DRAW = """
import numpy as np
from packtrain.packing.strategies import Strategy

def drawn(lengths, capacity, key):
    return [[i, j] for i, j in np.random.permutation(len(lengths)).reshape(-1, 2)]
def keyed(lengths, capacity, key):
    return [[i, j] for i, j in np.random.default_rng(key).permutation(len(lengths)).reshape(-1, 2)]
def deal(lengths, *, micro_steps, ranks, capacity, cost):
    order = np.random.permutation(len(lengths))
    return [order[i :: micro_steps * ranks] for i in range(micro_steps * ranks)]
deals = Strategy(function=deal, scope="step")

def shifted(lengths, capacity, key):
    return [[i, (i + SHIFT) % len(lengths)] for i in range(0, len(lengths), 2)]
"""


def test_a_strategy_that_draws_from_a_global_generator_is_refused(folder):
    """A resumed run would train other packs than the one before, and ranks would lose and repeat examples."""
    (folder / "draws.py").write_text(STRATEGIES_THAT_DRAW)
    for name in ("drawn", "deals"):
        with pytest.raises(PlanError, match="returned different packs when it was called again") as refused:
            plan = make_plan([3] * 40, strategy=f"draws:{name}", max_tokens=60, examples_per_step=40, world_size=2)
            plan.layout_of(0)
        assert "on its arguments alone" in refused.value.fix
    assert make_plan([3] * 40, strategy="draws:keyed", max_tokens=60).total_steps  # the control


def test_a_strategy_that_packs_otherwise_is_another_plan(folder):
    """A checkpoint and other ranks know the plan by its hash: a function that was changed makes another one."""
    (folder / "changes.py").write_text(STRATEGIES_THAT_DRAW)
    resolve_strategy("changes:shifted")
    module, hashes = import_module("changes"), []
    for shift in (1, 3, 1):
        module.SHIFT = shift
        hashes.append(make_plan([3] * 40, strategy="changes:shifted", max_tokens=60).hash)
    assert hashes[0] == hashes[2] != hashes[1]


@pytest.mark.parametrize("given", [len, None, 3])
def test_what_is_no_name_of_a_strategy_is_refused(given):
    with pytest.raises(PlanError, match="strategy: must be the name of a strategy") as refused:
        make_plan([3, 4], strategy=given)
    assert "my_module:function" in refused.value.fix
    with pytest.raises(PlanError, match="strategy"):
        resolve_strategy(":function")
