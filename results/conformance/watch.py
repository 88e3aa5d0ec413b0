"""What a trainer really does: the micro-batches, gradients and losses of a run, taken from the trainer itself.

Nothing is asked of a trainer but what transformers' Trainer has: `training_step(model, inputs, num_items_in_batch)`,
`compute_loss`, callbacks, `state.log_history`, `evaluate`. The methods of one instance are wrapped, no class is changed.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from results.conformance.rows import PAD, Document, Row, changed, documents


@dataclass
class Batch:
    """A micro-batch as the trainer got it: int64 `[B, T]`, and `padded` bool `[B, T]`."""

    ids: Tensor
    labels: Tensor
    positions: Tensor | None
    padded: Tensor
    update: int = 0

    @property
    def documents(self) -> list[Document]:
        return documents(self.ids, self.padded)

    @property
    def targets(self) -> Tensor:
        """Returns where a model is trained, bool `[B, T]`: at labels that are not ignored, but the first of a row."""
        trained = self.labels != -100
        trained[:, 0] = False
        return trained


@dataclass
class Trace:
    """What was seen of a run; of several ranks, of all of them.

    Attributes:
        batches: all micro-batches.
        gradients: of the first update, float64, as the optimizer got them.
        losses: as logged, of every update.
        leak: relative change of the loss of one document of a batch when others change; None where none has two.
        sensitivity: the same when the document itself changes.
        weights: after the run.
        said: what was printed, warned or logged.
    """

    batches: list[Batch] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    leak: float | None = None
    sensitivity: float | None = None
    weights: dict[str, Tensor] = field(default_factory=dict)
    said: str = ""

    def examples(self, update: int) -> list[int]:
        """Returns the rows of an update, as often as it sees them."""
        seen = [document for batch in self.batches if batch.update == update for document in batch.documents]
        return [document.example for document in seen if document.example is not None]


class Watch(TrainerCallback):
    """Notes the updates of a trainer, and stops it after `stop` of them."""

    def __init__(self, trace: Trace, stop: int = 0):
        self.trace, self.stop, self.update = trace, stop, 0

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.trace.gradients:
            self.trace.gradients = gradients_of(model)

    def on_step_end(self, args, state, control, **kwargs):
        self.update += 1
        if self.stop and state.global_step >= self.stop:
            control.should_training_stop = True


def gradients_of(model: Any) -> dict[str, Tensor]:
    if hasattr(model, "named_gradients"):  # of a trainer that names its weights otherwise
        return {name: gradient.double() for name, gradient in model.named_gradients().items()}
    named = ((name.removeprefix("module."), weight) for name, weight in model.named_parameters())
    return {name: weight.grad.double().clone() for name, weight in named if weight.grad is not None}


def watch(trainer: Any, *, probe: bool = False, stop: int = 0, resume: str | None = None) -> Trace:
    """Trains, and returns what was seen; on several ranks the batches of all.

    Args:
        trainer: a Trainer, or what looks like one.
        probe: whether to try if documents leak into each other, in the first batch that has two.
        stop: the update after which to stop.
        resume: a checkpoint to go on from.
    """
    trace, inner = Trace(), trainer.training_step
    callback = Watch(trace, stop)

    def step(model: Any, inputs: Mapping[str, Any], num_items_in_batch: Any = None) -> Tensor:
        batch = batch_of(inputs)
        batch.update = callback.update
        trace.batches.append(batch)
        if probe and trace.leak is None and len(batch.documents) > 1:
            trace.leak, trace.sensitivity = probe_isolation(trainer, model, inputs, num_items_in_batch)
        return inner(model, inputs, num_items_in_batch)

    trainer.training_step = step
    trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume) if resume else trainer.train()
    trace.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trace.weights = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    if torch.distributed.is_initialized():
        every: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(every, trace.batches)
        trace.batches = [batch for batches in every for batch in batches]
    return trace


def batch_of(inputs: Mapping[str, Any]) -> Batch:
    """Reads a batch; padding is what a 2-D mask hides, and else the pad token."""
    ids, positions = inputs["input_ids"], inputs.get("position_ids")
    mask = inputs.get("attention_mask")
    padded = mask == 0 if isinstance(mask, Tensor) and mask.dim() == 2 else ids == PAD
    return Batch(
        ids=ids.clone(),
        labels=inputs["labels"].clone(),
        positions=None if positions is None else positions.reshape(ids.shape).clone(),
        padded=(padded & torch.ones_like(ids, dtype=torch.bool)) | (ids == PAD),
    )


@torch.no_grad()
def probe_isolation(trainer: Any, model: Any, inputs: Mapping[str, Any], items: Any) -> tuple[float, float]:
    """Asks the trainer's own loss of one document of a batch, with other documents changed, and with its own first words.

    The document is the last of its row, where a causal model could see all others. Its first token is not scored: whether
    the document before it predicts that is a question of its own.
    """
    batch = batch_of(inputs)
    in_rows = [[one for one in batch.documents if one.row == row] for row in range(len(batch.ids))]
    chosen = max(in_rows, key=len)[-1]
    inside = torch.zeros_like(batch.padded)
    inside[chosen.row, chosen.start : chosen.stop] = True
    scored = inside.clone()
    scored[chosen.row, chosen.start] = False
    half = inside.clone()
    half[chosen.row, (chosen.start + chosen.stop) // 2 :] = False

    def loss(where: Tensor) -> float:
        given = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
        given["input_ids"] = changed(batch.ids, where)
        if "loss_weights" in given:  # a trainer that weighs positions, and has listed them
            given["loss_weights"] = given["loss_weights"] * scored.reshape(given["loss_weights"].shape)
        else:
            given["labels"] = torch.where(scored, batch.labels, -100)
        return float(trainer.compute_loss(model, given, num_items_in_batch=items))

    base = loss(torch.zeros_like(inside))
    return abs(loss(~inside & ~batch.padded) / base - 1), abs(loss(half) / base - 1)


@contextmanager
def output() -> Iterator[list[str]]:
    """Collects what is written to standard output and error, by libraries and by processes of theirs."""
    said: list[str] = []
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        sys.stderr.flush()
        kept = [os.dup(number) for number in (1, 2)]
        try:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            yield said
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, before in zip((1, 2), kept, strict=True):
                os.dup2(before, number)
                os.close(before)
            file.seek(0)
            said.append(file.read().decode(errors="replace"))


def rows_of(trace: Trace, rows: tuple[Row, ...], update: int) -> tuple[Row, ...]:
    """Returns the rows that an update saw, in the order of `rows`."""
    return tuple(rows[number] for number in sorted(trace.examples(update)))
