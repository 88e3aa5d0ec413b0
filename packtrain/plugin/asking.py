"""Asks a trainer what it computes of a batch, before it trains, and leaves no trace in it."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import Trainer

from packtrain.errors import PacktrainError
from packtrain.modeling.audit.settings import base, quietly
from packtrain.modeling.isolation import cannot_ask, compute_dtype
from packtrain.modeling.unpad import nonzero_adapters
from packtrain.plugin.verdicts import Verdicts

LIBRARIES = ("transformers.", "trl.")  # modules whose trainers treat a batch as a whole

_SAMPLE = 1 << 16  # entries of the gradient of each weight that are compared


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The trainer's loss of a batch, and what it was computed from.

    Attributes:
        loss: the number that training would log if this batch were an update.
        items: labels that the trainer counts for the denominator; None if it does not count them.
        tokens: real tokens; None if the batch does not say.
        keys: keys of the batch.
        gradient: entries of the gradients of all trained weights, float64 `[n]`.
    """

    loss: float
    items: int | None
    tokens: int | None
    keys: frozenset[str]
    gradient: torch.Tensor


def named(trainer: Trainer) -> str:
    """Returns trainer and task in words: `Trainer with BertForSequenceClassification (sequence classification)`."""
    model = type(base(model_of(trainer))).__name__
    head = re.search(r"For(?!CausalLM)([A-Z]\w+)$", model)
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z]+", head.group(1)) if head else []
    task = " ".join("language modelling" if word == "LM" else word.lower() for word in words)
    return f"{type(trainer).__name__} with {model}" + (f" ({task})" if task else "")


def model_of(trainer: Trainer) -> nn.Module:
    """Returns the trainer's model as it was given, with its adapter."""
    model: Any = trainer.model
    return trainer.accelerator.unwrap_model(model)


def not_askable(trainer: Trainer) -> str | None:
    """Says why the trainer's model can't run before training begins; None where it can."""
    model = model_of(trainer)
    device = next(model.parameters()).device.type
    if (reason := cannot_ask(model)) is None and device != trainer.args.device.type:
        return f"the weights are on the {device} until training"
    return reason


def trains_in(trainer: Trainer) -> torch.dtype:
    return compute_dtype(trainer.args, next(model_of(trainer).parameters()).dtype)


def tolerance(trainer: Trainer) -> float:
    """Returns the largest relative difference of two losses that sums in another order explain; gradients have ten of it."""
    if trains_in(trainer) is not torch.float32:
        return 2e-2
    return 1e-4 if next(model_of(trainer).parameters()).device.type == "cpu" else 1e-3  # TF32


def close(one: float, other: float, tolerance: float) -> bool:
    return abs(one - other) <= tolerance * max(abs(one), 1e-6)


def gradients_apart(one: Answer, other: Answer) -> float:
    """Returns the difference of two gradients as a share of their length."""
    length = max(float(one.gradient.norm()), 1e-12)
    return float((one.gradient - other.gradient).norm()) / length


def ask(trainer: Trainer, batch: Any, verdicts: Verdicts, *, prepare: bool = False) -> Answer:
    """Computes the trainer's loss of a batch and its gradients, in evaluation mode and as training does.

    Args:
        batch: of the trainer's own data loader, or laid out by packtrain.
        verdicts: by which the other ranks, which compute theirs, hear of an error.
        prepare: call the trainer's `_prepare_inputs`, too.
    """
    with verdicts.shared():
        try:
            return _answer(trainer, batch, prepare)
        except (KeyError, ValueError) as error:
            if _lacks_labels(trainer, batch):
                raise NoLabels from error
            raise


class NoLabels(PacktrainError):
    """A batch without labels, of which the model can compute no loss."""

    def __init__(self) -> None:
        fix = "add a column `labels` to train_dataset, or use DataCollatorForLanguageModeling(tokenizer, mlm=False)"
        super().__init__("its batches have no labels, so the model returns no loss", key="trainer", fix=fix)


def _lacks_labels(trainer: Trainer, batch: Any) -> bool:
    """Returns whether the loss is the model's own, and no entry of the batch says what to learn."""
    own = type(trainer).compute_loss is Trainer.compute_loss and trainer.compute_loss_func is None
    named = any("label" in key or key.endswith("_positions") for key in batch) if isinstance(batch, Mapping) else True
    return own and not named


def _answer(trainer: Trainer, batch: Any, prepare: bool) -> Answer:
    weight = next(model_of(trainer).parameters())
    keys = frozenset(batch) if isinstance(batch, Mapping) else frozenset()
    tokens = None
    if "input_ids" in keys:
        mask = batch.get("attention_mask")
        flat = "cu_seq_lens_q" in batch
        tokens = batch["input_ids"].numel() if flat else int(mask.sum()) if torch.is_tensor(mask) else None
    (batch,), items = trainer.get_batch_samples(
        iter([send_to_device(copy.copy(batch), weight.device)]), 1, weight.device
    )
    loss = _loss(trainer, trainer._prepare_inputs(batch) if prepare else batch, items)
    weights = [weight for weight in model_of(trainer).parameters() if weight.requires_grad]
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    return Answer(
        loss=float(loss.detach()),
        items=None if items is None else int(items) // _ranks_counted(trainer),
        tokens=tokens,
        keys=keys,
        gradient=torch.cat([_sampled(gradient) for gradient in gradients if gradient is not None]),
    )


def ask_loss(trainer: Trainer, batch: Any, items: int | None, verdicts: Verdicts) -> float:
    """Computes the trainer's loss of a micro-batch of an update that has `items` labels on this rank."""
    weight = next(model_of(trainer).parameters())
    counted = None if items is None else torch.tensor(items * _ranks_counted(trainer), device=weight.device)
    with verdicts.shared(), torch.no_grad():
        return float(_loss(trainer, send_to_device(copy.copy(batch), weight.device), counted))


def _loss(trainer: Trainer, batch: Any, items: torch.Tensor | int | None) -> torch.Tensor:
    model: Any = trainer.model
    weight, dtype = next(model.parameters()), trains_in(trainer)
    with torch.autocast(weight.device.type, dtype=dtype, enabled=dtype is not weight.dtype):
        batch = dict(batch) if isinstance(batch, Mapping) else batch
        loss: Any = trainer.compute_loss(model, batch, num_items_in_batch=items)
    return loss


def _ranks_counted(trainer: Trainer) -> int:
    """Returns over how many ranks, which take the same documents, labels are counted."""
    return trainer.args.world_size if trainer.args.average_tokens_across_devices else 1


def _sampled(gradient: torch.Tensor) -> torch.Tensor:
    entries = gradient.detach().flatten()
    return entries[:: max(1, len(entries) // _SAMPLE)].double().cpu()


@contextmanager
def untouched(trainer: Trainer) -> Iterator[None]:
    """Leaves random numbers, collator, metrics, state and mode of the model of a trainer as they were.

    Meanwhile the model is in evaluation mode, and the zero matrices of its adapters are drawn at random.
    """
    model = model_of(trainer)
    training, kept, state = model.training, dict(vars(trainer)), copy.deepcopy(vars(trainer.state))
    own = {name: copy.deepcopy(value) for name, value in kept.items() if _is_record(name, value)}
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    numbers = random.getstate(), np.random.get_state()
    adapters = nullcontext() if cannot_ask(model) else nonzero_adapters(model)
    with torch.random.fork_rng(devices=devices), quietly(), adapters:
        try:
            # it may draw from a generator of its own, and know the model
            trainer.data_collator = copy.deepcopy(trainer.data_collator, {id(each): each for each in model.modules()})
            model.eval()
            yield
        finally:
            model.train(training)
            vars(trainer).clear()
            vars(trainer).update(kept | own)
            vars(trainer.state).update(state)
            random.setstate(numbers[0])
            np.random.set_state(numbers[1])


def _is_record(name: str, value: Any) -> bool:
    """Returns whether a trainer keeps its records there: TRL's metrics and logs, whose means are logged."""
    return name.startswith(("_metrics", "_logs", "_pending")) and isinstance(value, dict)
