"""Logits where they are needed, and nowhere else.

The LM head runs only where a token is predicted. With the usual `[B, T]` of prompts and padding most rows of
the `[B*T, vocabulary]` logits are thrown away by `ignore_index`; here they are never computed. The choice is made
by a forward pre-hook on the head (`get_output_embeddings()`), so whatever a model does to its logits after
the head (softcapping, scaling) still happens, in every layout and for every architecture that calls its head:

    hidden [B, T, D]  ->  hidden at index [1, N, D]  ->  head  ->  logits [1, N, V]
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import nn

from packtrain.errors import ModelError

NOT_MODEL_INPUTS = ("labels", "loss_weights", "example_ids", "supervised_index")


def logits_at(
    model: nn.Module, batch: Mapping[str, object], index: torch.Tensor, *, head: nn.Module | None = None
) -> torch.Tensor:
    """Computes logits `[N, V]` at the flat positions `index` `[N]` (row-major over `[B, T]`), from one forward pass.

    Args:
        model: a causal LM of transformers, bare or wrapped (peft, DDP, DeepSpeed, FSDP).
        batch: the keys of a packtrain batch; those the model's forward does not take are left out.
        head: the module that turns hidden states into logits; by default the model's
            `get_output_embeddings()`. Wrapped models need it from the unwrapped one.

    Raises:
        ModelError: the model has no output embeddings, or does not call them in its forward.
    """
    with _head_sees_only(head or output_head(model), index) as seen:
        logits = model(**_model_inputs(model, batch)).logits  # [1, N, V]
    if not seen:
        raise ModelError(
            "the model does not call its output embeddings in forward, so logits cannot be limited to "
            "supervised positions",
            value=type(model).__name__,
            fix="train this architecture with the stock transformers.Trainer and packtrain's collator",
        )
    assert logits.shape[:-1] == (1, len(index)), f"logits {tuple(logits.shape)} for {len(index)} positions"
    return logits[0]


def head_outputs_at(
    model: nn.Module, batch: Mapping[str, object], index: torch.Tensor, *, head: nn.Module
) -> torch.Tensor:
    """Returns what `head` gives at the flat positions `index` `[N]`, `[N, C]`, from one forward pass.

    For models that pool what their head gives, which must see all of it; the pooled logits are not used.
    """
    seen: list[torch.Tensor] = []
    handle = head.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        model(**_model_inputs(model, batch))
    finally:
        handle.remove()
    return seen[-1].flatten(0, 1)[index]


def output_head(model: nn.Module) -> nn.Module:
    """Returns the module that maps hidden states to logits. Raises ModelError when the model names none."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if head is None:
        raise ModelError(
            "the model has no output embeddings, so it is not a causal language model packtrain can train",
            value=type(model).__name__,
            fix="load it with AutoModelForCausalLM",
        )
    return head


@contextmanager
def _head_sees_only(head: nn.Module, index: torch.Tensor) -> Iterator[list[bool]]:
    """Gives `head` `[1, N, D]` instead of `[B, T, D]` while open; yields a list that is no longer empty when it ran."""
    seen: list[bool] = []

    def keep_supervised(_module: nn.Module, args: tuple) -> tuple:
        hidden, *rest = args  # [B, T, D]
        seen.append(True)
        return (hidden.flatten(0, 1).index_select(0, index).unsqueeze(0), *rest)

    handle = head.register_forward_pre_hook(keep_supervised)
    try:
        yield seen
    finally:
        handle.remove()


def _model_inputs(model: nn.Module, batch: Mapping[str, object]) -> dict[str, object]:
    """Returns the keys of `batch` that `model.forward` takes, and `use_cache=False` (a cache undoes isolation)."""
    inputs = {key: value for key, value in batch.items() if key not in NOT_MODEL_INPUTS}
    inputs["use_cache"] = False
    accepted = _accepted_inputs(type(_innermost(model)))
    return inputs if accepted is None else {key: inputs[key] for key in inputs if key in accepted}


def _innermost(model: nn.Module) -> nn.Module:
    """Returns the transformers model under torch.compile, peft, DDP and DeepSpeed wrappers, whose signature counts."""
    while True:
        compiled, adapted = getattr(model, "_orig_mod", None), getattr(model, "get_base_model", None)
        wrapped = getattr(model, "module", None)
        if isinstance(compiled, nn.Module):
            model = compiled
        elif adapted is not None:
            model = adapted()
        elif isinstance(wrapped, nn.Module):
            model = wrapped
        else:
            return model


@lru_cache
def _accepted_inputs(model_class: type[nn.Module]) -> frozenset[str] | None:
    """Returns the names that `model_class.forward` takes, or None when it takes any keyword."""
    parameters = inspect.signature(model_class.forward).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters)
