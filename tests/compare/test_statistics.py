"""Ratios and intervals on numbers whose answers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from packtrain.compare.statistics import (
    Ratio,
    largest_relative_difference,
    paired_difference,
    paired_ratio,
    spread,
)


def test_ratio_and_interval_by_hand():
    """Logs of 2, 2 and 8 are 1, 1 and 3 times log 2: mean 5/3, standard deviation 2/sqrt(3), t(2, 97.5%) = 4.30265."""
    ratio = paired_ratio([2.0, 4.0, 8.0], [1.0, 2.0, 1.0])
    half = 4.30265273 * (2 / math.sqrt(3)) / math.sqrt(3)
    assert ratio.estimate == pytest.approx(2 ** (5 / 3))
    assert (ratio.low, ratio.high) == pytest.approx((2 ** (5 / 3 - half), 2 ** (5 / 3 + half)))
    assert ratio.pairs == 3


def test_difference_and_interval_by_hand():
    """Differences of 0.1, 0.1 and 0.4: mean 0.2, standard deviation 0.3/sqrt(3), t(2, 97.5%) = 4.30265."""
    found = paired_difference([0.6, 0.1, 0.4], [0.5, 0.0, 0.0])
    half = 4.30265273 * 0.1 * math.sqrt(3) / math.sqrt(3)
    assert (found.estimate, found.low, found.high) == pytest.approx((0.2, 0.2 - half, 0.2 + half))
    assert not found.is_clear and found.pairs == 3
    assert found.pairs_needed() == 6, "((1.95996 + 0.84162) * 0.173205 / 0.2)^2 = 5.89"
    alone = paired_difference([0.6], [0.5])
    assert alone.low is None and not alone.is_clear and alone.pairs_needed() is None
    assert paired_difference([0.6, 0.71], [0.5, 0.6]).is_clear
    assert paired_difference([0.6, 0.5], [0.5, 0.6]).pairs_needed() is None, "no difference takes no number of pairs"


def test_as_many_pairs_as_needed_show_the_difference_as_often_as_asked_for():
    random, shown = np.random.default_rng(0), 0
    pilot = paired_difference((0.1 + 0.2 * random.standard_normal(4000)).tolist(), [0.0] * 4000)
    needed = pilot.pairs_needed(power=0.8)
    for _ in range(1000):
        shown += paired_difference((0.1 + 0.2 * random.standard_normal(needed)).tolist(), [0.0] * needed).is_clear
    assert 28 <= needed <= 36 and 0.73 <= shown / 1000 <= 0.85


def test_noise_common_to_a_round_cancels():
    machine = np.array([1.0, 0.4, 2.0, 0.7, 1.3])  # how fast the machine was in each round
    paired = paired_ratio((3 * machine).tolist(), machine.tolist())
    assert (paired.low, paired.estimate, paired.high) == pytest.approx((3, 3, 3))
    mispaired = paired_ratio((3 * machine).tolist(), np.roll(machine, 1).tolist())
    assert mispaired.high / mispaired.low > 10  # the control: without pairs the noise stays


def test_interval_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        logs = math.log(2.4) + 0.1 * random.standard_normal(5)
        ratio = paired_ratio(np.exp(logs).tolist(), [1.0] * 5)
        covered += ratio.low <= 2.4 <= ratio.high
    assert 0.93 <= covered / 1000 <= 0.97


def test_rounds_of_one_seed_count_once():
    """Two seeds that differ and agree within themselves: the interval is that of two pairs, not of six."""
    values, ones = [2.0, 2.0, 2.0, 4.0, 4.0, 4.0], [1.0] * 6
    by_seed = paired_ratio(values, ones, groups=[0, 0, 0, 7, 7, 7])
    assert by_seed == paired_ratio([2.0, 4.0], [1.0, 1.0]) and by_seed.pairs == 2
    assert paired_ratio(values, ones, groups=[0, 7, 0, 7, 0, 7]) != by_seed
    apart = paired_ratio(values, ones)  # the control: taken for independent, they claim too much
    assert apart.high / apart.low < by_seed.high / by_seed.low


def test_one_round_has_no_interval_and_claims_nothing():
    ratio = paired_ratio([5.0], [2.0])
    assert (ratio.estimate, ratio.low, ratio.high) == (2.5, None, None)
    assert not ratio.above_one and not ratio.below_one
    assert ratio.text() == "2.50x"
    assert ratio.inverse() == Ratio(estimate=0.4, low=None, high=None, pairs=1)


def test_an_interval_without_information_stays_short():
    assert paired_ratio([2.0, 400.0], [1.0, 1.0]).text() == "28.28x (0.00->1000)"


@pytest.mark.parametrize(
    ("low", "high", "above", "below"), [(1.1, 2, True, False), (0.9, 1.2, False, False), (0.5, 0.9, False, True)]
)
def test_claims_need_the_whole_interval(low, high, above, below):
    ratio = Ratio(estimate=1.0, low=low, high=high, pairs=3)
    assert (ratio.above_one, ratio.below_one) == (above, below)
    assert (ratio.inverse().above_one, ratio.inverse().below_one) == (below, above)


def test_spread():
    assert vars(spread(list(range(11)))) == {"median": 5.0, "p10": 1.0, "p90": 9.0}


def test_largest_relative_difference():
    assert largest_relative_difference([2.0, 3.3, 9.9], [2.0, 3.0]) == pytest.approx(0.1)  # the third has no partner
    assert largest_relative_difference([1.0, math.nan], [1.0, 1.0]) == math.inf
    assert largest_relative_difference([0.0], [0.0]) == 0.0
