"""Ratios and differences with confidence intervals from few, noisy, paired repeats, and the spread of single figures.

Runs are interleaved (A B C, A B C, ...), so the rounds of an experiment pair up: whatever the machine did
during a round, it did to all variants. A ratio is therefore taken within each round, and the rounds are
combined on the logarithmic scale, where "twice as fast" and "half as fast" lie equally far from 1:

    estimate = exp(mean(d)),  interval = exp(mean(d) +- t * sd(d) / sqrt(n)),  d = log(a / b) per round

with Student's t at n - 1 degrees of freedom (Fieller's problem is avoided because logs of positive rates are
close to normal). One round gives an estimate and no interval. Rounds of one seed repeat the same updates and
vary with the machine alone; where there are several seeds, d is the mean of a seed's rounds and n counts seeds.

    >>> paired_ratio([200.0, 220.0, 210.0], [100.0, 110.0, 100.0]).text()
    '2.03x (1.90-2.18)'
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm, t

LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A ratio over `pairs` independent pairs; `low` and `high` are absent (None) where one is all there is."""

    estimate: float
    low: float | None
    high: float | None
    pairs: int

    @property
    def above_one(self) -> bool:
        """Whether the whole interval lies above 1; False also where there is no interval."""
        return self.low is not None and self.low > 1

    @property
    def below_one(self) -> bool:
        """Whether the whole interval lies below 1; False also where there is no interval."""
        return self.high is not None and self.high < 1

    def inverse(self) -> Ratio:
        """Return the ratio the other way round."""
        low, high = (1 / self.high, 1 / self.low) if self.high and self.low else (None, None)
        return Ratio(estimate=1 / self.estimate, low=low, high=high, pairs=self.pairs)

    def text(self) -> str:
        """Write `2.41x (2.30-2.52)`, or `2.41x` without an interval."""
        interval = "" if self.low is None or self.high is None else f" ({_short(self.low)}-{_short(self.high)})"
        return f"{_short(self.estimate)}x{interval}"


def _short(value: float) -> str:
    if value >= 1000:
        return ">1000"
    return f"{value:.2f}" if value < 100 else f"{value:.3g}"


def paired_ratio(
    values: Sequence[float],
    references: Sequence[float],
    *,
    groups: Sequence[int] | None = None,
    level: float = LEVEL,
) -> Ratio:
    """Estimate the ratio of positive `values` to `references`, round by round, with its t interval.

    Args:
        values, references: one positive figure per round, in the same order.
        groups: the round's group (its seed), the same for rounds that are not independent; None: all are.
        level: coverage of the interval.
    """
    assert len(values) == len(references) > 0, "a ratio needs paired rounds"
    logs = np.log(np.asarray(values, dtype=float)) - np.log(np.asarray(references, dtype=float))  # [rounds]
    if groups is not None:
        logs = np.array([logs[np.asarray(groups) == group].mean() for group in np.unique(groups)])  # [groups]
    pairs, mean = len(logs), float(logs.mean())
    if pairs == 1:
        return Ratio(estimate=math.exp(mean), low=None, high=None, pairs=1)
    half = float(t.ppf((1 + level) / 2, pairs - 1) * logs.std(ddof=1) / math.sqrt(pairs))
    return Ratio(estimate=math.exp(mean), low=math.exp(mean - half), high=math.exp(mean + half), pairs=pairs)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A mean difference over `pairs` pairs; `low` and `high` are absent (None) where one pair is all there is."""

    estimate: float
    low: float | None
    high: float | None
    pairs: int
    deviation: float | None
    """Standard deviation of the differences."""

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves 0 out; False also where there is no interval."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high

    def pairs_needed(self, *, power: float = 0.8, level: float = LEVEL) -> int | None:
        """Estimate how many pairs would show a difference of this size and spread; None where it is 0 or of one pair.

        Args:
            power: chance that the interval then leaves 0 out on the right side, by the normal approximation
                n = ((z(level) + z(power)) * deviation / difference)^2, and no fewer than 2.
        """
        if self.deviation is None or self.estimate == 0:
            return None
        z = float(norm.ppf((1 + level) / 2) + norm.ppf(power))
        return max(2, math.ceil((z * self.deviation / self.estimate) ** 2))


def paired_difference(values: Sequence[float], references: Sequence[float], *, level: float = LEVEL) -> Difference:
    """Estimate how much more `values` are than `references`, pair by pair, with Student's t interval.

    For shares and lengths, which may be 0; ratios are `paired_ratio`'s.

    >>> paired_difference([0.9, 0.8, 0.7], [0.5, 0.5, 0.2]).is_clear
    True
    """
    assert len(values) == len(references) > 0, "a difference needs pairs"
    each = np.asarray(values, dtype=float) - np.asarray(references, dtype=float)  # [pairs]
    pairs, mean = len(each), float(each.mean())
    if pairs == 1:
        return Difference(estimate=mean, low=None, high=None, pairs=1, deviation=None)
    deviation = float(each.std(ddof=1))
    half = float(t.ppf((1 + level) / 2, pairs - 1)) * deviation / math.sqrt(pairs)
    return Difference(estimate=mean, low=mean - half, high=mean + half, pairs=pairs, deviation=deviation)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and the tenth and ninetieth percentile."""

    median: float
    p10: float
    p90: float


def spread(values: Sequence[float]) -> Spread:
    """Find the spread of a non-empty sequence; percentiles interpolate between neighbours."""
    p10, median, p90 = np.percentile(np.asarray(values, dtype=float), [10, 50, 90]).tolist()
    return Spread(median=median, p10=p10, p90=p90)


def largest_relative_difference(values: Sequence[float], references: Sequence[float]) -> float:
    """Find the largest |value - reference| / |reference| over the updates both have.

    A figure that is not finite on one side only is infinitely far away.
    """
    count = min(len(values), len(references))
    assert count > 0, "nothing to compare"
    a, b = (np.asarray(part[:count], dtype=float) for part in (values, references))
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = np.abs(a - b) / np.abs(b)
    relative = np.where(a == b, 0.0, np.where(np.isfinite(relative), relative, np.inf))
    return float(relative.max())
