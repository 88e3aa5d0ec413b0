"""Every strategy keeps every example and the capacity; each does what its docstring says."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packtrain.errors import PlanError
from packtrain.packing.cost import Cost
from packtrain.packing.packs import ListedPacks
from packtrain.packing.strategies import (
    STRATEGIES,
    bfd,
    equal_counts,
    next_fit,
    random,
    resolve_strategy,
    sorted_groups,
    wrapped,
)

EPOCH = [name for name, strategy in STRATEGIES.items() if strategy.scope == "epoch"]
STEP = [name for name, strategy in STRATEGIES.items() if strategy.scope == "step"]

problems = st.integers(1, 200).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(0, capacity), max_size=80), st.just(capacity))
)


@pytest.mark.parametrize("name", EPOCH)
@settings(max_examples=150)
@given(problem=problems, key=st.integers(0, 2**64 - 1))
def test_epoch_strategies_lose_nothing_and_keep_the_capacity(name, problem, key):
    lengths, capacity = np.array(problem[0], dtype=np.int64), problem[1]
    strategy = STRATEGIES[name]
    packs = strategy.function(lengths, capacity, key)
    again = strategy.function(lengths, capacity, key)
    assert all(np.array_equal(a, b) for a, b in zip(packs, again, strict=True))
    if strategy.splits:
        pieces = [tuple(piece) for pack in packs for piece in pack.tolist()]
        tokens = [(index, t) for index, start, stop in pieces for t in range(start, stop)]
        assert sorted(tokens) == [(index, t) for index in range(len(lengths)) for t in range(lengths[index])]
        assert all((pack[:, 2] - pack[:, 1]).sum() <= capacity for pack in packs)
    else:
        assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
        assert all(lengths[pack].sum() <= capacity for pack in packs)
    if len(lengths) and lengths.max() > 0:
        assert all(len(pack) for pack in packs)


@pytest.mark.parametrize("name", STEP)
@settings(max_examples=100)
@given(problem=problems, ranks=st.integers(1, 5), micro_steps=st.integers(1, 4))
def test_step_strategies_lose_nothing(name, problem, ranks, micro_steps):
    lengths, capacity = np.array(problem[0], dtype=np.int64), problem[1] * 80  # anything fits
    parts = STRATEGIES[name].function(
        lengths, micro_steps=micro_steps, ranks=ranks, capacity=capacity, cost=Cost(linear=1, quadratic=0.1)
    )
    assert len(parts) == ranks * micro_steps
    assert sorted(index for part in parts for index in part) == list(range(len(lengths)))


def test_next_fit_keeps_the_order():
    assert [p.tolist() for p in next_fit(np.array([3, 3, 4, 6, 1, 9]), 10, 0)] == [[0, 1, 2], [3, 4], [5]]
    assert len(next_fit(np.zeros(0, dtype=np.int64), 10, 0)) == 0


def test_wrapped_cuts_every_capacity_tokens():
    packs = wrapped(np.array([3, 5, 2]), 4, 0)
    assert [p.tolist() for p in packs] == [[[0, 0, 3], [1, 0, 1]], [[1, 1, 5]], [[2, 0, 2]]]
    assert [p.tolist() for p in wrapped(np.array([9]), 4, 0)] == [[[0, 0, 4]], [[0, 4, 8]], [[0, 8, 9]]]


def test_random_depends_on_the_key_and_wastes_more_than_best_fit(sft_lengths):
    one, other = (random(sft_lengths, 2048, key) for key in (1, 2))
    assert [p.tolist() for p in one] != [p.tolist() for p in other]
    assert len(bfd(sft_lengths, 2048, 1)) <= len(one)


def test_equal_counts():
    parts = equal_counts(np.arange(7), micro_steps=2, ranks=2, capacity=1, cost=Cost())
    assert [p.tolist() for p in parts] == [[0, 1], [2, 3], [4, 5], [6]]


def test_sorted_groups_minimise_the_largest_padded_area():
    lengths = np.array([9, 2, 2, 8, 3])
    parts = sorted_groups(lengths, micro_steps=2, ranks=1, capacity=99, cost=Cost())
    assert [p.tolist() for p in parts] == [[0, 3], [4, 1, 2]]


@settings(max_examples=100)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(1, 4))
def test_sorted_groups_are_the_best_of_all_cuts(lengths, groups):
    from itertools import combinations

    lengths = np.array(lengths)

    def area(parts):
        return max(len(p) * lengths[p].max() for p in parts if len(p))

    order = np.argsort(-lengths, kind="stable")
    every = [
        area(np.split(order, cuts))
        for number in range(min(groups, len(lengths)))
        for cuts in combinations(range(1, len(lengths)), number)
    ]
    parts = sorted_groups(lengths, micro_steps=groups, ranks=1, capacity=999, cost=Cost())
    assert area(parts) == min(every)


@pytest.fixture
def user_module(monkeypatch):
    module = types.ModuleType("somebodys_module")
    monkeypatch.setitem(sys.modules, "somebodys_module", module)
    return module


def test_a_users_function(user_module):
    user_module.one_each = lambda lengths, capacity, key: [[i] for i in range(len(lengths))]
    strategy = resolve_strategy("somebodys_module:one_each")
    assert (strategy.scope, strategy.layout) == ("epoch", "flat")
    packs = strategy.function(np.array([3, 4]), 10, 0)
    assert isinstance(packs, ListedPacks) and [p.tolist() for p in packs] == [[0], [1]]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([[0], [0, 1]], "index 0 occurs 2 times"),
        ([[0]], "index 1 occurs 0 times"),
        ([[0, 1, 2]], "index 2 is not one of them"),
        ([[0, 1]], "pack of 12 tokens, more than the capacity of 10"),
        ([[0], [], [1, -1]], "index -1 is not one of them"),
        (7, "lists of indices"),
        ([[0.5], [1.0]], "lists of indices"),
    ],
)
def test_a_users_wrong_result(user_module, result, message):
    user_module.wrong = lambda lengths, capacity, key: result
    with pytest.raises(PlanError, match=message):
        resolve_strategy("somebodys_module:wrong").function(np.array([5, 7]), 10, 0)


def test_a_users_strategy(user_module):
    user_module.mine = STRATEGIES["pad_longest"]
    assert resolve_strategy("somebodys_module:mine") is STRATEGIES["pad_longest"]
    user_module.number = 3
    for name, message in [
        ("ballanced", "did you mean 'balanced'"),
        ("somebodys_module:absent", "could not import"),
        ("no_such_module_at_all:f", "could not import"),
        ("somebodys_module:number", "not a function"),
    ]:
        with pytest.raises(PlanError, match=message):
            resolve_strategy(name)
