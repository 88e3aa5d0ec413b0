"""Trains every case twice, as it is and attached, and a third time for one update with attention that leaks."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
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
MARGINS, ACCURACIES = ("rewards/margins", "margin"), ("rewards/accuracies", "accuracy")  # as trainers log them


@dataclass(frozen=True, kw_only=True)
class Found:
    """How far an attached trainer is from itself; differences of `margins` and `accuracies` are in their own unit, the
    others relative; `None` where there is none.

    Attributes:
        way: "flat" batches, or "unpadded" layers.
        loss, gradient: of the first update; the gradients of all weights as one vector.
        curve: the largest of the losses of all updates.
        margins, accuracies: the largest difference of what preference trainers log of all updates.
        vision: the cosine of the gradients of the vision tower in the first update.
        leaking, leaking_vision: gradients and cosine of the first update where attention does not tell documents apart.
    """

    trainer: str
    family: str
    way: str = ""
    loss: float = 0.0
    gradient: float = 0.0
    curve: float = 0.0
    margins: float | None = None
    accuracies: float | None = None
    vision: float | None = None
    leaking: float = 0.0
    leaking_vision: float | None = None
    refused: str = ""


class Watch(TrainerCallback):
    """Keeps the gradients of the first update, float64 `[all weights]`, and stops after `updates`."""

    def __init__(self, updates: int):
        self.gradients: dict[str, Tensor] = {}
        self.updates = updates

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.gradients:
            named = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
            self.gradients["all"] = torch.cat([grad.flatten().double() for grad in named.values()])
            tower = [grad.flatten().double() for name, grad in named.items() if "vis" in name]
            if tower:
                self.gradients["vision"] = torch.cat(tower)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.updates


def without_documents(module, query, key, value, attention_mask, **options):
    """Attends to everything in a flat row, as an implementation without boundaries would."""
    return sdpa_attention_forward(module, query, key, value, None, **options)


def train(trainer: Trainer, updates: int) -> tuple[list[dict], dict[str, Tensor]]:
    """Trains, and returns what was logged of every update and the gradients of the first."""
    watch = Watch(updates)
    trainer.add_callback(watch)
    torch.manual_seed(7)  # completions are sampled
    trainer.train()
    assert watch.gradients
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
    scale = max(map(abs, losses[1])) if case.samples else None  # means of advantages are around 0
    return Found(
        trainer=case.trainer,
        family=family,
        way="flat" if "get_train_dataloader" in vars(attached) else "unpadded",
        loss=relative(losses[0][:1], losses[1][:1], scale),
        gradient=apart(found, gradients),
        curve=relative(*losses, scale),
        margins=largest(MARGINS, after, before),
        accuracies=largest(ACCURACIES, after, before),
        vision=cosine(found, gradients),
        leaking=apart(leaked, gradients),
        leaking_vision=cosine(leaked, gradients),
    )


def relative(one: list[float], other: list[float], scale: float | None) -> float:
    """Returns the largest difference of losses, each relative to its own or all to `scale`."""
    if scale is None:
        return largest_relative_difference(one, other)
    return max(abs(a - b) for a, b in zip(one, other, strict=True)) / scale


def largest(names: tuple[str, ...], one: list[dict], other: list[dict]) -> float | None:
    """Returns the largest difference of the first of these figures that a trainer logs, over all updates."""
    name = next((name for name in names if name in one[0]), None)
    return max(abs(a[name] - b[name]) for a, b in zip(one, other, strict=True)) if name else None


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


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return float((one["all"] - other["all"]).norm() / other["all"].norm())


def cosine(one: dict[str, Tensor], other: dict[str, Tensor]) -> float | None:
    if "vision" not in other:
        return None
    return float(torch.cosine_similarity(one["vision"], other["vision"], dim=0))


def examine_all(keep: Callable[[list[dict]], None], done: Iterable[dict] = (), updates: int = UPDATES) -> None:
    """Examines every case that is not `done`, and gives `keep` what was found so far after each."""
    known = {(one["trainer"], one["family"]): one for one in done}
    for case in CASES:
        for family in case.families:
            if (case.trainer, family) in known:
                continue
            one = asdict(examine(case, family, updates))
            print({name: value for name, value in one.items() if value}, file=sys.stderr, flush=True)
            known[case.trainer, family] = one
            in_order = [(case.trainer, family) for case in CASES for family in case.families]
            keep([known[pair] for pair in in_order if pair in known])
