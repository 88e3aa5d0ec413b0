"""Pads inside a flat model what mixes positions and knows no documents, and proves that documents are isolated.

    padding = pad_mixers(model)
    padding.says()                  # "padded inside: 3 mixers (Qwen3NextGatedDeltaNet)"
    padding.remove()

Tried in this order, and taken where the proof holds: the mixers of each layer; the same with groups of equal length; the
whole backbone. The proof compares documents in one flat row with each of them alone: outputs, what moves when another
document changes, and gradients with non-zero adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

from torch import nn
from torch.utils.hooks import RemovableHandle

from packtrain.errors import ModelError
from packtrain.modeling.audit.settings import base
from packtrain.modeling.mixers.finding import Found, layers
from packtrain.modeling.mixers.hooks import Current, Forget, Join, Learn, Pad, Remember
from packtrain.modeling.mixers.view import Conversion

Padded = dict[str, tuple[nn.Module, Conversion]]
Proof = TypeVar("Proof")


class Padding:
    """The hooks of one model, as they were installed; `remove()` takes them away.

    Attributes:
        modules: the modules that are padded inside, by name.
        whole: whether that is the backbone.
    """

    def __init__(self, model: nn.Module, found: Found, padded: Padded):
        self.modules = {name: module for name, (module, _) in padded.items()}
        self.whole = any(conversion.whole for _, conversion in padded.values())
        self._padded, self._found = padded, found
        self._pads: list[Pad] = []
        self._handles: list[RemovableHandle] = []
        inside = [] if found.backbone is None else [found.backbone[1]]
        owners = list(dict.fromkeys([model, base(model), *inside]))
        current = Current()
        for number, owner in enumerate(owners):
            self._add(owner.register_forward_pre_hook(Learn(current, outermost=number == 0), with_kwargs=True))
        for module, conversion in padded.values():
            pad = Pad(current, conversion)
            self._pads.append(pad)
            self._add(module.register_forward_pre_hook(pad, with_kwargs=True))
            self._add(module.register_forward_hook(Join(pad), with_kwargs=True))
        for module in [*_around(model, list(self.modules)), *owners]:
            self._add(module.register_forward_hook(Remember(current)))
        for owner in owners:
            self._add(owner.register_forward_hook(Forget(current)))

    def call_alike_on_all_ranks(self) -> None:
        """Lets ranks that gather weights together (ZeRO-3) do so equally often, however many groups each of them has.

        The weights of a mixer are gathered once for all of its groups; the backbone computes one group.

        Raises:
            ModelError: the backbone has to be given groups of equal length.
        """
        for pad in self._pads:
            if not self.whole:
                continue
            if pad.conversion.grouping == "equal lengths":
                what = "is exact for documents of one length at a time only, and ranks differ in how many lengths they have"
                raise ModelError(what, key="model", fix="choose a padded strategy (pad_longest), or ZeRO-2")
            pad.conversion = replace(pad.conversion, grouping="one")
        if not self.whole:
            from deepspeed.utils import set_z3_leaf_module

            for module in self.modules.values():
                set_z3_leaf_module(module, True)

    def _add(self, handle: RemovableHandle) -> None:
        self._handles.append(handle)

    def remove(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def in_all_layers(self, model: nn.Module) -> Padding:
        """Pads inside the same modules of every layer of a model, of which the first layers were tried."""
        if self.whole:
            return self
        self.remove()
        tried, every = layers(model), {}
        kinds = {}
        for name, (module, conversion) in self._padded.items():
            layer = next(layer for layer in tried if name.startswith(f"{layer}."))
            kinds[name.removeprefix(f"{layer}."), type(module)] = conversion
        for layer, owner in tried.items():
            for name, module in owner.named_modules():
                if (name, type(module)) in kinds:
                    every[f"{layer}.{name}"] = (module, kinds[name, type(module)])
        return Padding(model, self._found, every)

    def says(self) -> str:
        """Says what is padded inside."""
        kinds = ", ".join(dict.fromkeys(type(module).__name__ for module in self.modules.values()))
        if self.whole:
            return f"padded inside: {kinds}"
        count = len(self.modules)
        return f"padded inside: {count} mixer{'s' if count > 1 else ''} ({kinds})"


def _around(model: nn.Module, names: list[str]) -> list[nn.Module]:
    """Returns the modules that contain a mixer."""
    return [module for name, module in model.named_modules() if any(one.startswith(f"{name}.") for one in names)]


def find_padding(
    model: nn.Module,
    found: Found,
    prove: Callable[[], Proof],
    holds: Callable[[Proof], bool],
    *,
    costly: bool = True,
) -> tuple[Padding, Proof] | None:
    """Pads inside what has to be for documents to be isolated, the smallest modules first.

    Args:
        prove, holds: run the model flat, and say whether its documents were isolated.
        costly: whether also to try what computes as much as padding does: the whole backbone, groups of equal lengths.

    Returns:
        None where nothing helps; the model is left as it was.
    """
    for padded in attempts(found):
        if not costly and any(one.whole or one.grouping == "equal lengths" for _, one in padded.values()):
            continue
        padding = Padding(model, found, padded)
        try:
            proof = prove()
        except BaseException:
            padding.remove()
            raise
        if holds(proof):
            return padding, proof
        padding.remove()
    return None


def attempts(found: Found) -> Iterator[Padded]:
    """Yields what may be padded inside, in the order in which to try."""
    mixers, whole = found.mixers, Conversion(whole=True)
    if mixers:
        for own in (Conversion(), Conversion(biases="shared")):
            yield {mixer.name: (mixer.module, replace(own, causal=mixer.causal)) for mixer in mixers}
    if found.backbone is not None:
        name, inner = found.backbone
        yield {name: (inner, whole)}
    if not all(mixer.causal for mixer in mixers):
        equal = Conversion(grouping="equal lengths", causal=False)
        yield {mixer.name: (mixer.module, equal) for mixer in mixers}
    if found.backbone is not None:
        yield {name: (inner, replace(whole, grouping="equal lengths"))}
