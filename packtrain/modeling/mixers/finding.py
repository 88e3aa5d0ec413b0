"""Finds the modules of a model that mix positions without knowing documents, by trying them.

One document runs through the model, and every module below a layer is noted with what it was called with. Then each is
called again with one token changed: a module whose other outputs move mixes positions. Those that call the registered
attention know their documents; of the others the outermost inside each layer are the mixers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from packtrain.modeling.audit.probe import Laid, outputs
from packtrain.modeling.audit.settings import COUNTED, base, in_mode
from packtrain.modeling.mixers.hooks import tensors

_LENGTH = 11  # of the document
_MOVED = 1e-4  # of the largest output


@dataclass(frozen=True)
class Mixer:
    """A module that mixes positions.

    Attributes:
        causal: whether a position is moved by none behind it.
    """

    name: str
    module: nn.Module
    causal: bool


@dataclass(frozen=True)
class Found:
    """What one document has shown of a model.

    Attributes:
        mixers: the modules that mix positions and call no registered attention.
        backbone: the model below the head by name, embeddings and layers; None where the model runs its layers itself.
    """

    mixers: list[Mixer]
    backbone: tuple[str, nn.Module] | None


def find_mixers(model: nn.Module, documents: list[Tensor]) -> Found:
    """Finds the mixers of a model; of a large one give it its first layers only.

    Args:
        documents: of tokens, int64 `[L]` each; the first ones are joined to one.
    """
    calls: dict[nn.Module, _Call] = {}
    document = torch.cat(documents)[:_LENGTH]
    handles = [
        module.register_forward_pre_hook(_Note(calls, len(document)), with_kwargs=True)
        for layer in layers(model).values()
        for module in layer.modules()
    ]
    called: list[nn.Module] = []
    handles += [module.register_forward_pre_hook(_See(called)) for module in base(model).modules()]
    try:
        with in_mode(model, train=False), torch.no_grad():
            outputs(model, Laid(batch={"input_ids": document[None]}, places=[]))
    finally:
        for handle in handles:
            handle.remove()
    found: dict[nn.Module, Mixer] = {}
    with in_mode(model, train=False), torch.no_grad():
        for name, layer in layers(model).items():
            for mixer in _inside(name, layer, calls):
                found.setdefault(mixer.module, mixer)
    inside = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and module is not base(model) and module in called and layers(module)
    ]
    return Found(list(found.values()), inside[0] if inside else None)


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the layers of a model by name: the entries of its outermost lists of modules."""
    stacks = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [
        (name, stack) for name, stack in stacks if not any(name.startswith(f"{other}.") for other, _ in stacks)
    ]
    return {f"{name}.{number}": layer for name, stack in outermost for number, layer in stack.named_children()}


def _inside(name: str, module: nn.Module, calls: dict[nn.Module, _Call]) -> Iterator[Mixer]:
    for part, child in module.named_children():
        path, call = f"{name}.{part}", calls.get(child)
        mixes = None if call is None else call.try_on(child)
        if call is None or (mixes is not None and mixes.registered):
            yield from _inside(path, child, calls)
        elif mixes is not None:
            yield Mixer(path, child, causal=mixes.causal)


@dataclass(frozen=True)
class _Mixes:
    causal: bool
    registered: bool  # it calls the registered attention


@dataclass(frozen=True)
class _See:
    """Notes which modules are called."""

    called: list[nn.Module]

    def __call__(self, module: nn.Module, args: tuple) -> None:
        self.called.append(module)


@dataclass(frozen=True)
class _Note:
    """Notes the arguments of modules that are called with one entry per token."""

    calls: dict[nn.Module, _Call]
    length: int

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if any(_is_hidden(part, self.length) for part in tensors((args, kwargs))):
            self.calls.setdefault(module, _Call(_copy(args), _copy(kwargs), self.length))


@dataclass(frozen=True)
class _Call:
    args: tuple
    kwargs: dict[str, Any] = field(default_factory=dict)
    length: int = 0

    def try_on(self, module: nn.Module) -> _Mixes | None:
        """Calls a module with one token changed; None where no other position moves, or it can't be called."""
        place, before = self.length // 2, COUNTED.calls
        try:
            plain = _positions(module.forward(*_copy(self.args), **_copy(self.kwargs)), self.length)
            args, kwargs = _copy(self.args), _copy(self.kwargs)
            hidden = next(part for part in tensors((args, kwargs)) if _is_hidden(part, self.length))
            noise = torch.randn(hidden[0, place].shape, generator=torch.Generator().manual_seed(0)).to(hidden)
            hidden[0, place] += noise * (hidden.std() + 1e-3)
            changed = _positions(module.forward(*args, **kwargs), self.length)
        except Exception:  # a module that needs more than its arguments
            return None
        if plain is None or changed is None:
            return None
        moved = (changed - plain).abs().amax(1) > _MOVED * plain.abs().max()
        if not (moved[:place].any() or moved[place + 1 :].any()):
            return None
        return _Mixes(causal=not bool(moved[:place].any()), registered=COUNTED.calls > before)


def _is_hidden(part: Tensor, length: int) -> bool:
    return part.dim() == 3 and part.shape[:2] == (1, length) and part.dtype.is_floating_point


def _positions(output: Any, length: int) -> Tensor | None:
    """Returns what a module gives for each position, float32 `[L, D]`."""
    found = [part[0].flatten(1).float() for part in tensors(output) if part.dim() > 2 and part.shape[:2] == (1, length)]
    return torch.cat(found, dim=1) if found else None


def _copy(value: Any) -> Any:
    if torch.is_tensor(value):
        return value.clone()
    if isinstance(value, dict):
        return {name: _copy(part) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_copy(part) for part in value)
    return value
