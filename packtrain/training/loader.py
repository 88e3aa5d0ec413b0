"""Plan -> data loader: `global_step` is the whole data state.

The loader keeps no position of its own. Every time a trainer starts an epoch it asks for the current
`global_step` and yields the micro-batches from there to the end of that epoch, so a resumed run and an
unbroken one read the same batches with nothing replayed and nothing skipped:

    epoch 0             | epoch 1             |
    s0 s1 s2 s3 s4 s5   | s6 s7 s8 s9 ...
                              ^ resumed at global_step 8: yields s8 s9 ... to the end of epoch 1

It is deliberately not passed through `accelerator.prepare`: the plan already deals micro-batches to ranks,
and accelerate's own sharding loses samples when batches vary in size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader

from packtrain.packing.collator import MicroBatches
from packtrain.packing.plan import Plan
from packtrain.packing.sampler import PlanSampler


class PlanLoader:
    """Iterable over the micro-batches of one rank, one epoch at a time.

    Args:
        plan: what every rank reads in every step.
        dataset: `MicroBatch -> batch`.
        rank: which rank's share to read.
        global_step: tells the updates done so far; asked at the start of every epoch.
        dataloader_kwargs: `num_workers`, `pin_memory`, `prefetch_factor`, `timeout` ... for torch's DataLoader.
    """

    def __init__(
        self,
        *,
        plan: Plan,
        dataset: MicroBatches,
        rank: int,
        global_step: Callable[[], int],
        dataloader_kwargs: dict[str, object] | None = None,
    ):
        self.plan, self.dataset, self.rank = plan, dataset, rank
        self.global_step = global_step
        self.dataloader_kwargs = dataloader_kwargs or {}

    def __len__(self) -> int:
        """Micro-batches of this rank in the first epoch (order-dependent packers vary a little after it)."""
        return self.plan.steps_in_epoch(0) * self.plan.gradient_accumulation_steps

    def __iter__(self) -> Iterator[dict[str, object]]:
        start = self.global_step()
        epoch, index = self.plan.locate(start)
        stop = min(start + self.plan.steps_in_epoch(epoch) - index, self.plan.total_steps)
        return iter(
            DataLoader(
                self.dataset.at_epoch(epoch),
                sampler=PlanSampler(self.plan, rank=self.rank, start_step=start, stop_step=stop),
                batch_size=None,
                generator=torch.Generator(),  # its own, or starting an iterator would advance the model's dropout
                **self.dataloader_kwargs,
            )
        )
