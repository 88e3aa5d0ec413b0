"""The plan: for every step, the micro-batches of every rank; a pure function of (lengths, strategy, seed, step).

    plan = make_plan(lengths, strategy="balanced", seed=0, examples_per_step=64, max_tokens=16384, world_size=2)
    plan.examples(step=1000)                 # ids of the examples that update 1000 sees, whatever the world size
    plan.micro_batches(step=1000, rank=1)    # what rank 1 computes for it

Nothing is stored per step and no random state exists: any rank asks for any step, in any order, at once. So the step
number is the whole state of the data, and a run resumes by asking for the next step.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np

from packtrain.errors import PlanError
from packtrain.packing.accumulation import first_misfit, smallest_accumulation
from packtrain.packing.cost import Cost
from packtrain.packing.lengths import MOST_EPOCHS, check_lengths, chunks
from packtrain.packing.phases import plan_phases
from packtrain.packing.scopes import EpochScope, MicroBatch, StepScope, check_rank
from packtrain.packing.shapes import Shapes, least_padding, size_of
from packtrain.packing.strategies import resolve_strategy
from packtrain.recipe.sections import EXAMPLES_PER_STEP, MAX_TOKENS, BatchingSection, Schedule

__all__ = ["AnyPlan", "MicroBatch", "Plan", "make_plan", "plan_evaluation", "plan_run"]

SHAPED_STEPS = 1024  # updates that shapes are found from; of a longer run, so many of them evenly spaced
EVALUATION = {"flat": "balanced", "padded": "group_by_length"}  # layout -> strategy that lays held-out examples out


class AnyPlan(Protocol):
    """What training asks of a plan: of a `Plan`, or of one whose rows are read while it trains (`StreamedPlan`)."""

    @property
    def strategy(self) -> str: ...

    @property
    def layout(self) -> Literal["padded", "flat"]: ...

    @property
    def world_size(self) -> int: ...

    @property
    def gradient_accumulation_steps(self) -> int: ...

    @property
    def total_steps(self) -> int: ...

    @property
    def scope(self) -> StepScope | EpochScope: ...

    @property
    def shapes(self) -> Shapes | None: ...

    @property
    def hash(self) -> str: ...

    @property
    def num_passes(self) -> int: ...

    @property
    def num_examples(self) -> int | None: ...

    def steps_in_pass(self, number: int, /) -> int: ...

    def stretches(self, step: int, /) -> Iterator[tuple[int, range]]: ...

    def sampled_steps(self, number: int, /) -> list[int]: ...

    def locate(self, step: int, /) -> tuple[int, int]: ...

    def layout_of(self, step: int, /) -> list[MicroBatch]: ...

    def micro_batches(self, step: int, rank: int) -> list[MicroBatch]: ...

    def epochs_after(self, steps: int, /) -> float: ...

    def examples_after(self, steps: int, /) -> int: ...

    def count_examples(self, steps: int, /) -> int: ...

    def figures_after(self, steps: int, /) -> dict[str, int]: ...

    def state_after(self, steps: int, /) -> dict[str, Any]: ...

    def go_on_from(self, state: Mapping[str, Any], /) -> None: ...

    def said_before(self, step: int, /) -> str | None: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """The micro-batches of every step and rank; built by `make_plan`.

    Attributes:
        strategy: its name.
        layout: "padded" or "flat".
        world_size: ranks.
        gradient_accumulation_steps: micro-batches of a rank in every step.
        total_steps: updates of the whole run.
        num_epochs: epochs begun by the run.
        scope: which examples a step sees and how they are laid out.
        most_shapes: numbers of tokens that a flat micro-batch may have; None for any.
    """

    strategy: str
    layout: Literal["padded", "flat"]
    world_size: int
    gradient_accumulation_steps: int
    total_steps: int
    epoch_starts: tuple[int, ...]
    scope: StepScope | EpochScope
    most_shapes: int | None = None

    @cached_property
    def shapes(self) -> Shapes | None:
        """The shapes that micro-batches are padded to, found when they are first asked for; None where there are none."""
        if self.most_shapes is None:
            return None
        steps = self.sampled_steps(SHAPED_STEPS)
        capacity, every = self.scope.max_tokens, len(steps) == self.total_steps
        sizes = [size_of(part.lengths) for step in steps for part in self._lay_out(step)]
        tokens = least_padding(np.array(sizes), self.most_shapes, max(sizes) if every else capacity)
        aimed = [part.lengths for step in steps for part in self._lay_out(step, tokens)]
        return Shapes.of(aimed, tokens, longest=0 if every else min(int(self.lengths.max()), capacity))

    @property
    def num_epochs(self) -> int:
        return self.locate(self.total_steps - 1)[0] + 1

    @property
    def lengths(self) -> np.ndarray:
        return self.scope.lengths

    def steps_in_epoch(self, epoch: int) -> int:
        """Counts the updates of a complete epoch (the run's last epoch may end earlier)."""
        return self.scope.steps_in_epoch(epoch)

    def locate(self, step: int) -> tuple[int, int]:
        """Returns (epoch, index within the epoch) of an update of the run."""
        if not 0 <= step < self.total_steps:
            raise IndexError(f"step {step} is out of range for a run of {self.total_steps} steps")
        epoch = bisect_right(self.epoch_starts, step) - 1
        return epoch, step - self.epoch_starts[epoch]

    def sampled_steps(self, number: int) -> list[int]:
        """Returns at most so many steps, evenly spaced over the run, to be looked at instead of all."""
        number = min(number, self.total_steps)
        return np.unique(np.linspace(0, self.total_steps - 1, number).round().astype(np.int64)).tolist()

    def stretches(self, step: int) -> Iterator[tuple[int, range]]:
        """Yields what a loader reads in one go from a step on, (epoch, steps): the rest of its epoch; nothing at the end."""
        if step < self.total_steps:
            epoch, index = self.locate(step)
            yield epoch, range(step, min(step + self.steps_in_epoch(epoch) - index, self.total_steps))

    def steps_in_pass(self, number: int) -> int:
        """Counts the updates of a loader's pass of that number: of an epoch."""
        return self.steps_in_epoch(number)

    @property
    def num_passes(self) -> int:
        return self.num_epochs

    def epochs_after(self, steps: int) -> float:
        """Returns how many epochs the first `steps` updates are, at least one of them."""
        epoch, index = self.locate(steps - 1)
        return epoch + (index + 1) / self.steps_in_epoch(epoch)

    def examples_after(self, steps: int) -> int:
        """Counts the examples of an epoch, however many updates are made."""
        return len(self.lengths)

    @property
    def num_examples(self) -> int:
        return len(self.lengths)

    def figures_after(self, steps: int) -> dict[str, int]:
        """Returns what the plan adds to the logs: nothing."""
        return {}

    def state_after(self, steps: int) -> dict[str, Any]:
        """Returns what a checkpoint keeps of the plan, next to the number of updates: nothing."""
        return {}

    def go_on_from(self, state: Mapping[str, Any]) -> None:
        """Takes what a checkpoint has kept; any step can be asked for without it."""

    def said_before(self, step: int) -> str | None:
        """Returns what people should know before a step: nothing."""
        return None

    def examples(self, step: int) -> np.ndarray:
        """Returns the ids of the examples that an update sees: int64, each once, whatever the world size."""
        return self.scope.examples(*self.locate(step))

    def count_examples(self, steps: int) -> int:
        """Counts the examples that the first updates of the run see; every epoch counts its own."""
        if steps == 0:
            return 0
        epoch, index = self.locate(steps - 1)
        return epoch * len(self.lengths) + self.scope.count_examples(epoch, index + 1)

    def layout_of(self, step: int) -> list[MicroBatch]:
        """Returns all micro-batches of an update: number `m * world_size + r` is that of rank r in micro-step m."""
        return self._lay_out(step, () if self.shapes is None else self.shapes.tokens)

    def _lay_out(self, step: int, sizes: tuple[int, ...] = ()) -> list[MicroBatch]:
        return self.scope.micro_batches(*self.locate(step), self.gradient_accumulation_steps, self.world_size, sizes)

    def micro_batches(self, step: int, rank: int) -> list[MicroBatch]:
        """Returns what one rank computes for an update: `gradient_accumulation_steps` micro-batches, maybe padding only."""
        check_rank(rank, self.world_size)
        return self.layout_of(step)[rank :: self.world_size]

    @cached_property
    def hash(self) -> str:
        """sha256 of what defines the examples of each step: lengths, seed, and the scope's rule.

        World size and layout are left out where they don't matter: a run may resume on another number of ranks, or
        with another step-scope strategy, and see the same examples in the same steps.
        """
        digest = hashlib.sha256(repr((1, len(self.lengths), *self.scope.identity())).encode())
        for _, chunk in chunks(self.lengths):
            digest.update(chunk.astype("<i4").tobytes())
        return digest.hexdigest()


def make_plan(
    lengths: Sequence[int] | np.ndarray,
    *,
    strategy: str = "balanced",
    seed: int = 0,
    examples_per_step: int = EXAMPLES_PER_STEP,
    max_tokens: int = MAX_TOKENS,
    max_length: int | None = None,
    world_size: int = 1,
    gradient_accumulation_steps: int | Literal["auto"] = "auto",
    tokens_per_step: int | None = None,
    max_documents: int | None = None,
    num_epochs: float = 1.0,
    max_steps: int = -1,
    cost: Cost | None = None,
    equal_lengths: bool = False,
    shapes: int | None = None,
    schedule: Sequence[tuple[float, int]] | None = None,
) -> Plan:
    """Plans a run.

    Args:
        lengths: tokens of each example, integers `[n]`; may be memory-mapped.
        strategy: a key of `STRATEGIES`, or `my_package.my_module:function`.
        seed: of every shuffle.
        examples_per_step: examples of an update over all ranks. Step scope: exactly (the last update of an epoch
            sees the rest). Epoch scope: on average, unless one of the next two settles the packs of an update.
        max_tokens: most tokens in one micro-batch; of a padded layout, rows x width.
        max_length: the width of `pad_max`; None for the longest example.
        world_size: ranks.
        gradient_accumulation_steps: "auto" for the smallest with which every micro-batch of every step fits.
            Epoch scope: a number means updates of that many packs per rank.
        tokens_per_step: epoch scope only: updates of `ceil(tokens_per_step / max_tokens)` packs.
        max_documents: epoch scope only: most documents in a pack.
        num_epochs: may be fractional.
        max_steps: updates of the run; overrides `num_epochs` when positive.
        cost: what a document costs, for the balance; None counts tokens.
        equal_lengths: every document of an update is planned as long as the update's longest; whoever gathers it
            pads it (the tails of diffusion models). Step scope only.
        shapes: flat layouts only: pads every micro-batch up to one of so many numbers of tokens (see `Shapes`).
        schedule: step scope only: pairs (until, max_length). The first epoch has examples of at most `max_length` tokens
            until that share of its tokens, more of them in an update, so that its tokens stay the same on average; what
            is left of the epoch comes after the last pair (see `phases`).

    Raises:
        PlanError: what can't be planned, with the key and the fix.
    """
    lengths = check_lengths(lengths)
    rule = resolve_strategy(strategy)
    positive = {"examples_per_step": examples_per_step, "max_tokens": max_tokens, "world_size": world_size}
    optional = {
        "max_length": max_length, "tokens_per_step": tokens_per_step, "max_documents": max_documents, "shapes": shapes,
    }  # fmt: skip
    if gradient_accumulation_steps != "auto":
        positive["gradient_accumulation_steps"] = gradient_accumulation_steps
    for key, value in positive.items() | {item for item in optional.items() if item[1] is not None}:
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise PlanError("must be a positive integer", key=key, value=value)
    for key, value in {"seed": seed, "max_steps": max_steps}.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise PlanError("must be an integer", key=key, value=value)
    number = not isinstance(num_epochs, bool) and isinstance(num_epochs, int | float | np.number)
    if max_steps <= 0 and not (number and math.isfinite(num_epochs) and num_epochs > 0):
        raise PlanError("must be a positive number", key="num_epochs", value=num_epochs)
    if rule.scope == "step" and tokens_per_step is not None:
        raise PlanError(
            f"cannot be set for {strategy!r}, which counts the examples of an update, not its tokens",
            key="batching.tokens_per_step",
            value=tokens_per_step,
            fix="set examples_per_step, or choose a strategy that packs the whole epoch (bfd, optimal, ...)",
        )
    if rule.scope == "epoch" and schedule:
        raise PlanError(
            f"cannot be set for {strategy!r}, whose packs mix lengths over the whole epoch",
            key="batching.schedule",
            fix="leave it out, or choose a strategy that keeps the examples of each update (balanced, padding_free, ...)",
        )
    if max_documents is not None and "max_documents" not in inspect.signature(rule.function).parameters:
        raise PlanError(
            f"cannot be set for {strategy!r}, which has no limit on documents", key="max_documents", value=max_documents
        )
    if shapes is not None and rule.layout != "flat":
        what = f"cannot be set for {strategy!r}, whose micro-batches have rows; it is for flat layouts"
        raise PlanError(what, key="batching.shapes", value=shapes, fix="leave it out, or choose a flat strategy")
    if rule.scope == "epoch" and equal_lengths:
        raise PlanError(
            f"{strategy!r} packs the whole epoch, so an update has no longest document to pad to",
            key="objective.canvas",
            value="batch_max",
            fix="choose another canvas policy, or a strategy of step scope (balanced, pad_longest, ...)",
        )
    longest = _check_examples(lengths, max_tokens, max_length, rule)
    width = (max_length or longest) if rule.padded_to == "max_length" else longest
    cost = cost or Cost()
    common: dict[str, Any] = {
        "lengths": lengths,
        "strategy": rule,
        "name": strategy,
        "seed": int(seed),
        "max_tokens": max_tokens,
        "cost": cost,
    }

    if rule.scope == "step":
        phases = plan_phases(lengths, schedule, examples_per_step=examples_per_step) if schedule else ()
        common |= {"width": width, "equal_lengths": equal_lengths, "phases": phases}
        scope = StepScope(**common, examples_per_step=examples_per_step)
    else:
        if tokens_per_step is not None:
            packs_per_step = -(-tokens_per_step // max_tokens)
        elif gradient_accumulation_steps != "auto":
            packs_per_step = gradient_accumulation_steps * world_size
        else:
            packs_per_step = None  # from examples_per_step, once the packs are known
        common["max_documents"] = max_documents
        scope = EpochScope.of(**common, packs_per_step=packs_per_step, examples_per_step=examples_per_step)
    epoch_starts, total_steps = _schedule(scope, num_epochs, max_steps)

    if isinstance(scope, EpochScope):
        needed = -(-scope.packs_per_step // world_size)
        if gradient_accumulation_steps == "auto":
            gradient_accumulation_steps = needed
        elif gradient_accumulation_steps < needed:
            raise PlanError(
                f"an update of {tokens_per_step} tokens has {scope.packs_per_step} packs of {max_tokens}, {needed} per rank",
                key="gradient_accumulation_steps",
                value=gradient_accumulation_steps,
                fix="leave it 'auto', or lower tokens_per_step",
            )
    else:
        if gradient_accumulation_steps == "auto":
            gradient_accumulation_steps = smallest_accumulation(scope, steps=total_steps, ranks=world_size)
        elif misfit := first_misfit(scope, gradient_accumulation_steps, steps=total_steps, ranks=world_size):
            step, needed = misfit
            raise PlanError(
                f"step {step} needs {needed} micro-batches of {max_tokens} tokens per rank",
                key="gradient_accumulation_steps",
                value=gradient_accumulation_steps,
                fix="leave it 'auto', raise max_tokens, or lower examples_per_step",
            )
    return Plan(
        strategy=strategy,
        layout=rule.layout,
        world_size=world_size,
        gradient_accumulation_steps=int(gradient_accumulation_steps),
        total_steps=total_steps,
        epoch_starts=epoch_starts,
        scope=scope,
        most_shapes=shapes,
    )


def plan_run(
    batching: BatchingSection,
    schedule: Schedule,
    lengths: np.ndarray,
    *,
    max_length: int | None = None,
    world_size: int = 1,
    cost: Cost | None = None,
    equal_lengths: bool = False,
) -> Plan:
    """Plans a recipe's whole run over examples of these `lengths` (int, `[n]`); arguments as `make_plan`."""
    return make_plan(
        lengths,
        strategy=batching.strategy,
        examples_per_step=batching.examples_per_step,
        max_tokens=batching.max_tokens,
        tokens_per_step=batching.tokens_per_step,
        shapes=batching.shapes,
        schedule=[(phase.until, phase.max_length) for phase in batching.schedule or ()],
        max_length=max_length,
        world_size=world_size,
        cost=cost,
        equal_lengths=equal_lengths,
        **asdict(schedule),
    )


def plan_evaluation(
    batching: BatchingSection,
    lengths: np.ndarray,
    *,
    layout: str,
    max_length: int | None = None,
    world_size: int = 1,
    equal_lengths: bool = False,
) -> Plan:
    """Plans one epoch over held-out examples in the layout of training.

    It is one step, or with `equal_lengths` steps as long as in training, so that a long document lengthens those next to
    it only. Evaluation sums over the steps.
    """
    return make_plan(
        lengths,
        strategy=EVALUATION[layout],
        examples_per_step=batching.examples_per_step if equal_lengths else len(lengths),
        max_tokens=batching.max_tokens,
        max_length=max_length,
        world_size=world_size,
        equal_lengths=equal_lengths,
        shapes=batching.shapes if layout == "flat" else None,
    )


def _check_examples(lengths: np.ndarray, max_tokens: int, max_length: int | None, rule) -> int:
    """Returns the longest length, after checking that every example can be planned."""
    if len(lengths) == 0:
        raise PlanError(
            "there are no examples to plan", fix="check the data: every row was skipped, or the split is empty"
        )
    limit = max_tokens if not rule.splits else np.iinfo(np.int64).max
    key = "max_tokens"
    if rule.padded_to == "max_length" and max_length is not None and max_length < limit:
        limit, key = max_length, "max_length"
    longest = 0
    for start, chunk in chunks(lengths):
        longest = max(longest, int(chunk.max()))
        if longest > limit:
            first = int(np.flatnonzero(chunk > limit)[0])
            raise PlanError(
                f"example {start + first} has {chunk[first]} tokens, more than {key} = {limit}",
                key=f"batching.{key}" if key == "max_tokens" else f"data.{key}",
                fix=f"raise {key}, or lower data.max_length and choose data.overflow (truncate, drop or split)",
            )
        if chunk.min() == 0:
            raise PlanError(
                f"example {start + int(np.flatnonzero(chunk == 0)[0])} has no tokens",
                fix="drop empty examples (data.on_bad_row: skip)",
            )
    if rule.padded_to == "max_length" and max_length is not None and max_length > max_tokens:
        raise PlanError(
            f"one row padded to max_length = {max_length} is more than max_tokens",
            key="batching.max_tokens",
            value=max_tokens,
            fix=f"raise max_tokens to at least {max_length}, or lower data.max_length",
        )
    return longest


def _schedule(scope: StepScope | EpochScope, num_epochs: float, max_steps: int) -> tuple[tuple[int, ...], int]:
    """Returns (first step of each epoch begun, steps of the run), as transformers.Trainer counts them: `max_steps` when
    positive, else the whole epochs and the rounded-up part of the last."""
    if max_steps > 0 and max_steps > MOST_EPOCHS * scope.steps_in_epoch(0):
        what = f"is more than {MOST_EPOCHS:,} epochs of {scope.steps_in_epoch(0)} updates"
        raise PlanError(
            what, key="training.max_steps", value=max_steps, fix="set it to the number of updates that you want"
        )
    starts, steps, epoch = [], 0, 0
    while steps < max_steps if max_steps > 0 else epoch < num_epochs:
        starts.append(steps)
        in_epoch = scope.steps_in_epoch(epoch)
        steps += in_epoch if max_steps > 0 or epoch + 1 <= num_epochs else math.ceil((num_epochs - epoch) * in_epoch)
        epoch += 1
    return tuple(starts), min(steps, max_steps) if max_steps > 0 else steps
