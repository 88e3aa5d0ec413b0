"""Compares one step in bfloat16, laid out flat or unpadded, with the padded one: against gradients in float32.

Rounding alone moves a gradient in bfloat16 by percents, whatever the layout, so the yardstick is what it moves the padded
batch by: another layout may be no further from float32 than that. The control, a flat batch whose documents attend to each
other, has to be.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from packtrain.modeling.attention.varlen import NAME, register
from packtrain.modeling.unpad import unpad
from packtrain.packing.bounds import KEY as BOUNDS
from results.attention.run import Way, batches, step
from results.gpu.parts import config_of
from results.gpu.schedule import Task
from results.gpu.speed import draw_lengths

SHAPE = "Qwen2.5-0.5B"
PADDED, FLAT = "pad_longest", "balanced"
AS_GOOD = 1.5  # times the error of the padded batch in bfloat16
LEAKS = 3.0  # times that error, at least
TIMED = 5
Batches = list[dict[str, Any]]


def measure(task: Task) -> dict[str, Any]:
    """Compare loss and gradient of one step: `balanced`, `unpad`, and the leaking control.

    Raises:
        AssertionError: a layout is further from float32 than padding is, or the control is not.
    """
    register()
    model, lengths = _model(task), _lengths(task)
    vocabulary = model.config.vocab_size
    padded = _on(task, batches(Way(name=PADDED, strategy=PADDED, attention="sdpa", rows=8), lengths, vocabulary))
    flat = _on(task, batches(_flat(task), lengths, vocabulary))
    model.set_attn_implementation("sdpa")
    loss, exact = _gradient(model, padded, task, half=False)
    found: dict[str, Any] = {"documents": len(lengths), "tokens": int(lengths.sum()), "float32 loss": loss, "ways": {}}
    for name, laid_out in {
        PADDED: padded,
        "unpad": padded,
        FLAT: flat,
        "leaking": [leaking(one) for one in flat],
    }.items():
        model.set_attn_implementation(NAME if laid_out is not padded else "sdpa")
        unpadding = unpad(model) if name == "unpad" else None
        half, gradient = _gradient(model, laid_out, task, half=True)
        if unpadding is not None:
            unpadding.remove()
        found["ways"][name] = {
            "loss differs by": abs(half / loss - 1),
            "gradient differs by": _distance(gradient, exact),
            "micro_batches": len(laid_out),
        }
        task.keep(found)
    rounding = found["ways"][PADDED]["gradient differs by"]
    for row in found["ways"].values():
        row["times rounding"] = row["gradient differs by"] / rounding
    task.keep(found)
    for name in (FLAT, "unpad"):
        times = found["ways"][name]["times rounding"]
        assert times < AS_GOOD, f"{name}: its gradient is {times:.1f} times as far from float32 as that of padding"
    times = found["ways"]["leaking"]["times rounding"]
    assert times > LEAKS, f"documents that attend to each other move the gradient by {times:.1f} times rounding only"
    return found


def measure_unpad(task: Task) -> dict[str, Any]:
    """Time a step of a padded model as it is and under `packtrain.unpad`, in turns, in bfloat16."""
    register()
    model, lengths = _model(task), _lengths(task)
    padded = _on(
        task, batches(Way(name=PADDED, strategy=PADDED, attention="sdpa", rows=8), lengths, model.config.vocab_size)
    )
    model.set_attn_implementation("sdpa")
    seconds: dict[str, list[float]] = {"padded": [], "unpad": []}
    losses: dict[str, float] = {}
    for number in range(1 + (1 if task.small else TIMED)):  # the first is to warm up
        for name in seconds:
            unpadding = unpad(model) if name == "unpad" else None
            with torch.autocast(task.device, dtype=torch.bfloat16):
                elapsed, losses[name], _ = step(model, padded)
            if unpadding is not None:
                unpadding.remove()
            if number:
                seconds[name].append(elapsed)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    computed = sum(batch["input_ids"].numel() for batch in padded)
    found = {
        "padding": 1 - int(lengths.sum()) / computed,
        "seconds": seconds,
        "faster": medians["padded"] / medians["unpad"],
        "loss differs by": abs(losses["unpad"] / losses["padded"] - 1),
    }
    task.keep(found)
    assert found["loss differs by"] < 2e-2, f"the losses differ by {found['loss differs by']:.1e}"
    return found


def leaking(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Say of a flat batch that it holds one document, and change nothing else."""
    total = batch["input_ids"].shape[1]
    offsets = batch["cu_seq_lens_q"].new_tensor([0, total])
    changed = {f"cu_seq_lens_{side}": offsets for side in "qk"} | {f"max_length_{side}": total for side in "qk"}
    return {key: value for key, value in batch.items() if key != BOUNDS} | changed


def _flat(task: Task) -> Way:
    return Way(name=FLAT, strategy="balanced", attention=NAME, max_tokens=300 if task.small else 8192)


def _lengths(task: Task) -> np.ndarray:
    return draw_lengths(16 if task.small else 32, longest=64 if task.small else 1024)


def _model(task: Task) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.device(task.device):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config_of(SHAPE, small=task.small))).train()


def _on(task: Task, laid_out: Batches) -> Batches:
    device = torch.device(task.device)
    return [{key: each.to(device) if torch.is_tensor(each) else each for key, each in one.items()} for one in laid_out]


def _gradient(model: PreTrainedModel, laid_out: Batches, task: Task, *, half: bool) -> tuple[float, list[Tensor]]:
    """Return the loss of a step and the gradients of all weights, in float32."""
    with torch.autocast(task.device, dtype=torch.bfloat16, enabled=half):
        _, loss, _ = step(model, laid_out)
    gradients = [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
    model.zero_grad()
    return loss, gradients


def _distance(gradient: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return ||gradient - exact|| / ||exact|| over all weights together."""
    apart = torch.stack([(one - other).norm() for one, other in zip(gradient, exact, strict=True)]).norm()
    return (apart / torch.stack([other.norm() for other in exact]).norm()).item()
