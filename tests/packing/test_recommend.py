"""The recommendation, on lengths for which the answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from packtrain.errors import PlanError
from packtrain.packing.cost import Cost
from packtrain.packing.recommend import recommend
from packtrain.recipe.sections import BatchingSection, Schedule

LONG_TAIL = np.clip(np.random.default_rng(0).lognormal(4, 1, 2000), 8, 2000).astype(int)


def recommended(lengths, *, world_size: int = 1, cost: Cost | None = None, max_length: int = 2048, **batching):
    section = BatchingSection(**{"max_tokens": 8192, "examples_per_step": 64} | batching)
    schedule = Schedule(seed=42, num_epochs=1)
    return recommend(section, schedule, lengths, world_size=world_size, cost=cost, max_length=max_length)


def test_a_long_tail_calls_for_a_flat_balanced_layout():
    found = recommended(LONG_TAIL)
    assert found.strategy == "balanced"
    by_name = {modelled.strategy: modelled for modelled in found.modelled}
    assert by_name["balanced"].computed_per_real == 1.0 and by_name["pad_longest"].cost == 1.0
    assert by_name["pad_longest"].computed_per_real > 2
    assert 0.8 < by_name["balanced"].cost * by_name["pad_longest"].computed_per_real <= 1  # fewer micro-batches, too
    text = "\n".join(found.lines())
    assert "would compute" in text and "every update sees the same examples" in text and "bfd" in text


def test_equal_lengths_need_no_packing():
    found = recommended(np.full(2000, 100))
    assert found.strategy == "pad_longest"
    assert "no other layout would save enough" in "\n".join(found.lines())


def test_updates_that_are_all_as_large_are_no_range():
    """Under room for all examples a pack is the epoch; control: packs that differ have a range."""
    text = "\n".join(recommended(np.full(42, 10), examples_per_step=12).lines())
    assert "in 1 update of 42 examples instead of 4 of 10.5" in text
    assert " examples (mean " in "\n".join(recommended(LONG_TAIL).lines())


def test_many_small_micro_batches_cost_time():
    """Where hardly two rows fit, padding has next to no filler, and more micro-batches than needed."""
    lengths = np.random.default_rng(0).integers(98, 103, 2000)
    found = recommended(lengths, max_length=110, max_tokens=200)
    by_name = {modelled.strategy: modelled for modelled in found.modelled}
    assert by_name["pad_longest"].computed_per_real < 1.01 and found.strategy == "balanced"
    wide = recommended(lengths, max_length=110)
    assert wide.strategy == "pad_longest"  # the control: with room, padding costs nothing here


def test_ranks_that_wait_cost_time():
    attention_heavy = Cost(linear=1.0, quadratic=0.01)
    found = recommended(LONG_TAIL, world_size=4, cost=attention_heavy)
    by_name = {modelled.strategy: modelled.cost for modelled in found.modelled}
    assert found.strategy == "balanced" and by_name["balanced"] < by_name["padding_free"]
    assert "on 4 ranks" in "\n".join(found.lines())


def test_the_recipe_own_strategy_has_no_say():
    mine = recommended(LONG_TAIL, strategy="bfd", tokens_per_step=8192)
    assert mine == recommended(LONG_TAIL)


def test_lengths_that_nothing_can_take_are_an_error():
    with pytest.raises(PlanError, match="max_tokens"):
        recommended(np.array([10, 9000]))
