"""How a model is set up for one experiment of the audit (attention, mode, no dropout), and put back afterwards."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import transformers
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from packtrain.errors import ModelError
from packtrain.modeling.attention.mask import varlen_mask
from packtrain.modeling.attention.varlen import NAME, register, varlen_attention_forward


def base(model: nn.Module) -> PreTrainedModel:
    """Returns the transformers model inside an adapter."""
    inside = getattr(model, "get_base_model", None)
    return inside() if inside is not None else cast(PreTrainedModel, model)


class CountedAttention:
    """`packtrain_varlen` under another name that counts how often a model calls it."""

    name = f"{NAME}_counted"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return varlen_attention_forward(*args, **kwargs)


COUNTED = CountedAttention()


def register_counted() -> None:
    register()
    AttentionInterface.register(COUNTED.name, COUNTED)
    AttentionMaskInterface.register(COUNTED.name, varlen_mask)


def switchable(model: nn.Module, implementation: str) -> bool:
    """Returns whether the model can be told to use this implementation."""
    try:
        with using(model, implementation):
            return True
    except (ModelError, ValueError, ImportError):
        return False


def countable(model: nn.Module) -> str:
    """Returns the counted `packtrain_varlen`, or the plain one for a model that was loaded with it and cannot change."""
    fixed = base(model).config._attn_implementation == NAME and not switchable(model, COUNTED.name)
    return NAME if fixed else COUNTED.name


def reference_implementation(model: nn.Module) -> str:
    """Returns what a single document is run with: the model's own attention, or one of transformers' where that is ours."""
    own = base(model).config._attn_implementation
    if own != NAME:
        return own
    return next((name for name in ("sdpa", "eager") if switchable(model, name)), own)


@contextmanager
def using(model: nn.Module, implementation: str | None) -> Iterator[None]:
    """Makes the model use this attention implementation while open. Raises ModelError where it cannot be told to."""
    inner = base(model)
    before = inner.config._attn_implementation
    if implementation is None or implementation == before:
        yield
        return
    try:
        inner.set_attn_implementation(implementation)
        if inner.config._attn_implementation != implementation:
            raise ModelError(f"{type(inner).__name__} does not look up its attention by name")
        yield
    finally:
        if inner.config._attn_implementation != before:
            inner.set_attn_implementation(before)


@contextmanager
def in_mode(model: nn.Module, *, train: bool, checkpointing: bool = False) -> Iterator[None]:
    """Puts the model in this mode while open, with every dropout rate and router noise at zero."""
    rates = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, float) and (re.search(r"drop|jitter", name) or isinstance(module, nn.Dropout))
    ]
    training = [(module, module.training) for module in model.modules()]
    try:
        for module, name, _ in rates:
            setattr(module, name, 0.0)
        model.train(train)
        if checkpointing:
            switch_checkpointing(model, "enable", {"use_reentrant": False})
        yield
    finally:
        if checkpointing:
            switch_checkpointing(model, "disable")
        for module, name, value in rates:
            setattr(module, name, value)
        for module, was in training:
            module.training = was


def switch_checkpointing(model: nn.Module, to: str, *options: dict) -> None:
    """Enables or disables checkpointing by its new name (`activation_`, transformers 5.20) or the old one."""
    inner = base(model)
    name = f"activation_checkpointing_{to}"
    getattr(inner, name if hasattr(inner, name) else f"gradient_checkpointing_{to}")(*options)


def is_sharded_by_deepspeed(model: nn.Module) -> bool:
    """Returns whether ZeRO-3 has sharded the weights while they were loaded."""
    return all(hasattr(weight, "ds_status") for weight in model.parameters())


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Gathers weights that ZeRO-3 has sharded, on every rank, while open."""
    if not is_sharded_by_deepspeed(model):
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(list(model.parameters())):
        yield


@contextmanager
def quietly() -> Iterator[None]:
    """Silences the warnings of libraries while open: an audit tries what nobody should do, and reports the result itself."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(before)
