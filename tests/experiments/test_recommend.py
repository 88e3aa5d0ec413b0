"""The recommendation, on lengths for which the answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from packtrain.errors import PlanError
from packtrain.experiments.comparison.recommend import recommend
from packtrain.packing.cost import Cost
from packtrain.recipe import load_recipe
from tests.experiments.tiny_experiment import write_experiment

LONG_TAIL = np.clip(np.random.default_rng(0).lognormal(4, 1, 2000), 8, 2000).astype(int)


def recipe_of(tmp_path, *overrides):
    write_experiment(tmp_path)
    return load_recipe(
        tmp_path / "base.yaml",
        ["data.max_length=2048", "batching.max_tokens=8192", "batching.examples_per_step=64", *overrides],
    )


def test_a_long_tail_calls_for_a_flat_balanced_layout(tmp_path):
    found = recommend(recipe_of(tmp_path), LONG_TAIL)
    assert found.strategy == "balanced"
    by_name = {modelled.strategy: modelled for modelled in found.modelled}
    assert by_name["balanced"].computed_per_real == 1.0 and by_name["pad_longest"].cost == 1.0
    assert by_name["pad_longest"].computed_per_real > 2
    assert 0.8 < by_name["balanced"].cost * by_name["pad_longest"].computed_per_real <= 1  # fewer micro-batches, too
    text = "\n".join(found.lines())
    assert "would compute" in text and "the examples of every update stay" in text and "bfd" in text


def test_equal_lengths_need_no_packing(tmp_path):
    found = recommend(recipe_of(tmp_path), np.full(2000, 100))
    assert found.strategy == "pad_longest"
    assert "no other layout would save enough" in "\n".join(found.lines())


def test_many_small_micro_batches_cost_time(tmp_path):
    """Where hardly two rows fit, padding has next to no filler, and more micro-batches than needed."""
    lengths = np.random.default_rng(0).integers(98, 103, 2000)
    found = recommend(recipe_of(tmp_path, "data.max_length=110", "batching.max_tokens=200"), lengths)
    by_name = {modelled.strategy: modelled for modelled in found.modelled}
    assert by_name["pad_longest"].computed_per_real < 1.01 and found.strategy == "balanced"
    wide = recommend(recipe_of(tmp_path, "data.max_length=110"), lengths)
    assert wide.strategy == "pad_longest"  # the control: with room, padding costs nothing here


def test_ranks_that_wait_cost_time(tmp_path):
    attention_heavy = Cost(linear=1.0, quadratic=0.01)
    found = recommend(recipe_of(tmp_path), LONG_TAIL, world_size=4, cost=attention_heavy)
    by_name = {modelled.strategy: modelled.cost for modelled in found.modelled}
    assert found.strategy == "balanced" and by_name["balanced"] < by_name["padding_free"]
    assert "on 4 ranks" in "\n".join(found.lines())


def test_the_recipe_own_strategy_has_no_say(tmp_path):
    mine = recommend(recipe_of(tmp_path, "batching.strategy=bfd", "batching.tokens_per_step=8192"), LONG_TAIL)
    assert mine == recommend(recipe_of(tmp_path), LONG_TAIL)


def test_lengths_that_nothing_can_take_are_an_error(tmp_path):
    with pytest.raises(PlanError, match="max_tokens"):
        recommend(recipe_of(tmp_path), np.array([10, 9000]))
