"""Packing the histogram gives the packs of the textbook algorithms, document by document."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packtrain.packing.lengths import histogram
from packtrain.packing.packers import best_fit_decreasing, first_fit_decreasing
from packtrain.packing.packs import ListedPacks, PatternPacks, sort_by_length


def textbook(lengths, capacity: int, *, best: bool, max_documents: int | None = None) -> list[int]:
    """Tokens in each pack by the literal algorithm: every document looks at every open pack."""
    packs: list[tuple[int, int]] = []  # (tokens left, documents)
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, (left, number) in enumerate(packs) if left >= length and number != max_documents]
        if fitting:
            chosen = min(fitting, key=lambda i: packs[i][0]) if best else fitting[0]
            packs[chosen] = (packs[chosen][0] - length, packs[chosen][1] + 1)
        else:
            packs.append((capacity - length, 1))
    return sorted(capacity - left for left, _ in packs)


def packs_of(lengths, capacity, algorithm, max_documents=None) -> PatternPacks:
    lengths = np.asarray(lengths, dtype=np.int64)
    counts = histogram(lengths)
    patterns = algorithm(counts, capacity, max_documents)
    return PatternPacks(patterns=patterns, counts=counts, by_length=sort_by_length(lengths, counts), key=5, bound=0)


problems = st.integers(1, 80).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(0, capacity), max_size=60), st.just(capacity))
)


@pytest.mark.slow
@settings(max_examples=1000)
@given(problems)
def test_best_fit_decreasing_is_the_textbook_one(problem):
    lengths, capacity = problem
    packs = packs_of(lengths, capacity, best_fit_decreasing)
    assert sorted(int(np.take(lengths, pack).sum()) for pack in packs) == textbook(lengths, capacity, best=True)


@settings(max_examples=500)
@given(problems, st.sampled_from([None, 1, 2, 3]))
def test_first_fit_decreasing_is_the_textbook_one(problem, max_documents):
    lengths, capacity = problem
    packs = packs_of(lengths, capacity, first_fit_decreasing, max_documents)
    expected = textbook(lengths, capacity, best=False, max_documents=max_documents)
    assert sorted(int(np.take(lengths, pack).sum()) for pack in packs) == expected


@settings(max_examples=300)
@given(problems, st.sampled_from([1, 2, 3, 7]), st.sampled_from([best_fit_decreasing, first_fit_decreasing]))
def test_document_limit(problem, max_documents, algorithm):
    lengths, capacity = problem
    packs = packs_of(lengths, capacity, algorithm, max_documents)
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    assert all(len(pack) <= max_documents and np.take(lengths, pack).sum() <= capacity for pack in packs)


def test_by_hand():
    """Capacity 10: best fit puts the 2 into the pack with 2 left, first fit into the one with 3 left."""
    lengths = [7, 8, 2, 3]
    best = [sorted(np.take(lengths, pack).tolist()) for pack in packs_of(lengths, 10, best_fit_decreasing)]
    assert sorted(best) == [[2, 8], [3, 7]]
    first = [
        sorted(np.take([7, 6, 3, 4, 2, 1], pack).tolist())
        for pack in packs_of([7, 6, 3, 4, 2, 1], 12, first_fit_decreasing)
    ]
    assert sorted(first) == [[1, 4, 7], [2, 3, 6]]


def test_patterns_hold_few_rows_for_many_examples():
    lengths = np.repeat([700, 600, 48], [40_000, 20_000, 20_000])
    patterns = best_fit_decreasing(histogram(lengths), 2048)
    assert len(patterns) == 20_000 and len(patterns.repeats) == 1
    assert patterns.slot_length.tolist() == [48, 600, 700, 700]


def test_random_access_equals_the_whole(sft_lengths):
    packs = packs_of(sft_lengths, 2048, best_fit_decreasing)
    items, offsets = packs.take(np.arange(len(packs)))
    assert sorted(items.tolist()) == list(range(len(sft_lengths)))
    listed = ListedPacks(items=items, offsets=offsets)
    numbers = np.array([5, 0, len(packs) - 1, 5])
    for one, other in zip(packs.take(numbers), listed.take(numbers), strict=True):
        assert np.array_equal(one, other)
    assert np.array_equal(packs[-1], listed[-1]) and len(packs[:7]) == 7
    with pytest.raises(IndexError):
        packs[len(packs)]


def test_examples_within_a_length_are_shuffled_by_the_key():
    lengths = np.full(3000, 10)
    counts, order = histogram(lengths), sort_by_length(lengths, histogram(lengths))
    patterns = best_fit_decreasing(counts, 30)
    one, other = (
        PatternPacks(patterns=patterns, counts=counts, by_length=order, key=key, bound=0)[:] for key in (1, 2)
    )
    assert sum(np.array_equal(a, b) for a, b in zip(one, other, strict=True)) < 5


@pytest.mark.parametrize("longest", [50, 70_000])
def test_sort_by_length_is_a_stable_argsort(longest):
    lengths = np.random.default_rng(0).integers(0, longest + 1, 20_000)
    assert np.array_equal(sort_by_length(lengths, histogram(lengths)), np.argsort(lengths, kind="stable"))
