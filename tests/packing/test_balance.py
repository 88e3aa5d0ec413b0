"""Balance: within capacity always, level by micro-step, and near what is possible at all."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packtrain.packing.accumulation import smallest_accumulation
from packtrain.packing.balance import _fill, balanced, exchange, into_micro_steps, levels
from packtrain.packing.cost import Cost
from packtrain.packing.plan import make_plan
from packtrain.packing.scopes import StepScope
from packtrain.packing.strategies import STRATEGIES, equal_counts

COST = Cost(linear=1, quadratic=0.02)


def waited(parts, lengths, ranks, cost=COST) -> float:
    """What the slowest rank of each micro-step takes, summed."""
    return np.array([cost(lengths[part]).sum() for part in parts]).reshape(-1, ranks).max(axis=1).sum()


def test_levels_by_hand():
    assert levels(np.array([9.0, 5, 4, 4, 2, 1, 1]), micro_steps=2, ranks=2).tolist() == [9, 4]
    assert levels(np.array([3.0, 3, 2, 2, 1, 1]), micro_steps=2, ranks=2).tolist() == [3, 3]
    assert levels(np.array([8.0]), micro_steps=2, ranks=2).tolist() == [8, 0]


def test_micro_steps_share_neighbours_and_ranks_get_equal_sums():
    costs = [7.0, 1.0, 8.0, 2.0, 4.0, 3.0]
    order = into_micro_steps(costs, ranks=2)
    table = np.array([costs[part] for part in order]).reshape(3, 2)
    assert [sorted(row) for row in table.tolist()] == [[7, 8], [3, 4], [1, 2]]
    assert table.sum(axis=0).tolist() == [13, 12] or table.sum(axis=0).tolist() == [12, 13]
    assert into_micro_steps([1.0, 2.0, 3.0], ranks=2) == [2, 1, 0]


@settings(max_examples=300)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=40),
    st.integers(60, 120),
    st.integers(1, 4),
    st.sampled_from([Cost(), COST, Cost(linear=1, quadratic=10)]),
)
def test_capacity_holds_with_as_few_micro_steps_as_the_plan_takes(lengths, capacity, ranks, cost):
    lengths = np.array(lengths)
    scope = StepScope(
        lengths=lengths, strategy=STRATEGIES["balanced"], name="balanced", seed=0, max_tokens=capacity, cost=cost,
        examples_per_step=len(lengths), width=int(lengths.max()),
    )  # fmt: skip
    micro_steps = smallest_accumulation(scope, steps=1, ranks=ranks)
    parts = balanced(lengths, micro_steps=micro_steps, ranks=ranks, capacity=capacity, cost=cost)
    assert len(parts) == ranks * micro_steps
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    assert max(lengths[part].sum() for part in parts) <= capacity


@pytest.mark.slow
@settings(max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_close_to_the_best_of_all_partitions(lengths):
    """Two ranks, two micro-steps, every way to do it tried. A third above the best is what Graham (1969) proves of the
    longest first on one set of machines; here the worst of thousands of small cases is a fifth above."""
    lengths = np.array(lengths)
    best = min(
        waited([np.flatnonzero(np.array(place) == part) for part in range(4)], lengths, 2)
        for place in product(range(4), repeat=len(lengths))
    )
    parts = balanced(lengths, micro_steps=2, ranks=2, capacity=10**6, cost=COST)
    assert waited(parts, lengths, 2) <= best * (4 / 3)


def test_exchange_helps_a_few_documents():
    """Seven thousandths are left to the ranks of a small update by the greedy rule, and none after exchanges."""
    rng, cost = np.random.default_rng(3), COST
    spent, least = np.zeros(2), 0.0
    for _ in range(20):
        lengths = np.clip(rng.lognormal(4, 0.8, 32), 5, 500).astype(np.int64)
        parts = balanced(lengths, micro_steps=2, ranks=2, capacity=10**6, cost=cost)
        order, costs = np.argsort(-lengths, kind="stable"), cost(lengths)
        greedy = _fill(lengths, costs, order, np.repeat(levels(costs[order], 2, 2), 2), 10**6)
        greedy = [greedy[part] for part in into_micro_steps([costs[part].sum() for part in greedy], 2)]
        spent += [waited(parts, lengths, 2), waited(greedy, lengths, 2)]
        least += costs.sum() / 2
    assert spent[0] / least < 1.002 and spent[1] / least > 1.004


@settings(max_examples=100)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_exchange_never_harms(lengths, ranks, micro_steps, seed):
    lengths = np.array(lengths)
    place = np.random.default_rng(seed).integers(0, ranks * micro_steps, len(lengths))
    parts = [np.flatnonzero(place == part) for part in range(ranks * micro_steps)]
    capacity = max(lengths[part].sum() for part in parts)
    better = exchange(parts, lengths, COST(lengths), ranks, capacity)
    assert sorted(i for part in better for i in part) == list(range(len(lengths))) and len(better) == len(parts)
    assert max(lengths[part].sum() for part in better) <= capacity
    assert waited(better, lengths, ranks) <= waited(parts, lengths, ranks) * (1 + 1e-9)


LLAMA_7B = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)


@pytest.mark.parametrize(
    ("mu", "sigma", "longest", "capacity", "wanted", "by_count"),
    [(7.0, 1.5, 32_768, 32_768, 0.97, 0.6), (5.5, 0.9, 4096, 8192, 0.997, 0.85)],
)
@pytest.mark.parametrize("ranks", [8, 64])
def test_ranks_are_level(ranks, mu, sigma, longest, capacity, wanted, by_count):
    """Long-tailed and instruction-like lengths, cost model of a 7B Llama, eight micro-steps, packs four fifths full;
    equal numbers of examples, the usual way, are the negative control."""
    cost, rng = Cost.of_config(LLAMA_7B), np.random.default_rng(0)
    busy, spent = 0.0, dict(balanced=0.0, counts=0.0)
    for _ in range(4):
        lengths = np.clip(rng.lognormal(mu, sigma, 40 * ranks * 8), 5, longest).astype(np.int64)
        lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), 0.8 * capacity * ranks * 8))]
        options = dict(micro_steps=8, ranks=ranks, capacity=capacity, cost=cost)
        busy += cost(lengths).sum() / ranks
        for name, parts in (("balanced", balanced(lengths, **options)), ("counts", equal_counts(lengths, **options))):
            spent[name] += waited(parts, lengths, ranks, cost)
        assert sum(map(len, balanced(lengths, **options))) == len(lengths)
    assert busy / spent["balanced"] >= wanted
    assert busy / spent["counts"] < by_count


def test_global_balance_levels_the_ranks_and_changes_the_mix(sft_lengths):
    from packtrain.packing.report import describe

    options = dict(max_tokens=2048, world_size=4, tokens_per_step=16 * 2048, cost=COST)
    level, mixed = (describe(make_plan(sft_lengths, strategy=name, **options)) for name in ("global_balance", "bfd"))
    assert level.balance > mixed.balance
    assert level.mean_length_spread > 2 * mixed.mean_length_spread
    assert any("mix" in note for note in level.notes) and not any("mix" in note for note in mixed.notes)
