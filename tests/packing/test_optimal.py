"""Near-optimal packs: nothing lost, never worse than best-fit decreasing, and the bound is a bound."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packtrain.packing.lengths import histogram
from packtrain.packing.optimal import BETTER, any_items, few_items, lower_bound, martello_toth, near_optimal
from packtrain.packing.packers import best_fit_decreasing, fill_up
from packtrain.packing.packs import PatternPacks, sort_by_length


def check(patterns, lengths, capacity, max_documents=None) -> None:
    lengths = np.asarray(lengths, dtype=np.int64)
    counts = histogram(lengths)
    packs = PatternPacks(patterns=patterns, counts=counts, by_length=sort_by_length(lengths, counts), key=1, bound=0)
    items, offsets = packs.take(np.arange(len(packs)))
    assert np.array_equal(np.sort(items), np.arange(len(lengths)))
    assert np.diff(np.append(0, np.cumsum(lengths[items]))[offsets]).max(initial=0) <= capacity
    assert np.diff(offsets).max(initial=0) <= (max_documents or len(lengths))


def fewest(lengths, capacity, max_documents=None) -> int:
    """By trying everything: documents in order, each into any open pack or a new one."""
    best = [len(lengths)]

    def place(index, packs):
        if len(packs) >= best[0]:
            return
        if index == len(lengths):
            best[0] = len(packs)
            return
        for number, (used, documents) in enumerate(packs):
            if used + lengths[index] <= capacity and documents != max_documents:
                place(index + 1, [*packs[:number], (used + lengths[index], documents + 1), *packs[number + 1 :]])
        place(index + 1, [*packs, (lengths[index], 1)])

    place(0, [])
    return best[0]


problems = st.integers(5, 40).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=8), st.just(capacity))
)


@settings(max_examples=300)
@given(problems, st.sampled_from([None, 2, 3]))
def test_bounds_never_exceed_the_true_minimum(problem, max_documents):
    lengths, capacity = problem
    assert lower_bound(histogram(np.array(lengths, dtype=np.int64)), capacity, max_documents) <= fewest(
        sorted(lengths, reverse=True), capacity, max_documents
    )


@settings(max_examples=100)
@given(problems, st.sampled_from([None, 2, 3]))
def test_near_optimal_is_proved_and_complete(problem, max_documents):
    lengths, capacity = problem
    counts = histogram(np.array(lengths, dtype=np.int64))
    patterns, bound = near_optimal(counts, capacity, max_documents, worthwhile=0)
    check(patterns, lengths, capacity, max_documents)
    least = fewest(sorted(lengths, reverse=True), capacity, max_documents)
    assert bound <= least <= len(patterns) <= len(best_fit_decreasing(counts, capacity, max_documents))


@settings(max_examples=100)
@given(st.integers(1, 100).flatmap(lambda c: st.tuples(st.lists(st.integers(0, c), max_size=60), st.just(c))))
def test_fill_up_loses_nothing(problem):
    lengths, capacity = problem
    check(fill_up(histogram(np.array(lengths, dtype=np.int64)), capacity), lengths, capacity)


def test_martello_toth_by_hand():
    assert martello_toth(np.bincount([6, 6, 6, 5, 5]), 10) == 4  # three alone, two fives together; by size 3
    assert martello_toth(np.bincount([5, 5, 5]), 10) == 2
    assert martello_toth(np.zeros(1, dtype=np.int64), 10) == 0
    assert lower_bound(np.bincount([1, 1, 1]), 10, max_documents=2) == 2


@pytest.mark.parametrize(("low", "high", "lost"), [(0.15, 0.55, 0.02), (0.26, 0.5, 0.05)])
def test_hard_sets_reach_the_bound(low, high, lost):
    """Where best-fit decreasing loses percents: within 0.1% of a proved bound. A coarse capacity keeps it quick."""
    capacity = 200
    lengths = np.random.default_rng(0).integers(int(low * capacity), int(high * capacity) + 1, 30_000)
    counts = histogram(lengths)
    patterns, bound = near_optimal(counts, capacity)
    check(patterns, lengths, capacity)
    assert len(patterns) <= 1.001 * bound
    assert len(best_fit_decreasing(counts, capacity)) > (1 + lost) * bound


@pytest.mark.parametrize(("mu", "sigma", "capacity"), [(5.5, 0.9, 2048), (7.0, 1.5, 32_768)])
def test_where_documents_are_short_for_the_capacity_best_fit_is_kept(mu, sigma, capacity):
    lengths = np.clip(np.random.default_rng(0).lognormal(mu, sigma, 50_000), 10, capacity).astype(np.int64)
    patterns, bound = near_optimal(histogram(lengths), capacity)
    assert bound <= len(patterns) <= 1.001 * bound
    assert len(patterns) == len(best_fit_decreasing(histogram(lengths), capacity))


@pytest.mark.slow
@pytest.mark.parametrize(("low", "high"), [(0.15, 0.55), (0.26, 0.5)])
def test_hard_sets_of_a_real_capacity(low, high):
    lengths = np.random.default_rng(0).integers(int(low * 2048), int(high * 2048) + 1, 100_000)
    patterns, bound = near_optimal(histogram(lengths), 2048)
    check(patterns, lengths, 2048)
    assert len(patterns) <= 1.001 * bound


@pytest.mark.slow
@pytest.mark.parametrize("capacity", [512, 2048])
def test_gsm8k_reaches_the_bound(capacity, gsm8k):
    from packtrain.objectives.task import load_task
    from packtrain.recipe.reader import load_recipe

    recipe = Path(__file__).parents[2] / "recipes/gsm8k_local.yaml"
    overrides = [f"data.path={gsm8k}", f"data.max_length={capacity}", "data.overflow=drop"]
    lengths = load_task(load_recipe(recipe, overrides)).train.lengths
    patterns, bound = near_optimal(histogram(lengths), capacity)
    check(patterns, lengths, capacity)
    assert len(patterns) <= 1.001 * bound
    assert len(best_fit_decreasing(histogram(lengths), capacity)) > 1.005 * bound


def test_the_linear_program_beats_both_heuristics():
    """26% to 50% of the capacity: filling packs up doesn't help, prices do; and a limit of two documents binds."""
    lengths = np.random.default_rng(1).integers(26, 51, 3000)
    counts = histogram(lengths)
    patterns, bound = near_optimal(counts, 100)
    assert len(patterns) < min(len(fill_up(counts, 100)), len(best_fit_decreasing(counts, 100)))
    pairs, bound = near_optimal(counts, 100, 2)
    check(pairs, lengths, 100, 2)
    assert len(pairs) == bound == 1500


def test_the_same_packs_every_time():
    counts = histogram(np.random.default_rng(2).integers(26, 51, 3000))
    one, other = (near_optimal(counts, 100)[0] for _ in range(2))
    assert np.array_equal(one.slot_length, other.slot_length) and np.array_equal(one.repeats, other.repeats)


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.floats(0, 1)), min_size=1, max_size=4, unique_by=lambda t: t[0]),
    st.integers(12, 30),
    st.integers(1, 4),
)
def test_knapsacks_by_brute_force(items, capacity, most):
    from itertools import combinations_with_replacement

    lengths = np.array(sorted(length for length, _ in items))
    prices = np.array([dict(items)[length] for length in lengths])

    def best(room, number):
        every = (c for k in range(number + 1) for c in combinations_with_replacement(range(len(lengths)), k))
        return max(prices[list(c)].sum() for c in every if lengths[list(c)].sum() <= room)

    close = partial(pytest.approx, abs=30 * BETTER)  # up to 30 items, none worth so little
    worth, trace = few_items(lengths, prices, capacity, most)
    rooms = np.array([capacity, capacity // 2])
    for room, column in zip(rooms, trace(rooms), strict=True):
        assert worth[room] == close(best(room, most)) == close(column @ prices)
        assert column @ lengths <= room and column.sum() <= most
    if lengths[0] >= 4:
        worth, trace = any_items(lengths, prices, capacity)
        assert worth[capacity] == close(best(capacity, capacity // 4))
        assert trace(rooms)[0] @ prices == close(worth[capacity])
        assert trace(rooms)[0] @ lengths <= capacity
