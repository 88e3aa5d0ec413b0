"""How level the ranks are with each strategy, and what it does to the mix of an update; a part of `bench_packing`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from packtrain.packing.cost import Cost
from packtrain.packing.efficiency import describe
from packtrain.packing.plan import Plan, make_plan
from packtrain.packing.strategies import STRATEGIES

LLAMA_7B = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
ACCUMULATION = 8  # micro-batches of a rank in an update
STEPS = 20  # updates looked at for the balance


def lognormal(mean: float, sigma: float, number: int, longest: int, seed: int = 0) -> np.ndarray:
    draws = np.random.default_rng(seed).lognormal(mean, sigma, number)
    return np.clip(draws, 10, longest).astype(np.int32)


BALANCE: dict[str, tuple[Callable[[], np.ndarray], int]] = {
    "long_32k": (partial(lognormal, 7.0, 1.5, 200_000, 32_768), 32_768),
    "sft_8k_upto_2k": (partial(lognormal, 5.5, 0.9, 200_000, 2048), 8192),
    "sft_8k_upto_4k": (partial(lognormal, 5.5, 0.9, 200_000, 4096), 8192),
    "sft_8k_upto_8k": (partial(lognormal, 5.5, 0.9, 200_000, 8192), 8192),
}


def bench_balance(name: str, lengths: np.ndarray, capacity: int) -> list[dict]:
    """One row per strategy and number of ranks: balance in tokens, attention and modelled time, and the updates' mix."""
    rows = []
    per_pack = 0.75 * capacity / lengths.mean()  # micro-batches three quarters full leave room to be level
    for ranks in (8, 64):
        for strategy in ("padding_free", "balanced", "next_fit", "bfd", "optimal", "global_balance"):
            size = {"examples_per_step": max(1, int(per_pack * ranks * ACCUMULATION))}
            if strategy == "balanced":
                size["gradient_accumulation_steps"] = ACCUMULATION
            if STRATEGIES[strategy].scope == "epoch":
                size = {"tokens_per_step": capacity * ranks * ACCUMULATION}
            cost = Cost.of_config(LLAMA_7B)
            plan = make_plan(lengths, strategy=strategy, max_tokens=capacity, world_size=ranks, cost=cost, **size)
            found = describe(plan, sampled_steps=STEPS)
            rows.append({
                "data": name, "strategy": strategy, "ranks": ranks, "accumulation": found.gradient_accumulation_steps,
                "tokens": found.token_balance, "attention": _attention_balance(plan), "efficiency": found.balance,
                "possible": _possible(plan),
                "efficiency_ddp": found.rank_balance, "examples_per_update": found.examples_per_update,
                "spread": found.mean_length_spread, "dropped": found.tokens_dropped,
            })  # fmt: skip
    return rows


def _steps(plan: Plan) -> list[int]:
    return np.unique(np.linspace(0, plan.total_steps - 1, STEPS).round().astype(np.int64)).tolist()


def _attention_balance(plan: Plan) -> float:
    """Mean / largest sum of squared lengths in each micro-step, over updates spaced evenly."""
    tables = [np.array([np.square(part.lengths, dtype=np.float64).sum() for part in plan.layout_of(step)])
              for step in _steps(plan)]  # fmt: skip
    table = np.concatenate(tables).reshape(-1, plan.world_size)
    return float(table.mean(axis=1).sum() / table.max(axis=1).sum())


def _possible(plan: Plan) -> float:
    """An efficiency that no layout of the same updates exceeds.

    The micro-step with the dearest document lasts as long as that at least. Its ranks hold `max_tokens` each, so their
    work is at most that of the longest documents that fit into as many tokens together; the rest takes its mean.
    """
    busy = needed = 0.0
    for step in _steps(plan):
        lengths = np.sort(plan.lengths[plan.examples(step)])[::-1].astype(np.float64)
        costs, ranks = plan.scope.cost(lengths), plan.world_size
        longest = np.searchsorted(np.cumsum(lengths), ranks * plan.scope.max_tokens) + 1
        first = max(costs[0], costs.sum() / ranks / plan.gradient_accumulation_steps)
        busy += costs.sum() / ranks
        needed += first + max(0.0, costs.sum() - min(costs[:longest].sum(), ranks * first)) / ranks
    return float(busy / needed)
