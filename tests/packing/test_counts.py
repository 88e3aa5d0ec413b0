"""Packs of a histogram alone are those of the plan."""

from __future__ import annotations

import numpy as np
import pytest

from packtrain.errors import PlanError
from packtrain.packing.counts import pack_counts
from packtrain.packing.lengths import histogram
from packtrain.packing.plan import make_plan


def test_the_same_packs_as_the_plan(sft_lengths):
    for report in pack_counts(histogram(sft_lengths), 1024):
        plan = make_plan(sft_lengths, strategy=report.strategy, max_tokens=1024)
        assert report.packs == len(plan.scope.packs(0)) >= report.bound > 0
        assert report.filled == pytest.approx(sft_lengths.sum() / report.packs / 1024)
        assert report.gap == report.packs / report.bound - 1


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "message"),
    [([3], 0, "positive integer"), ([3], 2.5, "positive integer"), ([], 4, "no examples"), ([3, 9], 8, "has 9 tokens")],
)
def test_errors(lengths, max_tokens, message):
    with pytest.raises(PlanError, match=message):
        pack_counts(histogram(np.array(lengths, dtype=np.int64)), max_tokens)
