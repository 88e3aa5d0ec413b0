"""Plan -> data loader: `global_step` is the whole data state.

`PlanLoader` keeps no position. Every time a trainer starts an epoch it asks for the current
`global_step` and yields the micro-batches from there to the end of that epoch (of streamed rows, of the run), so a
resumed run and an unbroken one read the same batches with nothing replayed and nothing skipped:

    epoch 0             | epoch 1             |
    s0 s1 s2 s3 s4 s5   | s6 s7 s8 s9 ...
                              ^ resumed at global_step 8: yields s8 s9 ... to the end of epoch 1

It is deliberately not passed through `accelerator.prepare`: the plan already deals micro-batches to ranks,
and accelerate's own sharding loses samples when batches vary in size.

A worker process that is killed or hangs ends the run with a DataError; see `worker_failure`.

In any other training loop a sampler yields the micro-batches, and the dataset gathers and collates them:

    loader = DataLoader(MicroBatches(examples, collator), sampler=PlanSampler(plan, rank=0), batch_size=None)

Every item is one finished micro-batch; `start_step=global_step` resumes.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler
from transformers import TrainingArguments

from packtrain.errors import DataError
from packtrain.packing.plan import AnyPlan, MicroBatch
from packtrain.recipe.sections import WORKER_TIMEOUT

_DIED = "DataLoader worker was killed"


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
        plan: AnyPlan,
        dataset: Any,  # MicroBatches, or one that gives its batches on
        rank: int,
        global_step: Callable[[], int],
        dataloader_kwargs: dict[str, Any] | None = None,
    ):
        self.plan, self.dataset, self.rank = plan, dataset, rank
        self.global_step = global_step
        self.dataloader_kwargs = dataloader_kwargs or {}

    def __len__(self) -> int:
        """Counts the micro-batches of this rank in the first epoch (order-dependent packers vary a little after it)."""
        return self.plan.steps_in_pass(0) * self.plan.gradient_accumulation_steps

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for epoch, steps in self.plan.stretches(self.global_step()):
            batches = DataLoader(
                self.dataset.at_epoch(epoch),
                sampler=PlanSampler(self.plan, rank=self.rank, start_step=steps.start, stop_step=steps.stop),
                batch_size=None,
                generator=torch.Generator(),  # its own, or starting an iterator would advance the model's dropout
                **self.dataloader_kwargs,
            )
            try:
                yield from batches
            except (ConnectionError, EOFError) as error:
                if "Caught" in str(error):  # by a worker that is alive, in the data
                    raise
                raise RuntimeError(f"{_DIED} while its batch was on the way ({error})") from error


def loader_options(args: TrainingArguments, worker_timeout: int = WORKER_TIMEOUT) -> dict[str, Any]:
    """Returns what torch's DataLoader is given next to the plan: what TrainingArguments say, and what keeps workers safe.

    Args:
        worker_timeout: seconds to wait for a batch of a data-loading worker.
    """
    workers = args.dataloader_num_workers
    return {
        "num_workers": workers,
        "pin_memory": args.dataloader_pin_memory and torch.cuda.is_available(),
        "prefetch_factor": args.dataloader_prefetch_factor if workers else None,
        "timeout": worker_timeout if workers else 0,
        "worker_init_fn": leave_signals_to_the_run,
    }


def values_of_plan(plan: AnyPlan, values: tuple) -> tuple:
    """Returns what `Trainer.set_initial_training_values` gives, with epochs, updates and micro-batches as the plan has them.

    Trainer takes every epoch to be as long as the first. Order-dependent packers vary: it would begin too few epochs,
    and end before the plan does. An epoch that ends before its longest does not matter.
    """
    *_, batch_size, _, _ = values
    examples = 0 if plan.num_examples is None else plan.num_examples
    samples = round(examples * plan.epochs_after(plan.total_steps)) if examples else 0
    per_epoch = max(map(plan.steps_in_pass, range(plan.num_passes)))
    micro_batches = per_epoch * plan.gradient_accumulation_steps
    return plan.num_passes, per_epoch, examples, samples, batch_size, micro_batches, plan.total_steps


def leave_signals_to_the_run(worker: int) -> None:
    """Makes a worker ignore signals: one to the whole group asks the run to stop, and it needs its workers until it has."""
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def worker_failure(error: Exception) -> DataError | None:
    """Explains that torch found a worker dead (in any step of the run) or waited for it in vain; ends the others."""
    words = str(error)
    if not isinstance(error, RuntimeError) or not words.startswith("DataLoader"):
        return None
    _kill_workers()
    happened = "a data-loading worker did not answer in time"
    key, fix = "data.worker_timeout", "check for a slow drive or rows that hang; raise it if a batch may take that long"
    if "timed out" not in words:
        happened = "a data-loading worker died"
        key = "training.dataloader_num_workers"
        fix = "workers are mostly killed when memory runs out: use fewer, or 0 to load in the main process"
    return DataError(f"{happened}: {words.splitlines()[0]}", key=key, fix=fix)


def _kill_workers() -> None:
    """Kills all workers: one that hangs would keep the run from ending. Torch must not raise for every child that dies."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if in_main_thread else None
    try:
        for process in multiprocessing.active_children():
            process.kill()
            process.join()
    finally:
        if in_main_thread:
            signal.signal(signal.SIGCHLD, before)


class PlanSampler(Sampler[MicroBatch]):
    """One rank's micro-batches of the updates `start_step..stop_step` of a plan, in order.

    Its length is a multiple of `plan.gradient_accumulation_steps` and the same on every rank.
    """

    def __init__(self, plan: AnyPlan, rank: int = 0, start_step: int = 0, stop_step: int | None = None):
        assert 0 <= rank < plan.world_size, f"rank {rank} of {plan.world_size}"
        self.plan, self.rank = plan, rank
        self.steps = range(start_step, plan.total_steps if stop_step is None else min(stop_step, plan.total_steps))

    def __iter__(self) -> Iterator[MicroBatch]:
        for step in self.steps:
            yield from self.plan.micro_batches(step, self.rank)

    def __len__(self) -> int:
        return len(self.steps) * self.plan.gradient_accumulation_steps
