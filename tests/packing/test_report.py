"""The figures of `packtrain plan`, by hand where a hand can."""

from __future__ import annotations

import numpy as np
import pytest

from packtrain.packing.cost import Cost
from packtrain.packing.plan import make_plan
from packtrain.packing.report import describe
from packtrain.packing.strategies import STRATEGIES


def test_by_hand():
    """Four examples of 2, 2, 2 and 6 tokens in one update: two rows of the longest each, or none wasted."""
    lengths = [2, 2, 2, 6]
    padded = describe(make_plan(lengths, strategy="pad_max", examples_per_step=4, max_tokens=12))
    assert (padded.updates, padded.gradient_accumulation_steps, padded.micro_batches) == (1, 2, 2)
    assert padded.padding_share == pytest.approx(12 / 24) and padded.largest_micro_batch == 12
    flat = describe(make_plan(lengths, strategy="balanced", examples_per_step=4, max_tokens=6, world_size=2))
    assert flat.padding_share == 0 and flat.largest_micro_batch == 6 and flat.tokens == 12
    assert flat.balance == flat.token_balance == 1 and flat.examples_per_update == (4, 4.0, 4)


def test_idle_ranks_and_filler_are_counted():
    """One example on two ranks: the second computes two filler tokens and waits."""
    report = describe(make_plan([8], strategy="balanced", world_size=2))
    assert report.balance == 0.5 and report.padding_share == pytest.approx(2 / 10)


def test_attention_cost_is_in_the_balance():
    """Two ranks with 10 tokens each: level in tokens, not in attention."""
    options = dict(strategy="pad_longest", examples_per_step=2, world_size=2, max_tokens=10)
    assert describe(make_plan([10, 10], **options)).balance == 1
    cost = Cost(linear=1, quadratic=1)
    report = describe(make_plan([10, 9], cost=cost, **options))
    assert report.balance == pytest.approx((110 + 90) / 2 / 110)
    assert report.token_balance == pytest.approx(19 / 20)
    assert report.attention_imbalance == pytest.approx((100 - 81) / (2 * 100))


def test_level_attention_has_no_imbalance():
    assert (
        describe(make_plan([10, 10], strategy="balanced", examples_per_step=2, world_size=2)).attention_imbalance == 0
    )
    one = describe(make_plan([10, 9], strategy="pad_longest", examples_per_step=2))
    assert one.attention_imbalance == 0  # on one rank, whatever the lengths


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_sample_of_the_steps_tells_the_same(name, sft_lengths):
    plan = make_plan(sft_lengths, strategy=name, max_tokens=2048, examples_per_step=32, num_epochs=4)
    whole, sample = describe(plan), describe(plan, sampled_steps=60)
    assert whole.sampled_updates == plan.total_steps and sample.sampled_updates == 60
    assert whole.updates == sample.updates and whole.micro_batches == sample.micro_batches
    assert sample.padding_share == pytest.approx(whole.padding_share, abs=0.03)
    assert whole.tokens == 4 * sft_lengths.sum()
    assert (whole.examples_split > 0) == STRATEGIES[name].splits


def test_cuts_between_updates_are_counted():
    """Two documents of 6 in packs of 8 and updates of one pack: the second begins in one update and ends in the next."""
    for tokens_per_step in (8, 16):
        report = describe(make_plan([6, 6], strategy="wrapped", max_tokens=8, tokens_per_step=tokens_per_step))
        assert (report.updates, report.examples_split) == (16 // tokens_per_step, 1)
    assert describe(make_plan([4, 4], strategy="wrapped", max_tokens=4, tokens_per_step=4)).examples_split == 0


def test_mix_of_an_update():
    """Step scope is a random mix; best-fit decreasing over the epoch makes updates of long and of short examples."""
    lengths = np.clip(np.random.default_rng(1).lognormal(5, 1, 5000), 5, 2048).astype(np.int32)
    random_mix = describe(make_plan(lengths, strategy="balanced", max_tokens=4096))
    assert random_mix.mean_length_spread == pytest.approx(1, abs=0.25)
    packed = describe(make_plan(lengths, strategy="bfd", max_tokens=4096))
    assert packed.mean_length_spread > 2
    assert packed.examples_per_update[0] < 64 < packed.examples_per_update[2]
