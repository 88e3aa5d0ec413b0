"""What a plan does, in one row: the table of `packtrain plan`, and the balance figures of the benchmark.

    report = describe(make_plan(lengths, strategy="bfd", max_tokens=8192))
    print(report.filler_share, report.examples_per_update)

A plan of more than `SAMPLED_STEPS` updates is described from that many, evenly spaced; the report says so.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from packtrain.packing.accumulation import micro_batch_tokens
from packtrain.packing.plan import Plan

SAMPLED_STEPS = 1000
FILLER_TOKENS = 2  # what a filler micro-batch computes, see collator.py


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """One strategy's row.

    Attributes:
        strategy: its name.
        updates: of the whole run.
        gradient_accumulation_steps: micro-batches per rank and update.
        micro_batches: of the whole run and all ranks.
        sampled_updates: updates looked at for everything below; fewer than `updates` in a large plan.
        examples_per_update: (min, mean, max).
        examples_per_update_std: standard deviation; an update's mean length varies with it in epoch scope.
        mean_length_spread: standard deviation over updates of the mean example length, over what random updates of the
            same size would have (1 is a random mix; above 1, updates of long and of short examples).
        filler_share: share of the computed tokens that are filler, in [0, 1).
        tokens: real tokens computed.
        tokens_dropped: tokens that no update sees.
        examples_split: examples cut into pieces.
        largest_micro_batch: computed tokens.
        balance: mean over ranks of the modelled compute / what the slowest rank of each micro-step makes them wait for;
            1 is perfect. Costs by the plan's cost model.
        token_balance: the same with tokens as the cost.
    """

    strategy: str
    updates: int
    gradient_accumulation_steps: int
    micro_batches: int
    sampled_updates: int
    examples_per_update: tuple[int, float, int]
    examples_per_update_std: float
    mean_length_spread: float
    filler_share: float
    tokens: int
    tokens_dropped: int
    examples_split: int
    largest_micro_batch: int
    balance: float
    token_balance: float

    def to_dict(self) -> dict:
        return asdict(self)


def describe(plan: Plan, *, sampled_steps: int = SAMPLED_STEPS) -> PlanReport:
    """Look at the updates of a plan, or at `sampled_steps` of them spaced evenly."""
    steps = np.unique(
        np.linspace(0, plan.total_steps - 1, min(sampled_steps, plan.total_steps)).round().astype(np.int64)
    )
    scope = plan.scope
    examples, tokens_of_update = [], []
    computed = split = largest = 0
    busy = {"cost": 0.0, "tokens": 0.0}
    waited = {"cost": 0.0, "tokens": 0.0}
    for step in steps.tolist():
        micro_batches = plan.layout_of(step)
        examples.append(len(plan.examples(step)))
        split += sum(map(len, micro_batches)) - examples[-1]
        lengths = [part.lengths for part in micro_batches]
        tokens_of_update.append(sum(int(own.sum()) for own in lengths))
        tokens = [micro_batch_tokens(own, scope.strategy, getattr(scope, "width", 0)) for own in lengths]
        cost = [_micro_batch_cost(own, size, plan) for own, size in zip(lengths, tokens, strict=True)]
        computed += sum(size or FILLER_TOKENS for size in tokens)
        largest = max(largest, *tokens)
        for name, values in (("cost", cost), ("tokens", tokens)):
            table = np.array(values, dtype=np.float64).reshape(-1, plan.world_size)  # [micro-steps, ranks]
            busy[name] += table.sum() / plan.world_size
            waited[name] += table.max(axis=1).sum()
    real = sum(tokens_of_update)
    return PlanReport(
        strategy=plan.strategy,
        updates=plan.total_steps,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        micro_batches=plan.total_steps * plan.gradient_accumulation_steps * plan.world_size,
        sampled_updates=len(steps),
        examples_per_update=(min(examples), float(np.mean(examples)), max(examples)),
        examples_per_update_std=float(np.std(examples)),
        mean_length_spread=_mean_length_spread(np.array(tokens_of_update), np.array(examples), plan.lengths),
        filler_share=1 - real / computed,
        tokens=real,
        tokens_dropped=0,
        examples_split=split,
        largest_micro_batch=largest,
        balance=busy["cost"] / waited["cost"],
        token_balance=busy["tokens"] / waited["tokens"],
    )


def _micro_batch_cost(lengths: np.ndarray, tokens: int, plan: Plan) -> float:
    """Modelled compute of a micro-batch; padded rows are computed at full width."""
    if plan.layout == "flat" or not len(lengths):
        return float(plan.scope.cost(lengths).sum())
    return float(len(lengths) * plan.scope.cost(tokens // len(lengths)))


def _mean_length_spread(tokens: np.ndarray, examples: np.ndarray, lengths: np.ndarray) -> float:
    """Root mean square, over updates, of (mean length - mean of all) in standard errors of a random update."""
    some = np.asarray(lengths[:: max(1, len(lengths) // 1_000_000)], dtype=np.float64)
    if some.std() == 0:
        return 1.0
    deviations = (tokens / examples - some.mean()) / (some.std() / np.sqrt(examples))
    return float(np.sqrt(np.mean(deviations**2)))
