"""What is measured of a run of any transformers Trainer: the seconds of an update, its batches, the held-out loss.

    class TimedTrainer(Timed, Trainer): ...

    trainer.recorder = Recorder(write=..., flops=...)

The same mixin measures PackTrainer, TRL's SFTTrainer and the stock Trainer, at the same places of the loop they share:

    get_batch_samples | training_step: compute_loss, backward | ... | clipping, optimizer step | on_step_end
    `---- data ----'                  `forward'   `backward'        `------- optimizer -------'
    `------------------------------------ seconds -------------------------------------------'

Reading batches, counting and evaluating happen between updates, where no clock runs. On CUDA the marks are
events in the stream, and the host waits for the device once per update, not at every mark. Several ranks start their
clocks together, and what they have measured is one record (see `ranks`).

The held-out loss is one yardstick for every trainer: summed over tokens and over examples and divided once, so how
the held-out set was batched, and who trained the model, makes no difference to it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback

from packtrain.compare.ranks import gathered, meet, merge_updates, note_arrival, summed
from packtrain.compare.results import HeldOut, Record, Update
from packtrain.errors import PacktrainError
from packtrain.objectives.objective import Loss
from packtrain.training.loader import PlanLoader
from packtrain.training.meters import document_of, peak_memory

Mark = float | torch.cuda.Event
Batch = Mapping[str, Any]


class RunFailed(PacktrainError):
    """The run can't go on: what it does is not training any more."""


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """What a batch of any trainer holds.

    width: columns; rows: for each row the lengths of its documents; supervised: positions with a label.
    """

    width: int
    rows: list[list[int]]
    supervised: int

    @property
    def computed(self) -> int:
        return self.width * len(self.rows)

    @property
    def lengths(self) -> np.ndarray:
        return np.array([length for row in self.rows for length in row], dtype=np.int64)


def shape_of(batch: Batch) -> BatchShape:
    """Read documents off a batch: from a 2-D attention mask, from `cu_seq_lens_q`, or from positions that restart.

    Documents that only fill a shape (`example_ids` of -1) are left out, so that they count as padding.
    """
    labels = batch["labels"]  # [B, T]
    if "attention_mask" in batch:
        rows = [[length] for length in batch["attention_mask"].sum(dim=1).tolist()]
    elif "cu_seq_lens_q" in batch:
        rows = [batch["cu_seq_lens_q"].diff().tolist()]
    else:
        starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
        rows = [np.diff([*starts, labels.shape[1]]).tolist()]
    if "example_ids" in batch:
        real = iter((batch["example_ids"] >= 0).tolist())
        rows = [[length for length in row if next(real)] for row in rows]
    return BatchShape(width=labels.shape[1], rows=rows, supervised=int((labels[:, 1:] != -100).sum()))


class Clock:
    """Marks in time: events of the CUDA stream on a CUDA device, else the host's clock."""

    def __init__(self, device: torch.device):
        self.on_cuda = device.type == "cuda"

    def mark(self) -> Mark:
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def settle(self) -> None:
        """Wait until everything marked has happened."""
        if self.on_cuda:
            torch.cuda.synchronize()

    @staticmethod
    def between(start: Mark, stop: Mark) -> float:
        """Return the seconds between two settled marks."""
        if isinstance(start, torch.cuda.Event) and isinstance(stop, torch.cuda.Event):
            return start.elapsed_time(stop) / 1000
        assert isinstance(start, float) and isinstance(stop, float), "marks of two clocks"
        return stop - start


class Recorder:
    """Collects the marks and batches of one update of this rank after another, and writes each when it is over.

    Args:
        write: takes an `Update`, of all ranks together.
        flops: `(document lengths int64 [S], supervised positions) -> FLOPs` of training on them.
        says_documents: whether the trainer's batches show where documents end.
        device: where the model is.
    """

    def __init__(
        self,
        *,
        write: Callable[[Update], None],
        flops: Callable[[np.ndarray, int], float],
        says_documents: bool,
        device: torch.device,
    ):
        self.write, self.flops, self.says_documents = write, flops, says_documents
        self.clock = Clock(device)
        self.memory_before: int | None = None
        self.first_began: float | None = None  # on the host's clock
        self.layout: list[BatchShape] = []  # of the first update
        self._watched = False
        self._clear()

    def _clear(self) -> None:
        self._shapes: list[BatchShape] = []
        self._losses: list[torch.Tensor] = []
        self._forward: list[tuple[Mark, Mark]] = []
        self._steps: list[tuple[Mark, Mark]] = []
        self._arrived: Mark | None = None

    def begin(self) -> None:
        """Start an update: its batches are asked for."""
        self._clear()
        if self.first_began is None:
            self.memory_before, _ = peak_memory()
            self.first_began = time.perf_counter()
        self.clock.settle()
        meet()
        self._began = self.clock.mark()

    def fetched(self, batches: list[Batch]) -> None:
        """Take the batches. Looking at them costs the update nothing: its beginning moves along."""
        data = self.clock.mark()
        self.clock.settle()
        self._data_seconds = self.clock.between(self._began, data)
        self._shapes = [shape_of(batch) for batch in batches]
        self.layout = self.layout or self._shapes
        meet()
        self._began, self._began_on_host = self.clock.mark(), time.perf_counter()

    def watch(self, model: torch.nn.Module) -> None:
        """Ask DDP to tell when gradients are ready; called with the model as it trains, before its first backward pass."""
        if not self._watched and isinstance(model, DistributedDataParallel):
            model.register_comm_hook(self, note_arrival)
        self._watched = True

    def arrive(self) -> None:
        """Mark that gradients are ready for the other ranks'; the last call in an update stands."""
        self._arrived = self.clock.mark()

    @property
    def arrived(self) -> float | None:
        """When this rank's gradients of the update were ready, in seconds on the host's clock, once it has ended."""
        if self._arrived is None:
            return None
        return self._began_on_host + self.clock.between(self._began, self._arrived)

    def forward(self, start: Mark, stop: Mark) -> None:
        self._forward.append((start, stop))

    def step(self, start: Mark, stop: Mark, loss: torch.Tensor) -> None:
        """Take the marks of one micro-batch forward and back, and its share of the update's loss."""
        self._steps.append((start, stop))
        self._losses.append(loss)

    def end(self, update: int) -> Update:
        """Finish an update: the optimizer has stepped."""
        between, stop = self.clock.between, self.clock.mark()
        self.clock.settle()
        forward = sum(between(*marks) for marks in self._forward)
        shapes, supervised = self._shapes, sum(shape.supervised for shape in self._shapes)
        lengths = np.concatenate([shape.lengths for shape in shapes])
        return Update(
            update=update,
            seconds=round(self._data_seconds + between(self._began, stop), 6),
            data_seconds=round(self._data_seconds, 6),
            forward_seconds=round(forward, 6),
            backward_seconds=round(sum(between(*marks) for marks in self._steps) - forward, 6),
            optimizer_seconds=round(between(self._steps[-1][1], stop), 6),
            micro_batches=len(shapes),
            real_tokens=int(lengths.sum()),
            computed_tokens=sum(shape.computed for shape in shapes),
            supervised_tokens=supervised,
            examples=len(lengths) if self.says_documents else None,
            flops=self.flops(lengths, supervised) if self.says_documents else None,
            loss=float(torch.stack(self._losses).sum()),
            grad_norm=None,
        )


class Timed(Trainer):
    """Mixin in front of a Trainer; `recorder` is set before `train()`."""

    recorder: Recorder

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self.recorder.begin()
        batches, denominator = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            self.recorder.fetched(batches)
        return batches, denominator

    def compute_loss(self, model, inputs, *args, **kwargs):
        start = self.recorder.clock.mark()
        result = super().compute_loss(model, inputs, *args, **kwargs)
        self.recorder.forward(start, self.recorder.clock.mark())
        return result

    def training_step(self, model, *args, **kwargs):
        self.recorder.watch(model)
        start = self.recorder.clock.mark()
        loss = super().training_step(model, *args, **kwargs)
        self.recorder.step(start, self.recorder.clock.mark(), loss)
        return loss


class WriteUpdates(TrainerCallback):
    """Writes an update of all ranks once its gradient norm is known, which Trainer gives in the log that follows it.

    Raises:
        RunFailed: on every rank, the loss is not a finite number.
    """

    def __init__(self, recorder: Recorder):
        self.recorder = recorder
        self.last: Update | None = None

    def on_step_end(self, args, state, control, **kwargs):
        own = self.recorder.end(state.global_step)
        self.last = merge_updates(gathered((own, self.recorder.arrived)))
        if not math.isfinite(self.last.loss):
            self.recorder.write(self.last)
            raise RunFailed(f"the loss is {self.last.loss} at update {self.last.update}")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.last is None or logs is None or "loss" not in logs:
            return
        norm = logs.get("grad_norm")
        self.recorder.write(replace(self.last, grad_norm=None if norm is None else float(norm)))
        self.last = None


# The held-out loss


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, loader: PlanLoader, loss: Loss, *, update: int) -> HeldOut:
    """Evaluate `model` on the batches of `loader`, and of other ranks, without dropout. No token has a weight here."""
    device = next(model.parameters()).device
    sums = torch.zeros(4, dtype=torch.float64)  # nll, tokens, means of examples, examples
    was_training = model.training
    model.eval()
    for batch in loader:
        batch = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
        losses = loss.losses(model, batch)
        documents = document_of(batch).flatten()[losses.index]  # [N]
        nll = torch.bincount(documents, weights=losses.nll.double())  # [S]
        tokens = torch.bincount(documents)  # [S]
        scored = tokens > 0
        means = (nll[scored] / tokens[scored]).sum()
        sums += torch.stack([nll.sum(), tokens.sum().double(), means, scored.sum().double()]).cpu()
    model.train(was_training)
    nll, tokens, means, examples = summed(sums, device).tolist()
    return HeldOut(update=update, loss=nll / tokens, loss_per_example=means / examples, tokens=int(tokens))


class EvaluateHeldOut(TrainerCallback):
    """Evaluates on the held-out examples before the first update, every `every` updates, and after the last."""

    def __init__(self, *, loader: PlanLoader, loss: Loss, write: Callable[[Record], None], every: int | None):
        self.loader, self.loss, self.write, self.every = loader, loss, write, every
        self.evaluated = -1

    def _evaluate(self, model: Any, update: int) -> None:
        if update != self.evaluated:
            self.write(held_out_loss(model, self.loader, self.loss, update=update))
            self.evaluated = update

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._evaluate(model, 0)

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        if self.every and "loss" in (logs or {}) and state.global_step % self.every == 0:
            self._evaluate(model, state.global_step)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._evaluate(model, state.global_step)
