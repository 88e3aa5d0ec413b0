"""Checkpointed layers run a second time in the backward pass, with the documents of their own forward pass."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from packtrain.modeling.attention.varlen import NAME
from packtrain.modeling.audit.audit import isolate
from packtrain.modeling.audit.models import tiny_model
from packtrain.modeling.audit.probe import flat, sample_documents
from packtrain.modeling.mixers.hooks import Forget, Remember

LONG = (pytest.mark.slow, pytest.mark.ci)
TOGETHER = ((9, 5, 14), (3, 20, 4, 1))  # two rows of 28 tokens: only the documents differ


def padded_inside(architecture: str) -> nn.Module:
    model = tiny_model(architecture)
    if architecture != "gptj":
        model.set_attn_implementation(NAME)
    _, padding = isolate(model)
    assert padding is not None
    return model.train()


def losses(model: nn.Module, *, alone: bool = False) -> Iterator[Tensor]:
    """Yields the losses of two forward passes."""
    for seed, lengths in enumerate(TOGETHER):
        documents = sample_documents(model, lengths, seed=seed)
        weights = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(seed))
        calls = [[one] for one in documents] if alone else [documents]
        logits = [model(**flat(these, 0, 0).batch, use_cache=False).logits[0] for these in calls]
        yield (torch.cat(logits).square().mean(-1) * weights).sum()


def gradients(model: nn.Module, *, order: str = "both, then both", alone: bool = False) -> Tensor:
    model.zero_grad()
    if order == "both, then both":
        for loss in list(losses(model, alone=alone)):
            loss.backward()
    elif order == "last first":
        for loss in reversed(list(losses(model, alone=alone))):
            loss.backward()
    else:
        sum(losses(model, alone=alone)).backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


@pytest.mark.parametrize("order", ["both, then both", "last first", "summed"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "architecture", ["rwkv", "gptj", *(pytest.param(one, marks=LONG) for one in ("bamba", "qwen3_next"))]
)
def test_the_second_run_of_a_layer_knows_its_documents(architecture: str, reentrant: bool, order: str):
    model = padded_inside(architecture)
    expected = gradients(model, alone=True)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = gradients(model, order=order)
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("reentrant", [False, True])
def test_without_it_the_documents_would_be_others(reentrant: bool):
    """Control: the documents of the last forward pass are not those of the first."""
    model = padded_inside("rwkv")
    expected = gradients(model, alone=True)
    for module in model.modules():
        for number, hook in list(module._forward_hooks.items()):
            if isinstance(hook, (Remember, Forget)):
                del module._forward_hooks[number]
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    try:
        found = gradients(model)
    except RuntimeError as error:  # torch compares the shapes of both runs
        assert "Recomputed values" in str(error)
    else:
        assert (found - expected).norm() > 1e-2 * expected.norm()
