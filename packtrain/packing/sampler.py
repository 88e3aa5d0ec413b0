"""From the plan to a torch DataLoader: the sampler yields micro-batches, the dataset gathers and collates them.

    loader = DataLoader(MicroBatches(examples, collator), sampler=PlanSampler(plan, rank=0), batch_size=None)

Every item of the loader is one finished micro-batch. Resuming is `start_step=global_step`; nothing is replayed.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import Sampler

from packtrain.packing.plan import MicroBatch, Plan


class PlanSampler(Sampler[MicroBatch]):
    """One rank's micro-batches of the updates `start_step..stop_step` of a plan, in order.

    Its length is a multiple of `plan.gradient_accumulation_steps` and the same on every rank.
    """

    def __init__(self, plan: Plan, rank: int = 0, start_step: int = 0, stop_step: int | None = None):
        assert 0 <= rank < plan.world_size, f"rank {rank} of {plan.world_size}"
        self.plan, self.rank = plan, rank
        self.steps = range(start_step, plan.total_steps if stop_step is None else min(stop_step, plan.total_steps))

    def __iter__(self) -> Iterator[MicroBatch]:
        for step in self.steps:
            yield from self.plan.micro_batches(step, self.rank)

    def __len__(self) -> int:
        return len(self.steps) * self.plan.gradient_accumulation_steps
