"""The plan of streamed rows: a step is the next `examples_per_step` examples, of blocks that are shuffled apart.

    block 0: updates 0-15      block 1: updates 16-31      ...      the end of an epoch: an update of what is left

Within a block an update is what a `Plan` makes of as many examples, by the same functions: the shuffle of block 0 is that
of an epoch, so rows that fit one block are trained as if they were not streamed. The shuffle of any block is a function
of seed, epoch and the block's number in it. What a block holds is known once it is read (`packtrain.data.blocks`), so
any step can be asked for, in any order and on any rank; the rows before it are read for that, or skipped where a
checkpoint says where a block begins.

No length is known beforehand but the longest that the data may have. So every update has as many micro-batches as always
suffice, were all its examples that long.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from packtrain.data.blocks import Block, Blocks, Start
from packtrain.errors import PlanError
from packtrain.packing.accumulation import fits
from packtrain.packing.cost import Cost
from packtrain.packing.plan import MicroBatch
from packtrain.packing.scopes import StepScope, check_rank
from packtrain.packing.shuffle import derive_key
from packtrain.packing.strategies import resolve_strategy
from packtrain.recipe.sections import BatchingSection, Schedule


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamedPlan:
    """The micro-batches of every step and rank of streamed rows; built by `plan_stream`. See `Plan`.

    Attributes:
        blocks: the examples, as they are read.
        scope: what an update of the first block sees and how it is laid out.
        enough: micro-batches of a rank with which every update fits.
    """

    strategy: str
    layout: Literal["padded", "flat"]
    world_size: int
    gradient_accumulation_steps: int
    total_steps: int
    blocks: Blocks
    scope: StepScope
    enough: int
    shapes: None = None
    num_examples: None = None
    num_passes: int = 1

    @property
    def lengths(self) -> np.ndarray:
        """Those of the first block."""
        return self.scope.lengths

    def steps_in_pass(self, number: int) -> int:
        """Counts the updates of the only pass of a loader: of the run."""
        return self.total_steps

    def stretches(self, step: int) -> Iterator[tuple[int, range]]:
        """Yields what a loader reads in one go from a step on, (epoch, steps): block after block, to the end of the run."""
        while step < self.total_steps:
            block = self.blocks.holding(step)
            if block.updates.stop < self.total_steps:
                self.blocks.read_ahead(block)
            steps = range(step, min(block.updates.stop, self.total_steps))
            yield block.start.epoch, steps
            step = steps.stop

    def sampled_steps(self, number: int) -> list[int]:
        """Returns at most so many steps of the first block, evenly spaced."""
        known = min(self.scope.steps_in_epoch(0), self.total_steps)
        return np.unique(np.linspace(0, known - 1, min(number, known)).round().astype(np.int64)).tolist()

    def locate(self, step: int) -> tuple[int, int]:
        """Returns (epoch, index within the epoch) of an update of the run."""
        start = self._block(step).start
        return start.epoch, step - start.epoch_update

    def examples(self, step: int) -> np.ndarray:
        """Returns the numbers of the examples that an update sees: int64, each once, whatever the world size."""
        block = self._block(step)
        return block.start.example + self._scope_of(block).examples(block.start.epoch, step - block.start.update)

    def layout_of(self, step: int) -> list[MicroBatch]:
        """Returns all micro-batches of an update: number `m * world_size + r` is that of rank r in micro-step m.

        Raises:
            PlanError: it needs more micro-batches than the recipe has set, which are fewer than always suffice.
        """
        block = self._block(step)
        scope, epoch, index = self._scope_of(block), block.start.epoch, step - block.start.update
        micro_steps = self.gradient_accumulation_steps
        if micro_steps < self.enough:
            lengths = np.asarray(scope.lengths[scope.examples(epoch, index)])[None]
            needed = next(n for n in range(1, self.enough + 1) if fits(scope, lengths, n, self.world_size).all())
            if needed > micro_steps:
                raise PlanError(
                    f"step {step} needs {needed} micro-batches of {scope.max_tokens} tokens per rank",
                    key="training.gradient_accumulation_steps",
                    value=micro_steps,
                    fix=f"continue with resume=True, allow_changes=True and a higher number; {self.enough} always suffice",
                )
        parts = scope.micro_batches(epoch, index, micro_steps, self.world_size)
        return [replace(part, example_ids=part.example_ids + block.start.example) for part in parts]

    def micro_batches(self, step: int, rank: int) -> list[MicroBatch]:
        """Returns what one rank computes for an update: `gradient_accumulation_steps` micro-batches, maybe padding only."""
        check_rank(rank, self.world_size)
        return self.layout_of(step)[rank :: self.world_size]

    def epochs_after(self, steps: int) -> float:
        """Returns how many epochs the first `steps` updates are; 0 in the first one, of which nobody knows the end."""
        start = self._block(steps - 1).start
        return start.epoch + (steps - start.epoch_update) / start.updates_in_epoch if start.updates_in_epoch else 0.0

    def examples_after(self, steps: int) -> int:
        """Counts the different examples that the first `steps` updates see."""
        block = self._block(steps - 1)
        return block.next.tally.examples if block.start.epoch else self.count_examples(steps)

    def count_examples(self, steps: int) -> int:
        """Counts the examples that the first `steps` updates see; every epoch counts its own."""
        block = self._block(steps - 1)
        seen = block.start.example + (steps - block.start.update) * self.scope.examples_per_step
        return min(seen, block.next.example)

    def figures_after(self, steps: int) -> dict[str, int]:
        """Returns what became of the rows so far, for the logs."""
        tally = self._block(steps - 1).next.tally
        lost = {"bad_rows": tally.bad_rows, "tokens_lost": tally.tokens_lost}
        return {"rows_read": tally.rows} | {name: count for name, count in lost.items() if count}

    def state_after(self, steps: int) -> dict[str, Any]:
        """Returns what a checkpoint keeps: where the block of its last update begins, and the hash of all rows so far."""
        return {"stream": self.blocks.state_after(steps)}

    def go_on_from(self, state: Mapping[str, Any]) -> None:
        """Takes what a checkpoint has kept, so that rows before its block are skipped."""
        if "stream" in state:
            self.blocks.go_on_from(Start.of(state["stream"]["start"]))

    def said_before(self, step: int) -> str | None:
        """Says where an epoch begins anew."""
        start = self._block(step).start
        if step != start.epoch_update or not start.epoch:
            return None
        return (
            f"the rows have ended after {start.tally.rows:,} of them, {start.tally.examples:,} examples: "
            f"epoch {start.epoch + 1} begins with update {step}"
        )

    @cached_property
    def hash(self) -> str:
        """sha256 of what defines the examples of each step but the rows themselves."""
        identity = (1, "streamed", self.blocks.size, *self.scope.identity())
        return hashlib.sha256(repr(identity).encode()).hexdigest()

    def _block(self, step: int) -> Block:
        if not 0 <= step < self.total_steps:
            raise IndexError(f"step {step} is out of range for a run of {self.total_steps} steps")
        return self.blocks.holding(step)

    def _scope_of(self, block: Block) -> StepScope:
        number, seed = block.start.block_in_epoch, self.scope.seed
        return replace(self.scope, lengths=block.examples.lengths, seed=derive_key(seed, number) if number else seed)


def plan_stream(
    batching: BatchingSection,
    schedule: Schedule,
    blocks: Blocks,
    *,
    max_length: int,
    world_size: int = 1,
    cost: Cost | None = None,
) -> StreamedPlan:
    """Plans a recipe's run over streamed rows; arguments as `plan_run`.

    Raises:
        PlanError: what can't be planned, with the key and the fix.
    """
    rule, enough = resolve_strategy(batching.strategy), always_enough_for(batching, max_length, world_size)
    scope = StepScope(
        lengths=blocks.first().examples.lengths,
        strategy=rule,
        name=batching.strategy,
        seed=schedule.seed,
        max_tokens=batching.max_tokens,
        cost=cost or Cost(),
        examples_per_step=batching.examples_per_step,
        width=max_length,
    )
    asked = schedule.gradient_accumulation_steps
    return StreamedPlan(
        strategy=batching.strategy,
        layout=rule.layout,
        world_size=world_size,
        gradient_accumulation_steps=enough if asked == "auto" else asked,
        total_steps=schedule.max_steps,
        blocks=blocks,
        scope=scope,
        enough=enough,
    )


def always_enough_for(batching: BatchingSection, max_length: int, world_size: int) -> int:
    """Returns the micro-batches of a rank with which an update fits although all its examples have `max_length` tokens."""
    return -(-batching.examples_per_step // (world_size * (batching.max_tokens // max_length)))
