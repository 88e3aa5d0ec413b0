"""Trains every case twice, as it is and attached, and a third time for one update with attention that leaks."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Trainer, TrainerCallback
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from packtrain.compare.statistics import largest_relative_difference
from packtrain.errors import PacktrainError
from packtrain.modeling.unpad import Flatten
from packtrain.plugin.attach import attach
from results.unpad.cases import CASES, Case, Words, long_tailed

UPDATES, PER_DEVICE, ACCUMULATION, ROWS = 20, 4, 2, 64
VOCABULARY, MEAN, LONGEST = 320, 12, 40
LEAKS = "without_documents"
MARGINS = ("rewards/margins", "margin")


@dataclass(frozen=True, kw_only=True)
class Found:
    """How far an attached trainer is from itself; all differences but `margins` are relative, `None` where there is none.

    Attributes:
        way: "flat" batches, or "unpadded" layers.
        loss, gradient: of the first update; the gradients of all weights as one vector.
        curve: the largest of the losses of all updates.
        margins: the largest difference of the logged margins, in their own unit.
        leaking: of the first update's gradients where attention does not tell documents apart.
    """

    trainer: str
    family: str
    way: str = ""
    loss: float = 0.0
    gradient: float = 0.0
    curve: float = 0.0
    margins: float | None = None
    leaking: float = 0.0
    refused: str = ""


class Watch(TrainerCallback):
    """Keeps the gradients of the first update, float64 `[all weights]`, and stops after `updates`."""

    def __init__(self, updates: int):
        self.gradients: Tensor | None = None
        self.updates = updates

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.gradients is None:
            found = [weight.grad.flatten().double() for weight in model.parameters() if weight.grad is not None]
            self.gradients = torch.cat(found)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.updates


def without_documents(module, query, key, value, attention_mask, **options):
    """Attends to everything in a flat row, as an implementation without boundaries would."""
    return sdpa_attention_forward(module, query, key, value, None, **options)


def train(trainer: Trainer, updates: int) -> tuple[list[dict], Tensor]:
    """Trains, and returns what was logged of every update and the gradients of the first."""
    watch = Watch(updates)
    trainer.add_callback(watch)
    trainer.train()
    assert watch.gradients is not None
    return [entry for entry in trainer.state.log_history if "loss" in entry], watch.gradients


def examine(case: Case, family: str, updates: int = UPDATES) -> Found:
    """Finds how far a trainer is from itself once it is attached."""
    AttentionInterface.register(LEAKS, without_documents)
    AttentionMaskInterface.register(LEAKS, lambda *args, **kwargs: None)
    with tempfile.TemporaryDirectory() as directory:
        lengths = long_tailed(MEAN, LONGEST, 3 * ROWS)

        def build() -> Trainer:
            settings = dict(output_dir=directory, max_steps=updates, seed=3)
            settings |= dict(per_device_train_batch_size=PER_DEVICE, gradient_accumulation_steps=ACCUMULATION)
            return case(family, Words(VOCABULARY, lengths, ROWS), settings)

        before, gradients = train(build(), updates)
        try:
            attached = attach(build())
        except PacktrainError as error:
            return Found(trainer=case.trainer, family=family, refused=str(error.what))
        after, found = train(attached, updates)
        leaking = attach(build())
        for model in models(leaking):
            model.set_attn_implementation(LEAKS)
            for module in model.modules():  # an unpadded module goes back to its attention before every call
                if any(isinstance(hook, Flatten) for hook in module._forward_pre_hooks.values()):
                    module.register_forward_pre_hook(as_one_document, with_kwargs=True)
        _, leaked = train(leaking, 1)
    losses = [[entry["loss"] for entry in logged] for logged in (after, before)]
    name = next((name for name in MARGINS if name in before[0]), None)
    margins = [torch.tensor([entry[name] for entry in logged]) for logged in (after, before)] if name else None
    return Found(
        trainer=case.trainer,
        family=family,
        way="flat" if "get_train_dataloader" in vars(attached) else "unpadded",
        loss=abs(losses[0][0] / losses[1][0] - 1),
        gradient=apart(found, gradients),
        curve=largest_relative_difference(*losses),
        margins=float((margins[0] - margins[1]).abs().max()) if margins else None,
        leaking=apart(leaked, gradients),
    )


def as_one_document(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Makes the rows of a flat batch one document."""
    if (bounds := kwargs.get("cu_seq_lens_q")) is not None:
        whole = bounds[[0, -1]].contiguous()
        whole._packtrain_rows = bounds._packtrain_rows
        length = int(whole[-1])
        kwargs |= dict(cu_seq_lens_q=whole, cu_seq_lens_k=whole, max_length_q=length, max_length_k=length)
    return args, kwargs


def models(trainer: Trainer) -> Iterator:
    for name in ("model", "ref_model"):
        if (model := getattr(trainer, name, None)) is not None:
            yield model.get_base_model() if hasattr(model, "get_base_model") else model


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def examine_all(keep: Callable[[list[dict]], None], updates: int = UPDATES) -> None:
    """Examines every case, and gives `keep` what was found so far after each."""
    found: list[dict] = []
    for case in CASES:
        for family in case.families:
            found.append(asdict(examine(case, family, updates)))
            print({name: value for name, value in found[-1].items() if value}, file=sys.stderr)
            keep(found)
