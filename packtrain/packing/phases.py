"""A schedule of lengths: the first epoch begins with short examples, more of them in an update.

    examples_per_step 64, mean length 220: 14,000 tokens an update
    schedule [{until: 0.2, max_length: 128}, {until: 0.5, max_length: 256}]

    first epoch      0 ... 0.2          0.2 ... 0.5       0.5 ... 1           then as without a schedule
    examples of      at most 128        at most 256       what is left
    an update of     160 = 14,000       82 = 14,000       45 = 14,000         64 = 14,000 tokens on average

A phase takes a random choice of the examples that are short enough and that no earlier phase had, and what comes after the
last one is everything that is left. So every example of the epoch is seen once and
whole: no token is truncated, and the epoch's FLOPs are those without a schedule, only later. What there is to gain is a
gentler start, and less padding in padded layouts.

The number of examples of an update is a constant of its phase, chosen so that the mean of its tokens stays the same. A loss
that is a mean over supervised tokens is then a mean over about as many of them in all phases, and the learning rate need not
follow; one that is a mean over examples (preferences, classes) is over more of them in the phases of short ones, each of
which counts less there. Updates of one phase are alike in length, so that their gradients are of less mixed examples.

Sources: batches and shapes that change at constant cost, Multigrid training (Wu et al. 2020,
https://arxiv.org/abs/1912.00998); sequence length warm-up (Li, Zhang and He 2022, https://arxiv.org/abs/2108.06084), which
truncates. Here nothing is, as fine-tuning has examples and no stream of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from packtrain.errors import PlanError
from packtrain.packing.lengths import histogram
from packtrain.packing.shuffle import shuffled


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Consecutive updates of an epoch with as many examples each; the last one may have fewer.

    Attributes:
        examples: of all its updates.
        per_step: of one update.
        longest: most tokens of an example; None for any.
    """

    examples: int
    per_step: int
    longest: int | None = None

    @property
    def updates(self) -> int:
        return -(-self.examples // self.per_step)


def contradictions_of(schedule: Sequence[tuple[float, int]]) -> Iterator[tuple[str, str, str]]:
    """Yields (place, what is wrong, fix) of phases that do not follow each other; a place is `1.until`."""
    before, shorter = 0.0, 0
    for number, (until, longest) in enumerate(schedule):
        if not before < until < 1:
            what = "must be a share of the first epoch above that of the phase before, and below 1"
            fix = "name the phases in their order; what is left of the epoch follows the last one by itself"
            yield f"{number}.until", what, fix
        if longest <= shorter:
            what = f"must be above that of the phase before ({shorter}): short examples come first"
            yield f"{number}.max_length", what, "name the phases from the shortest examples to the longest"
        before, shorter = until, longest


def plan_phases(
    lengths: np.ndarray, schedule: Sequence[tuple[float, int]], *, examples_per_step: int
) -> tuple[Phase, ...]:
    """Plans the phases of the first epoch; of their updates all but the last of all are full.

    Args:
        lengths: tokens of each example, int `[n]`.
        schedule: (share of the epoch's tokens at which it ends, most tokens of an example) of each phase but the last.
        examples_per_step: of an update without a schedule, whose mean tokens all phases have.

    Raises:
        PlanError: phases that do not follow each other, or more examples of a phase than there are.

    >>> plan_phases(np.array([2] * 30 + [6] * 10), [(0.3, 2)], examples_per_step=4)
    (Phase(examples=18, per_step=6, longest=2), Phase(examples=22, per_step=3, longest=None))
    """
    for place, what, fix in contradictions_of(schedule):
        raise PlanError(what, key=f"batching.schedule.{place}", fix=fix)
    counts = histogram(lengths)
    total, by_length = len(lengths), counts * np.arange(len(counts))
    tokens_per_step, updates_of_epoch = examples_per_step * by_length.sum() / total, total / examples_per_step
    left, tokens = counts.astype(np.float64), by_length.astype(np.float64)  # expected, of each length
    taken, before, phases = 0, 0.0, []
    for number, (until, longest) in enumerate(schedule):
        short = slice(0, longest + 1)
        there = int(counts[short].sum()) - taken  # exact: earlier phases took from these lengths only
        mean = tokens[short].sum() / left[short].sum() if there else float(longest)
        per_step = max(1, round(tokens_per_step / mean))
        updates = max(1, round((until - before) * updates_of_epoch))
        if (examples := updates * per_step) > there:
            most = int(100 * (before + there // per_step / updates_of_epoch)) / 100
            fix = f"set it to at most {most:g}, or raise" if most > before else "raise"
            raise PlanError(
                f"takes {examples:,} examples of at most {longest} tokens, and {there:,} are left for it",
                key=f"batching.schedule.{number}.until",
                value=until,
                fix=f"{fix} `batching.schedule.{number}.max_length`",
            )
        phases.append(Phase(examples=examples, per_step=per_step, longest=longest))
        share = 1 - examples / there
        left[short] *= share
        tokens[short] *= share
        taken, before = taken + examples, until
    if rest := total - taken:
        per_step = max(1, round(tokens_per_step * left.sum() / tokens.sum()))
        phases.append(Phase(examples=rest, per_step=per_step))
    return tuple(phases)


def order_by_phase(lengths: np.ndarray, phases: Sequence[Phase], *, seed: int, purpose: int) -> np.ndarray:
    """Returns the ids of the first epoch, phase after phase, int64 `[n]`.

    Every phase shuffles what is left anew: in the order of one shuffle, a phase would find its first examples where the one
    before has taken the short ones away.

    Args:
        purpose: of the first phase's shuffle; the others have the numbers after it.

    >>> lengths = np.array([9, 1, 9, 1, 1, 9])
    >>> phases = [Phase(examples=2, per_step=2, longest=1), Phase(examples=4, per_step=1)]
    >>> ids = order_by_phase(lengths, phases, seed=0, purpose=3)
    >>> lengths[ids].tolist(), sorted(ids.tolist())
    ([1, 1, 1, 9, 9, 9], [0, 1, 2, 3, 4, 5])
    """
    left, parts = np.arange(len(lengths)), []
    for number, phase in enumerate(phases):
        left = left[shuffled(len(left), seed=seed, purpose=purpose + number)]
        fits = np.arange(len(left)) if phase.longest is None else np.flatnonzero(lengths[left] <= phase.longest)
        parts.append(left[fits[: phase.examples]])
        left = np.delete(left, fits[: phase.examples])
    return np.concatenate(parts)
