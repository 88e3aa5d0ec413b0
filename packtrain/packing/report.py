"""What a plan does, in one row: the table of `packtrain plan`, and the balance figures of the benchmark.

    report = describe(make_plan(lengths, strategy="bfd", max_tokens=8192))
    print(report.padding_share, report.examples_per_update)

A plan of more than `SAMPLED_STEPS` updates is described from that many, evenly spaced; the report says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np

from packtrain.packing.accumulation import micro_batch_tokens
from packtrain.packing.plan import MicroBatch, Plan
from packtrain.packing.scopes import EMPTY_TOKENS, EpochScope, StepScope

SAMPLED_STEPS = 1000


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
        padding_share: share of the computed tokens that are padding, in [0, 1).
        tokens: real tokens computed.
        tokens_dropped: tokens that no update sees.
        examples_split: examples cut into pieces.
        largest_micro_batch: computed tokens.
        packs: packs of the first epoch, and
        bound: a proved lower bound on them; 0 where the strategy doesn't pack whole documents over the epoch.
        balance: mean over ranks of the modelled compute / what the slowest rank of each micro-step makes them wait for;
            1 is perfect. Costs by the plan's cost model.
        rank_balance: the same when ranks meet once per update (DDP), not in every micro-step (FSDP, ZeRO-3).
        token_balance: as `balance`, with tokens as the cost.
        attention_imbalance: the attention balance ratio (ABR) of Hierarchical Balance Packing (arXiv:2503.07680, section
            3.1, equation 2): sum over the N ranks of (A_max - A_i) / (N A_max), with A_i the sum of the squared lengths of
            rank i's documents (appendix D); a mean over micro-steps, 0 is even. Its communication ratio (CR, equation 3),
            the share of tokens exchanged for sequence parallelism, is 0 here, where no document is spread over ranks.
        notes: what a user should know before choosing this plan.
    """

    strategy: str
    updates: int
    gradient_accumulation_steps: int
    micro_batches: int
    sampled_updates: int
    examples_per_update: tuple[int, float, int]
    examples_per_update_std: float
    mean_length_spread: float
    padding_share: float
    tokens: int
    tokens_dropped: int
    examples_split: int
    largest_micro_batch: int
    packs: int
    bound: int
    balance: float
    rank_balance: float
    token_balance: float
    attention_imbalance: float
    notes: tuple[str, ...]

    def to_dict(self) -> dict:
        return asdict(self)


def describe(plan: Plan, *, sampled_steps: int = SAMPLED_STEPS) -> PlanReport:
    """Describes the updates of a plan, or `sampled_steps` of them spaced evenly."""
    number = min(sampled_steps, plan.total_steps)
    steps = np.array(plan.sampled_steps(number))
    strategy, width = plan.scope.strategy, getattr(plan.scope, "width", 0)
    empty = width if strategy.padded_to == "max_length" else EMPTY_TOKENS
    examples, real = [], []  # of each update
    computed = split = largest = 0
    balance, token_balance, idle = _Balance(), _Balance(), []
    for step in steps.tolist():
        micro_batches = plan.layout_of(step)
        examples.append(len(plan.examples(step)))
        split += sum(_first_pieces(part, plan.lengths) for part in micro_batches)
        lengths = [part.lengths for part in micro_batches]
        tokens = [micro_batch_tokens(own, strategy, width) for own in lengths]
        if plan.shapes is not None:
            tokens = [plan.shapes.round_up(size or EMPTY_TOKENS) for size in tokens]
        real.append(sum(int(own.sum()) for own in lengths))
        computed += sum(size or empty for size in tokens)
        largest = max(largest, *tokens)
        costs = [_micro_batch_cost(own, size, plan) for own, size in zip(lengths, tokens, strict=True)]
        balance.add(np.array(costs).reshape(-1, plan.world_size))
        token_balance.add(np.array(tokens, dtype=np.float64).reshape(-1, plan.world_size))
        attention = [_attention(own, size, plan) for own, size in zip(lengths, tokens, strict=True)]
        idle += _idle(np.array(attention).reshape(-1, plan.world_size))
    packs = plan.scope.packs(0) if isinstance(plan.scope, EpochScope) else []
    spread = _mean_length_spread(np.array(real), np.array(examples), plan.lengths)
    return PlanReport(
        strategy=plan.strategy,
        updates=plan.total_steps,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        micro_batches=plan.total_steps * plan.gradient_accumulation_steps * plan.world_size,
        sampled_updates=len(steps),
        examples_per_update=(min(examples), float(np.mean(examples)), max(examples)),
        examples_per_update_std=float(np.std(examples)),
        mean_length_spread=spread,
        padding_share=1 - sum(real) / computed,
        tokens=sum(real),
        tokens_dropped=0,
        examples_split=split,
        largest_micro_batch=largest,
        packs=len(packs),
        bound=getattr(packs, "bound", 0),
        balance=balance.busy / balance.waited,
        rank_balance=balance.busy / balance.waited_once,
        token_balance=token_balance.busy / token_balance.waited,
        attention_imbalance=float(np.mean(idle)) if idle else 0.0,
        notes=tuple(_notes(plan, spread)),
    )


@dataclass(frozen=True, kw_only=True)
class PhaseReport:
    """One phase of a first epoch with a schedule.

    Attributes:
        until: share of the epoch's tokens at its end.
        longest: tokens of its longest example.
        examples: how many it has, and
        examples_per_update: in one update; the last may have fewer.
        tokens_per_update: (min, mean, max) of its full updates, or of its only one.
        updates: of the phase.
    """

    until: float
    longest: int
    examples: int
    examples_per_update: int
    tokens_per_update: tuple[int, float, int]
    updates: int


def describe_phases(plan: Plan) -> list[PhaseReport]:
    """Describes the phases of a plan's first epoch, all their updates looked at; none without a schedule."""
    scope, found, done = plan.scope, [], 0
    if not isinstance(scope, StepScope) or not scope.phases:
        return []
    lengths = np.asarray(plan.lengths[scope.ids(0, 0, len(plan.lengths))], dtype=np.int64)  # in the epoch's order
    for phase in scope.phases:
        own = lengths[done : done + phase.examples]
        done += phase.examples
        tokens = np.add.reduceat(own, np.arange(0, len(own), phase.per_step))
        full = tokens[: max(1, phase.examples // phase.per_step)]
        report = PhaseReport(
            until=float(lengths[:done].sum() / lengths.sum()),
            longest=int(own.max()),
            examples=phase.examples,
            examples_per_update=min(phase.per_step, phase.examples),
            tokens_per_update=(int(full.min()), float(full.mean()), int(full.max())),
            updates=phase.updates,
        )
        found.append(report)
    return found


def _first_pieces(part: MicroBatch, lengths: np.ndarray) -> int:
    """Counts the examples of which a micro-batch holds the beginning and not the end; each cut example has one beginning."""
    return int(np.count_nonzero((part.starts == 0) & (part.stops < lengths[part.example_ids])))


def _notes(plan: Plan, spread: float) -> Iterator[str]:
    if (shapes := plan.shapes) is not None:
        sizes = ", ".join(f"{size:,}" for size in shapes.tokens)
        yield f"micro-batches are padded to {sizes} tokens: {shapes.padding_share:.1%} padding"
    if plan.scope.strategy.pack_order == "cost":
        yield (
            "ranks are balanced, but their updates are not mixed as by a shuffle: "
            f"the mean length of an update varies {spread:.1f} times as much"
        )
    if isinstance(plan.scope, EpochScope) and plan.scope.packs_per_step < plan.world_size:
        packs, ranks = plan.scope.packs_per_step, plan.world_size
        yield (
            f"an update is {packs} pack{'s' * (packs > 1)} of {plan.scope.max_tokens} tokens, fewer than the {ranks} ranks: "
            "the others idle; lower max_tokens or raise examples_per_step"
        )


class _Balance:
    """Sums over updates of the mean rank's work, and of what the slowest ranks take."""

    def __init__(self):
        self.busy = self.waited = self.waited_once = 0.0

    def add(self, table: np.ndarray) -> None:
        """Adds an update: `table` is its work, `[micro-steps, ranks]`."""
        self.busy += float(table.mean(axis=1).sum())
        self.waited += float(table.max(axis=1).sum())
        self.waited_once += float(table.sum(axis=0).max())


def _micro_batch_cost(lengths: np.ndarray, tokens: int, plan: Plan) -> float:
    """Returns the modelled compute of a micro-batch; padded rows are computed at full width."""
    if plan.layout == "flat" or not len(lengths):
        return float(plan.scope.cost(lengths).sum())
    return float(len(lengths) * plan.scope.cost(tokens // len(lengths)))


def _attention(lengths: np.ndarray, tokens: int, plan: Plan) -> float:
    """Returns the sum of squared lengths that a micro-batch attends over; padded rows at full width."""
    if plan.layout == "flat" or not len(lengths):
        return float((lengths.astype(np.float64) ** 2).sum())
    return len(lengths) * float(tokens // len(lengths)) ** 2


def _idle(table: np.ndarray) -> list[float]:
    """Returns the share of each micro-step that its mean rank idles; `table` is work, `[micro-steps, ranks]`.

    The third micro-step is the example of the paper's section 3.1, packs of four documents of 1K and of two of 2K.

    >>> _idle(np.array([[4.0, 4.0], [4.0, 2.0], [4 * 1.0**2, 2 * 2.0**2], [0.0, 0.0]]))
    [0.0, 0.25, 0.25]
    """
    most = table.max(axis=1)
    return (1 - table.mean(axis=1)[most > 0] / most[most > 0]).tolist()


def _mean_length_spread(tokens: np.ndarray, examples: np.ndarray, lengths: np.ndarray) -> float:
    """Returns the root mean square, over updates, of (mean length - mean of all) in standard errors of a random update."""
    some = np.asarray(lengths[:: max(1, len(lengths) // 1_000_000)], dtype=np.float64)
    if some.std() == 0:
        return 1.0
    deviations = (tokens / examples - some.mean()) / (some.std() / np.sqrt(examples))
    return float(np.sqrt(np.mean(deviations**2)))
