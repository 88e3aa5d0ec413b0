"""The ranks of a run: what they have measured together, and how long they wait for each other.

Under DDP the ranks of an update meet once, when its gradients are averaged: a rank that is done before the others waits in
its last backward pass. How long is measured without a collective of its own:

    rank 0  | data | forward backward forward backward |                          reduce | optimizer |
    rank 1  | data | forward backward forward backward forward backward forward | reduce | optimizer |
            ^ all begin together                       ^ rank 0 arrives, waits   ^ rank 1 arrives

A communication hook of DDP (`register_comm_hook`, PyTorch's own) notes when the last bucket of gradients is ready and goes
on as `allreduce_hook` does, which is what DDP does without one. The ranks are processes of one host and share its clock, so
that `last arrival - own arrival` is the waiting, and the transport of the gradients is not part of it.

Waiting of a rank that another engine than DDP runs is not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from packtrain.compare.results import End, Update

T = TypeVar("T")
Arrival = float | None  # seconds on the host's clock; None: not known
TOTALS = ("micro_batches", "real_tokens", "computed_tokens", "supervised_tokens", "examples", "flops")
MEANS = ("data_seconds", "forward_seconds", "backward_seconds", "optimizer_seconds")
MOST = ("peak_memory", "memory_before", "startup_seconds")


def count_ranks() -> int:
    """Return how many ranks take part, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def meet() -> None:
    """Wait for all ranks; collective, and nothing for one."""
    if count_ranks() > 1:
        dist.barrier()


def gathered(own: T) -> list[T]:
    """Return what each rank has, in their order, on every rank; collective."""
    if count_ranks() == 1:
        return [own]
    values: list[Any] = [None] * count_ranks()
    dist.all_gather_object(values, own)
    return values


def summed(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return `values` summed over ranks, on the CPU; collective on `device`."""
    if count_ranks() == 1:
        return values.cpu()
    values = values.to(device, copy=True)
    dist.all_reduce(values)
    return values.cpu()


def note_arrival(recorder, bucket):  # DDP refuses annotations that are text, as they are in this file
    """Tell a recorder that a bucket of gradients is ready, and average it; a communication hook of DDP."""
    recorder.arrive()  # the last bucket's call stands
    group = dist.group.WORLD
    assert group is not None, "a bucket without a process group"
    return allreduce_hook(group, bucket)


def merge_updates(parts: Sequence[tuple[Update, Arrival]]) -> Update:
    """Make one record of an update from those of its ranks, and when each arrived where they meet.

    Tokens, examples and FLOPs are summed. The loss is the mean: that of a rank is divided by the tokens of all of them and
    multiplied by their number, as DDP averages gradients. `seconds` are those of the slowest rank; phases and waiting are
    means over ranks, and the waiting is taken out of the backward pass.

    Args:
        parts: in the order of ranks; the updates with the same number, without a `grad_norm` yet.
    """
    updates, arrivals = [update for update, _ in parts], [arrival for _, arrival in parts]
    first, ranks = updates[0], len(updates)
    if ranks == 1:
        return first
    known = [arrival for arrival in arrivals if arrival is not None]
    waiting = sum(max(known) - arrival for arrival in known) / ranks if len(known) == ranks else None
    means = {field: sum(getattr(update, field) for update in updates) / ranks for field in MEANS}
    means["backward_seconds"] = max(0.0, means["backward_seconds"] - (waiting or 0.0))
    return replace(
        first,
        seconds=max(update.seconds for update in updates),
        waiting_seconds=None if waiting is None else round(waiting, 6),
        loss=sum(update.loss for update in updates) / ranks,
        **{field: round(mean, 6) for field, mean in means.items()},
        **{field: _total([getattr(update, field) for update in updates]) for field in TOTALS},
    )


def _total(values: list[Any]) -> Any:
    return None if None in values else sum(values)


def merge_ends(ends: Sequence[End]) -> End:
    """Make one end of those of all ranks: memory and start-up of the rank with most of it, and the layout of all.

    Micro-batch number `m * ranks + r` of the layout is that of rank r in micro-step m.
    """
    layouts = [end.layout for end in ends]
    layout = [part for parts in zip(*layouts, strict=True) for part in parts] if None not in layouts else None
    return replace(ends[0], layout=layout, **{field: max(getattr(end, field) for end in ends) for field in MOST})
