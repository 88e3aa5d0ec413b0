"""The two ways of choosing what an update sees.

* `StepScope`: the next `examples_per_step` of the epoch's shuffle. The strategy only lays them out. The first epoch may
  have phases, the first ones of short examples and more of them (see `phases`).
* `EpochScope`: the whole epoch is packed, and an update is the next `packs_per_step` packs of their shuffle.
"""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from packtrain.errors import PlanError
from packtrain.packing.balance import into_micro_steps
from packtrain.packing.cost import Cost
from packtrain.packing.packs import ListedPacks, PatternPacks
from packtrain.packing.phases import Phase, order_by_phase
from packtrain.packing.shuffle import derive_key, permute, shuffled
from packtrain.packing.strategies import Strategy

EXAMPLES, PACKS, CHOICES, PHASES = 0, 1, 2, 3  # what a seeded shuffle is for
EMPTY_TOKENS = 2  # of a micro-batch without documents: the shortest one with something to predict, before any copies


@dataclass(frozen=True, kw_only=True, eq=False)
class MicroBatch:
    """The input of one forward pass of one rank; without documents it is padding only.

    Attributes:
        example_ids: int64 `[S]`.
        starts, stops: int64 `[S]`, the piece of each example (all of it, unless the strategy splits examples).
    """

    example_ids: np.ndarray
    starts: np.ndarray
    stops: np.ndarray

    def __len__(self) -> int:
        return len(self.example_ids)

    @property
    def lengths(self) -> np.ndarray:
        return self.stops - self.starts


def check_rank(rank: int, world_size: int) -> None:
    """Raises PlanError unless there is such a rank."""
    if isinstance(rank, bool) or not isinstance(rank, int | np.integer) or not 0 <= rank < world_size:
        ranks = f"{world_size} rank{'s' if world_size > 1 else ''}"
        fix = "give make_plan the number of ranks as world_size; ranks count from 0"
        raise PlanError(f"is not one of this plan's {ranks}", key="rank", value=rank, fix=fix)


@dataclass(frozen=True, kw_only=True, eq=False)
class StepScope:
    """An update is the next `examples_per_step` of the shuffle; `width` is the width of `pad_max`.

    With `equal_lengths` every document of an update is as long as its longest (see `make_plan`). `phases` are those of
    the first epoch, if there are any; then that epoch's order is held, int64 `[n]`.
    """

    lengths: np.ndarray
    strategy: Strategy
    name: str
    seed: int
    max_tokens: int
    cost: Cost
    examples_per_step: int
    width: int
    equal_lengths: bool = False
    phases: tuple[Phase, ...] = ()

    def phases_of(self, epoch: int) -> tuple[Phase, ...]:
        """Returns the phases of an epoch: one, but for a first epoch with a schedule."""
        alike = Phase(examples=len(self.lengths), per_step=self.examples_per_step)
        return self.phases if self.phases and epoch == 0 else (alike,)

    def steps_in_epoch(self, epoch: int) -> int:
        return sum(phase.updates for phase in self.phases_of(epoch))

    def count_examples(self, epoch: int, updates: int) -> int:
        """Counts the examples of the first updates of an epoch."""
        seen = 0
        for phase in self.phases_of(epoch):
            seen += min(min(updates, phase.updates) * phase.per_step, phase.examples)
            updates -= min(updates, phase.updates)
        return seen

    def examples(self, epoch: int, index: int) -> np.ndarray:
        begin = 0
        for phase in self.phases_of(epoch):
            if index < phase.updates:
                break
            index, begin = index - phase.updates, begin + phase.examples
        start, end = begin + index * phase.per_step, begin + phase.examples
        return self.ids(epoch, start, min(start + phase.per_step, end))

    def ids(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Returns positions `start..stop` of an epoch's order: int64 `[stop - start]`."""
        if self.phases and epoch == 0:
            return self._first_order[start:stop]
        return shuffled(len(self.lengths), seed=self.seed, epoch=epoch, purpose=EXAMPLES, start=start, stop=stop)

    @cached_property
    def _first_order(self) -> np.ndarray:
        return order_by_phase(self.lengths, self.phases, seed=self.seed, purpose=PHASES)

    def micro_batches(
        self, epoch: int, index: int, micro_steps: int, ranks: int, sizes: tuple[int, ...] = ()
    ) -> list[MicroBatch]:
        ids = self.examples(epoch, index)
        aimed = {"sizes": sizes} if sizes and "sizes" in inspect.signature(self.strategy.function).parameters else {}
        lengths = np.asarray(self.lengths[ids], dtype=np.int64)
        if self.equal_lengths:
            lengths = np.full_like(lengths, lengths.max())
        parts = self.strategy.function(
            lengths, micro_steps=micro_steps, ranks=ranks, capacity=self.max_tokens, cost=self.cost, **aimed
        )
        assert len(parts) == micro_steps * ranks, f"{self.name}: {len(parts)} micro-batches"
        return [
            MicroBatch(example_ids=ids[part], starts=np.zeros(len(part), np.int64), stops=lengths[part])
            for part in parts
        ]

    def identity(self) -> tuple:
        more = ("equal lengths",) if self.equal_lengths else ()
        phases = [(phase.examples, phase.per_step, phase.longest) for phase in self.phases]
        return "step", self.seed, self.examples_per_step, *more, *phases


@dataclass(frozen=True, kw_only=True, eq=False)
class EpochScope:
    """An update is the next `packs_per_step` packs of the epoch, in shuffled order. One epoch's packs are held."""

    lengths: np.ndarray
    strategy: Strategy
    name: str
    seed: int
    max_tokens: int
    cost: Cost
    max_documents: int | None
    packs_per_step: int
    held: dict[int, ListedPacks | PatternPacks] = field(default_factory=dict, repr=False)
    counts: dict[int, int] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, *, packs_per_step: int | None, examples_per_step: int, **common) -> EpochScope:
        scope = cls(**common, packs_per_step=packs_per_step or 1)
        if packs_per_step is None:  # so that an update sees `examples_per_step` on average
            packs = scope.packs(0)
            packs_per_step = max(1, round(examples_per_step * len(packs) / len(scope.lengths)))
        return replace(scope, packs_per_step=packs_per_step)

    def packs(self, epoch: int) -> ListedPacks | PatternPacks:
        if epoch not in self.held:
            key = derive_key(self.seed, epoch, CHOICES)
            packs = next(iter(self.held.values()), None)
            if isinstance(packs, PatternPacks):  # the packing is that of every epoch, the examples in it are not
                packs = replace(packs, key=key)
            else:
                lengths = self.lengths
                if self.strategy.by_order:
                    lengths = lengths[self._order(epoch, np.arange(len(lengths)))]
                limit = {"max_documents": self.max_documents} if self.max_documents else {}
                packs = self.strategy.function(lengths, self.max_tokens, key, **limit)
            self.held.clear()
            self.held[epoch] = packs
            self.counts[epoch] = len(packs)
        return self.held[epoch]

    def steps_in_epoch(self, epoch: int) -> int:
        known = epoch if self.strategy.by_order else 0  # otherwise every epoch has the same number of packs
        if known not in self.counts:
            self.packs(known)
        return -(-self.counts[known] // self.packs_per_step)

    def count_examples(self, epoch: int, updates: int) -> int:
        """Counts the examples of the first updates of an epoch; one that is split counts once."""
        if updates == self.steps_in_epoch(epoch):
            return len(self.lengths)
        seen = (self.examples(epoch, index) for index in range(updates))
        return len(np.unique(np.concatenate([np.zeros(0, np.int64), *seen])))

    def examples(self, epoch: int, index: int) -> np.ndarray:
        ids = self._take(epoch, index)[0]
        return ids if ids.ndim == 1 else np.array(list(dict.fromkeys(ids[:, 0].tolist())), dtype=np.int64)

    def micro_batches(
        self, epoch: int, index: int, micro_steps: int, ranks: int, sizes: tuple[int, ...] = ()
    ) -> list[MicroBatch]:
        items, offsets = self._take(epoch, index)
        if items.ndim == 1:
            items = np.stack([items, np.zeros_like(items), self.lengths[items]], axis=1)
        packs = [
            MicroBatch(example_ids=pack[:, 0], starts=pack[:, 1], stops=pack[:, 2])
            for pack in np.split(items.astype(np.int64), offsets[1:-1])
        ]
        nothing = np.zeros(0, dtype=np.int64)
        packs += [MicroBatch(example_ids=nothing, starts=nothing, stops=nothing)] * (micro_steps * ranks - len(packs))
        return [packs[part] for part in into_micro_steps([self.cost(pack.lengths).sum() for pack in packs], ranks)]

    def identity(self) -> tuple:
        identity = ("epoch", self.name, self.seed, self.max_tokens, self.max_documents, self.packs_per_step)
        packs = self.packs(0)
        if isinstance(packs, PatternPacks):  # a solver of another version may find other packs
            identity += (hashlib.sha256(packs.patterns.slot_length.tobytes()).hexdigest(),)
        elif ":" in self.name:  # a function of the user's, which may have been changed
            identity += (hashlib.sha256(packs.items.tobytes() + packs.offsets.tobytes()).hexdigest(),)
        return identity

    def _take(self, epoch: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (items, offsets) of an update's packs; items are example ids `[m]`, or rows (id, start, stop)."""
        packs = self.packs(epoch)
        size, shuffle = self.packs_per_step, {"seed": self.seed, "epoch": epoch, "purpose": PACKS}
        if self.strategy.pack_order == "cost":  # neighbours in cost, the updates shuffled
            index = int(shuffled(self.steps_in_epoch(epoch), start=index, stop=index + 1, **shuffle)[0])
            assert isinstance(packs, PatternPacks), "listed packs have no order of cost"
            numbers = packs.by_cost(self.cost)[index * size : (index + 1) * size]
        else:
            numbers = shuffled(len(packs), start=index * size, stop=(index + 1) * size, **shuffle)
        items, offsets = packs.take(numbers)
        if self.strategy.by_order:
            items = items.copy()
            where = items if items.ndim == 1 else items[:, 0]
            where[:] = self._order(epoch, where)
        return items, offsets

    def _order(self, epoch: int, places: np.ndarray) -> np.ndarray:
        return permute(places, len(self.lengths), derive_key(self.seed, epoch, EXAMPLES))
