"""Which strategy for these lengths, this model and this many ranks, and why.

    recommendation = recommend(recipe.batching, recipe.schedule, examples.lengths, world_size=8, cost=cost)
    print("\\n".join(recommendation.lines()))

Only strategies that keep the updates compete: the choice is one of speed, never of what is learnt. Each is planned for
real and priced with the cost model of `packtrain.packing.cost`: padded rows at their full width, documents of a flat
batch one by one, in every micro-step all ranks waiting for the slowest, and every micro-batch `OVERHEAD` tokens more.
Padded layouts win ties, as every architecture takes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from packtrain.errors import PlanError
from packtrain.packing.accumulation import micro_batch_tokens
from packtrain.packing.plan import Plan, plan_run
from packtrain.packing.strategies import STRATEGIES
from packtrain.recipe.sections import BatchingSection, Schedule

SAMPLED_STEPS = 64
# A micro-batch reads every weight whatever its size. On an H100 (990 TFLOP/s, 3.35 TB/s: 295 FLOPs per byte) that takes
# as long as computing 295 tokens, as a bf16 weight is 2 bytes and 2 FLOPs per token.
OVERHEAD = 300
TIE = 0.03  # modelled costs this near to each other say nothing about seconds
PREFERRED = (
    "pad_longest",
    "group_by_length",
    "balanced",
    "padding_free",
    "pad_max",
)  # the first within TIE of the cheapest
REFERENCE, PACKER = "pad_longest", "bfd"


@dataclass(frozen=True, kw_only=True)
class Modelled:
    """A strategy's plan in numbers; `cost` is the compute that the slowest ranks take per real token, the reference's
    being 1."""

    strategy: str
    cost: float
    computed_per_real: float
    micro_batches: int
    updates: int
    examples: tuple[int, float, int]


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """The strategy to use, the reasons in words, and every strategy's modelled numbers, the cheapest first."""

    strategy: str
    reasons: tuple[str, ...]
    modelled: tuple[Modelled, ...]

    def lines(self) -> list[str]:
        """Yields the recommendation for people, line by line."""
        return [f"recommended: {self.strategy}", *(f"  - {reason}" for reason in self.reasons)]


def recommend(
    batching: BatchingSection, schedule: Schedule, lengths: Sequence[int] | np.ndarray, **run: Any
) -> Recommendation:
    """Plans every strategy for these lengths and pick the cheapest that keeps the updates.

    Args:
        batching: capacity and examples per step; its own strategy has no say.
        schedule: seed and length of the run.
        lengths: tokens of each example, int `[n]`.
        run: `world_size`, `max_length`, `cost`, `equal_lengths` of `plan_run`.

    Raises:
        PlanError: no strategy can take these lengths.
    """
    lengths = np.asarray(lengths)
    modelled: dict[str, Modelled] = {}
    for name in dict.fromkeys([*PREFERRED, PACKER]):
        try:
            modelled[name] = _model(name, batching, schedule, lengths, run)
        except PlanError as error:
            reason = error
    if not modelled.keys() & set(PREFERRED):
        raise reason
    base = modelled.get(REFERENCE, next(iter(modelled.values()))).cost
    modelled = {name: replace(found, cost=found.cost / base) for name, found in modelled.items()}
    competing = [modelled[name] for name in PREFERRED if name in modelled]
    cheapest = min(found.cost for found in competing)
    chosen = next(found for found in competing if found.cost <= cheapest * (1 + TIE))
    return Recommendation(
        strategy=chosen.strategy,
        reasons=tuple(_reasons(chosen, modelled, lengths, run.get("world_size", 1))),
        modelled=tuple(sorted(modelled.values(), key=lambda found: found.cost)),
    )


def _model(
    strategy: str, batching: BatchingSection, schedule: Schedule, lengths: np.ndarray, run: dict[str, Any]
) -> Modelled:
    changed = {"strategy": strategy, "tokens_per_step": None, "shapes": None}
    if STRATEGIES[strategy].scope == "epoch":
        changed["schedule"] = None
    batching = batching.model_copy(update=changed)
    plan = plan_run(batching, replace(schedule, gradient_accumulation_steps="auto"), lengths, **run)
    world_size = plan.world_size
    waited = real = computed = 0.0
    examples, steps = (
        [],
        np.unique(np.linspace(0, plan.total_steps - 1, SAMPLED_STEPS).round().astype(int)).tolist(),
    )
    for step in steps:
        parts = [part.lengths for part in plan.layout_of(step)]
        waited += np.array([_cost(part, plan) for part in parts]).reshape(-1, world_size).max(axis=1).sum()
        real += sum(int(part.sum()) for part in parts)
        computed += sum(_tokens(part, plan) for part in parts)
        examples.append(len(plan.examples(step)))
    return Modelled(
        strategy=strategy,
        cost=float(waited * world_size / real),
        computed_per_real=float(computed / real),
        micro_batches=plan.gradient_accumulation_steps,
        updates=plan.total_steps,
        examples=(min(examples), float(np.mean(examples)), max(examples)),
    )


def _tokens(lengths: np.ndarray, plan: Plan) -> int:
    return micro_batch_tokens(lengths, STRATEGIES[plan.strategy], getattr(plan.scope, "width", 0))


def _cost(lengths: np.ndarray, plan: Plan) -> float:
    """Returns the modelled compute of a micro-batch: documents if flat, full rows if padded, and its overhead."""
    cost = plan.scope.cost
    if plan.layout == "padded" and len(lengths):
        lengths = np.full(len(lengths), _tokens(lengths, plan) // len(lengths))
    return float(cost(lengths).sum() + OVERHEAD * cost.linear)


def _reasons(chosen: Modelled, modelled: dict[str, Modelled], lengths: np.ndarray, world_size: int) -> list[str]:
    median, p99, longest = np.percentile(lengths, [50, 99, 100])
    reasons = [f"lengths: median {median:,.0f}, 99th percentile {p99:,.0f}, longest {longest:,.0f} tokens"]
    reference = modelled.get(REFERENCE)
    if reference is not None:
        reasons.append(f"{REFERENCE} would compute {reference.computed_per_real:.2f} tokens for every real one")
    if chosen is not reference and reference is not None:
        reasons.append(
            f"{chosen.strategy} computes {chosen.computed_per_real:.2f}, at {chosen.cost:.0%} of its modelled cost, in "
            f"{_micro_batches(chosen)} per update and rank instead of {reference.micro_batches}"
        )
    elif chosen is reference:
        reasons.append("no other layout would save enough to notice, and every architecture takes this one")
    other = modelled.get("padding_free")
    if world_size > 1 and chosen.strategy == "balanced" and other is not None and other.cost > chosen.cost:
        waiting = 1 - chosen.cost / other.cost
        reasons.append(
            f"on {world_size} ranks it saves {waiting:.0%} of the time that unbalanced ranks wait for the slowest"
        )
    reasons.append("every update sees the same examples as with plain padding, so the loss stays the same")
    packer = modelled.get(PACKER)
    if packer is not None:
        low, mean, high = packer.examples
        difference = packer.cost / chosen.cost - 1
        saved = f"would save another {-difference:.0%}" if difference < -TIE else "would save nothing"
        sizes = f"{low:,} examples" if low == high else f"{low:,} to {high:,} examples (mean {mean:,.0f})"
        usual = f"{chosen.examples[1]:,.1f}".removesuffix(".0")
        updates = f"{packer.updates:,} update{'' if packer.updates == 1 else 's'}"
        reasons.append(
            f"packing the whole epoch ({PACKER}) {saved}, in {updates} of {sizes} "
            f"instead of {chosen.updates:,} of {usual}"
        )
    return reasons


def _micro_batches(modelled: Modelled) -> str:
    return f"{modelled.micro_batches} micro-batch{'' if modelled.micro_batches == 1 else 'es'}"
