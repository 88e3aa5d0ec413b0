"""The shuffle is a bijection for every size, even in its positions, and random in its neighbours."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from packtrain.packing.shuffle import derive_key, mix64, permute, shuffled


def test_bijection_for_all_small_sizes():
    for n in range(2001):
        assert np.array_equal(np.sort(shuffled(n, seed=n)), np.arange(n)), n


@pytest.mark.parametrize("n", [65_535, 65_536, 65_537, 999_983])
def test_bijection_around_a_power_of_two(n):
    assert np.array_equal(np.bincount(shuffled(n, seed=7), minlength=n), np.ones(n))


def test_the_same_everywhere():
    """Literal values: the shuffle must not depend on platform, numpy version or block size."""
    assert shuffled(10, seed=0).tolist() == [9, 6, 0, 8, 2, 3, 1, 4, 7, 5]
    assert shuffled(1_000_000_007, seed=3, epoch=2, start=123_456_789, stop=123_456_792).tolist() == [
        444061064,
        528497935,
        379293989,
    ]
    assert mix64(0) == 0xE220A8397B1DCDAF  # SplitMix64's first output from state 0


def test_a_slice_is_that_of_the_whole():
    whole = shuffled(50_000, seed=5, epoch=1)
    assert np.array_equal(whole[20_000:40_001], shuffled(50_000, seed=5, epoch=1, start=20_000, stop=40_001))
    assert len(shuffled(10, seed=0, start=8, stop=99)) == 2
    assert len(shuffled(10, seed=0, start=12, stop=99)) == 0


def test_seed_epoch_and_purpose_each_make_another_shuffle():
    variants = [shuffled(1000, seed=s, epoch=e, purpose=p) for s in (0, 1, -1) for e in (0, 1) for p in (0, 1)]
    fixed_points = [np.sum(a == b) for i, a in enumerate(variants) for b in variants[:i]]
    assert max(fixed_points) < 10  # Poisson with mean 1
    assert derive_key(0, 1) != derive_key(1, 0)


def test_streams_and_sizes_per_index():
    """Each stream is a bijection of its own; two streams of one size differ."""
    stream = np.repeat([3, 4, 9], [100, 100, 7])
    sizes = np.repeat([100, 100, 7], [100, 100, 7])
    index = np.concatenate([np.arange(100), np.arange(100), np.arange(7)])
    result = permute(index, sizes, key=1, stream=stream)
    for name in (3, 4, 9):
        assert np.array_equal(np.sort(result[stream == name]), np.arange(np.sum(stream == name)))
    assert np.sum(result[:100] == result[100:200]) < 10


def test_32_and_64_bit_arithmetic_agree():
    """One domain above 2^32 makes the whole call compute with 64 bits."""
    index, stream = np.arange(1000), np.arange(1000) % 7
    narrow = permute(index, np.full(1000, 1000), 3, stream)
    wide = permute(np.append(index, 5), np.append(np.full(1000, 1000), 1 << 40), 3, np.append(stream, 0))
    assert np.array_equal(narrow, wide[:-1])


def _shuffles(n: int, number: int) -> np.ndarray:
    """`number` shuffles of `range(n)`, `[number, n]`, one per key."""
    return np.array([permute(np.arange(n), n, key) for key in range(number)])


def _rotations(n: int, number: int) -> np.ndarray:
    """The negative control: random rotations are bijections, even in every position, and no shuffles."""
    return (np.arange(n)[None] + np.array([mix64(i) % n for i in range(number)])[:, None]) % n


def _p_values(table: np.ndarray) -> tuple[float, float]:
    """(evenness of every position, evenness of the step between neighbours), chi-square p-values."""
    n = table.shape[1]
    positions = [stats.chisquare(np.bincount(table[:, place], minlength=n)).pvalue for place in range(n)]
    steps = np.bincount(((table[:, 1:] - table[:, :-1]) % n).ravel(), minlength=n)[1:]
    return min(positions) * n, stats.chisquare(steps).pvalue


@pytest.mark.parametrize("n", [7, 10, 33, 100])
def test_positions_and_neighbours_are_even(n):
    positions, neighbours = _p_values(_shuffles(n, 3000))
    assert positions > 1e-4 and neighbours > 1e-4
    positions, neighbours = _p_values(_rotations(n, 3000))
    assert positions > 1e-4 and neighbours < 1e-12


def test_positions_and_neighbours_are_even_in_a_stream():
    """Also over seeds and epochs, and for one stream among several."""
    index, stream = np.tile(np.arange(10), 3), np.repeat([5, 0, 77], 10)
    table = np.array([permute(index, 10, derive_key(seed, 3), stream)[10:20] for seed in range(3000)])
    assert min(_p_values(table)) > 1e-4


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_permutations_of_a_few_are_equally_likely(n):
    counts = np.unique(_shuffles(n, 8000), axis=0, return_counts=True)[1]
    assert len(counts) == math.factorial(n)
    assert stats.chisquare(counts).pvalue > 1e-4


def test_large_domain_is_random():
    """At 2^20: no trend, no correlation of neighbours, increments even over 64 classes."""
    n = 1 << 20
    values = shuffled(n, seed=11)
    spread = 4 / math.sqrt(n)  # four standard deviations of a sample correlation
    assert abs(np.corrcoef(np.arange(n), values)[0, 1]) < spread
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < spread
    assert stats.chisquare(np.bincount((np.diff(values) % n) * 64 // n, minlength=64)).pvalue > 1e-4
