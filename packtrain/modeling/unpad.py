"""Padding-free layers inside any padded model: `[B, T]` outside, one flat row inside.

    packtrain.unpad(model)                  # or: with packtrain.unpad(model): ...
    model(input_ids, attention_mask)        # the same outputs, losses and gradients, without computing padding

Two public hooks on the module at the border (a decoder, an encoder, the language model of a vision-language model) change
the view of a batch. The first keeps the real tokens of `[B, T]` inputs, at the positions they would have had; the layers
run on `[1, N]` with `packtrain_varlen`, every row a document; the second scatters what comes out back to `[B, T]`. Whoever
calls the model sees nothing of it, so any trainer, loss and head works as before.

    attention_mask   1 1 1 0        inside   a b c d e f        outside   A B C 0
                     0 1 1 1                 0 0 0 1 1 1                  0 D E F

The algorithm is that of ByteTransformer (Zhai et al., 2022), for models as transformers has them. A batch is left as it is
where there is nothing to gain or something that needs the padded view: no padding, one row, a cache, a mask that is not
2-D, padding between the tokens of a row, attention weights as outputs. What depends on padding itself is refused: a head
whose loss reads it (question answering: a softmax over all columns), and labels that are predicted from it. `torch.compile`
runs the hooks between its graphs, and refuses `fullgraph=True` with that reason.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.loss.loss_utils import ForCausalLMLoss

from packtrain.errors import ModelError
from packtrain.modeling.audit.models import enlarge, shrunk
from packtrain.modeling.audit.settings import base, in_mode, quietly
from packtrain.modeling.equality import (
    check_whole,
    find_hook,
    nonzero_adapters,
    outputs_of,
    same_frequencies,
    short_windows,
    stretches_at,
)
from packtrain.modeling.flatten import Flatten, RefuseLabels, Scatter, use_attention
from packtrain.modeling.isolation import cannot_ask
from packtrain.modeling.mixers.padding import Padding
from packtrain.modeling.per_document import compute_per_document, small_thresholds


class Unpadding:
    """What `unpad` has installed: `remove()` takes it away, and so does leaving a `with` block.

    Attributes:
        modules: names of the modules whose layers run without padding.
        inside: what mixes tokens in them otherwise than by attention, and sees every row padded.
    """

    def __init__(self, model: nn.Module, borders: dict[str, PreTrainedModel]):
        self.modules = list(borders)
        self._before = [(border, border.config._attn_implementation) for border in borders.values()]
        self.inside: list[Padding] = []
        self._handles: list[RemovableHandle] = []
        self._top, self._borders = base(model), borders
        self._places = compute_per_document(model, rotary=False)

    def _install(self, hooks: dict[str, Flatten]) -> None:
        """Installs these hooks, in the place of those that are there."""
        self._remove_hooks()
        for name, hook in hooks.items():
            border = self._borders[name]
            use_attention(border, hook.within)
            self._handles.append(border.register_forward_pre_hook(hook, with_kwargs=True, prepend=bool(self.inside)))
            self._handles.append(border.register_forward_hook(Scatter(hook.within), with_kwargs=True))
        if self._top not in self._borders.values():
            refuse = RefuseLabels(ahead=int(predicts_next_token(self._top)))
            self._handles.append(self._top.register_forward_pre_hook(refuse, with_kwargs=True))

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def remove(self) -> None:
        """Removes the hooks, and gives the model its own attention back."""
        self._remove_hooks()
        self._places.remove()
        for padding in self.inside:
            padding.remove()
        self.inside.clear()
        for border, implementation in self._before:
            use_attention(border, implementation)

    def __enter__(self) -> Unpadding:
        return self

    def __exit__(self, *failure: object) -> None:
        self.remove()


def unpad(model: nn.Module, *, module: nn.Module | str | None = None, ask_whole: bool = True) -> Unpadding:
    """Lets the layers of a model run without padding, and proves on the spot that nothing else changes.

    The proof asks the module for four ragged rows, padded on the right and on the left, before and after: its outputs, and
    the gradients of all weights that are trained (of the embeddings alone above 50 million), must agree at every real
    token, to 1e-5 of the largest in float32 and 4e-2 in bfloat16. Then it asks the whole model, where that takes token
    ids and a mask and nothing else. Left-padded batches stay padded where they alone do not agree. Where an engine has the
    weights already (ZeRO-3, FSDP), a small model of the same class and configuration takes the place of this one.

    Args:
        model: a transformers model, or a module with such models inside, with or without a PEFT adapter; on its device,
            not yet wrapped by an engine. Its weights, gradients, mode and random state stay what they are.
        module: the module at the border, or its name; by default every innermost `PreTrainedModel` that takes an
            `attention_mask`.
        ask_whole: whether the whole model must give the same, with its own loss; without, only the module must, for a caller
            that has another loss and checks it.

    Returns:
        What was installed; see `Unpadding`.

    Raises:
        ModelError: no such module, it is unpadded already, or its outputs or gradients are not the same; the model is left
            as it was.
    """
    if not isinstance(model, nn.Module):
        fix = "give the model itself"
        if hasattr(model, "model") and hasattr(model, "train"):
            fix = "packtrain.attach(trainer) takes a trainer; packtrain.unpad the model of a loop of your own"
        raise ModelError("must be a torch.nn.Module", key="model", value=type(model).__name__, fix=fix)
    borders, top = find_borders(model, module), base(model)
    unpadding = Unpadding(model, borders)
    try:
        if cannot_ask(model):
            with quietly():
                unpadding._install(_hooks_of_small(top, borders, ask_whole))
            return unpadding
        with (
            quietly(),
            in_mode(model, train=False),
            nonzero_adapters(model),
            short_windows(borders.values()),
            same_frequencies(model),
            small_thresholds(model, rotary=False),
        ):
            whole = None if top in borders.values() or not ask_whole else outputs_of(top, borders.values())
            hooks = {}
            for name, border in borders.items():
                hooks[name], inside = find_hook(name, border)
                unpadding.inside += [] if inside is None else [inside]
            unpadding._install(hooks)
            if whole is not None and not check_whole(top, borders.values(), whole):
                unpadding._install({name: replace(hook, left=False) for name, hook in hooks.items()})
    except BaseException:
        unpadding.remove()
        raise
    return unpadding


def _hooks_of_small(top: Any, borders: dict[str, PreTrainedModel], ask_whole: bool) -> dict[str, Flatten]:
    """Finds the hooks for a model whose weights are not here, with a small model of its class and configuration.

    Raises:
        ModelError: there is no such model, or it does not give the same without padding.
    """
    inside = {inner: name for name, inner in top.named_modules()}
    try:
        config = copy.deepcopy(top.config)
        for name, value in shrunk(config).items():
            setattr(config, name, value)
        with torch.random.fork_rng(devices=[]), _made_whole():
            torch.manual_seed(0)
            small = type(top)(config).float()
            enlarge(small)
        modules = {name: small.get_submodule(inside[border]) for name, border in borders.items()}
    except Exception as error:  # whatever a class may raise for another configuration
        what = f"{type(top).__name__} has its weights elsewhere, and a small one cannot be built: {error}"
        raise ModelError(what, key="model", fix="call unpad before the weights are sharded") from error
    hooks = {}
    for name, module in modules.items():
        with unpad(small, module=module, ask_whole=ask_whole) as found:
            if found.inside:
                what = f"{type(top).__name__} has its weights elsewhere, and layers that are to be padded inside"
                raise ModelError(what, key="model", fix="call unpad before the weights are sharded")
            hook = next(hook for hook in module._forward_pre_hooks.values() if isinstance(hook, Flatten))
        border: Any = borders[name]
        own = border.config._attn_implementation
        hooks[name] = replace(hook, attention=own, stretches_at=stretches_at(border))
    return hooks


@contextmanager
def _made_whole() -> Iterator[None]:
    """Lets transformers make models whole for as long as it is open, also where ZeRO-3 is on."""
    held = getattr(hf_deepspeed, "_hf_deepspeed_config_weak_ref", None)
    config = None if held is None else held()
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            hf_deepspeed.set_hf_deepspeed_config(config)


def predicts_next_token(model: nn.Module) -> bool:
    """Returns whether the loss of a model compares every token with the labels of the next one (if it has a loss)."""
    return getattr(model, "loss_function", ForCausalLMLoss) is ForCausalLMLoss


def find_borders(model: nn.Module, module: nn.Module | str | None = None) -> dict[str, PreTrainedModel]:
    """Finds the modules at the border: name in the model -> module.

    Raises:
        ModelError: there is none, or not one that can be unpadded.
    """
    named, config = dict(model.named_modules()), getattr(base(model), "config", None)
    if module is not None:
        found = {name: inner for name, inner in named.items() if name == module or inner is module}
        if not found:
            raise ModelError(
                "is not a module of the model", key="module", value=module, fix="see `model.named_modules()`"
            )
    elif getattr(config, "is_encoder_decoder", False):
        what = f"{type(base(model)).__name__} is an encoder with a decoder, whose cross-attention needs padded rows"
        raise ModelError(what, key="model", fix="leave it padded")
    else:
        takes_rows = {
            name: inner for name, inner in named.items() if isinstance(inner, PreTrainedModel) and _takes_rows(inner)
        }
        found = {
            name: inner
            for name, inner in takes_rows.items()
            if not any(other is not inner and other in inner.modules() for other in takes_rows.values())
        }
    for name, inner in found.items():
        if any(isinstance(hook, Flatten) for hook in inner._forward_pre_hooks.values()):
            raise ModelError("is unpadded already", key=name or type(inner).__name__, fix="call unpad once")
        if not isinstance(inner, PreTrainedModel) or not _takes_rows(inner):
            what = "does not take `attention_mask`, token ids or embeddings, and keyword arguments for its attention"
            raise ModelError(what, key="module", value=type(inner).__name__, fix="name the decoder or encoder itself")
    if not found:
        what = f"{type(base(model)).__name__} has no decoder or encoder that could run without padding"
        raise ModelError(what, key="model", fix="leave it padded")
    return found


def _takes_rows(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters
    takes_more = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return "attention_mask" in parameters and takes_more and bool({"input_ids", "inputs_embeds"} & parameters.keys())
