"""The hooks of a model that is flat outside and padded inside.

| hook | on | does |
|---|---|---|
| `Learn`, `Forget` | the model | know the documents of the forward pass that is running |
| `Remember` | the model, and all that contains a mixer | tells them to the backward pass, which may compute layers again |
| `Pad`, `Join` | a mixer | one group of padded documents in; the other groups, and one flat row out |

All are callable objects at module level. Those of one model share a `Current`, and keep doing so when the model is
pickled, copied or saved.

Checkpointed layers run again in the backward pass, when another forward pass may have run since. The gradient of an
output of a layer is known before anything of that layer is computed again, so a hook on it says which documents
these are.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from packtrain.errors import ModelError
from packtrain.modeling.attention.documents import documents_in
from packtrain.modeling.attention.kernels import Documents
from packtrain.modeling.mixers.view import Conversion, Grouping, Views, flat


@dataclass
class Current:
    """The documents that are computed now, by a forward pass or for the second time.

    Attributes:
        documents: None where a batch is not flat, and outside of forward passes.
        told: whether the model itself was called, and has told the modules inside.
    """

    documents: Documents | None = None
    told: bool = False
    _views: dict[Grouping, tuple[Documents, Views]] = field(default_factory=dict, repr=False)

    def views(self, grouping: Grouping) -> Views:
        """Returns the padded views of the documents, made once per forward pass."""
        documents = self.documents
        assert documents is not None
        known = self._views.get(grouping)
        if known is None or known[0] is not documents:
            known = (documents, Views.of(documents.bounds, documents.device, grouping))
            self._views[grouping] = known
        return known[1]

    def __getstate__(self) -> dict[str, Any]:
        return {"documents": None, "told": False, "_views": {}}


@dataclass(frozen=True)
class Learn:
    """The hook before a model: notes the documents of a flat batch.

    Attributes:
        outermost: whether this is the model that is called, rather than one inside it.
    """

    current: Current
    outermost: bool = True

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        documents = documents_in(kwargs)
        if documents is not None:
            self.current.documents = documents
        elif self.outermost or not self.current.told:
            self.current.documents = None
        self.current.told = self.outermost or self.current.told


@dataclass(frozen=True)
class Forget:
    """The hook behind a model."""

    current: Current

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.current.documents, self.current.told = None, False


@dataclass(frozen=True)
class Recall:
    """The hook on the gradient of an output: what is computed again now is of these documents."""

    current: Current
    documents: Documents | None

    def __call__(self, gradient: Tensor) -> None:
        self.current.documents = self.documents


@dataclass(frozen=True)
class Remember:
    """The hook behind a layer: ties the documents to the gradients of its outputs."""

    current: Current

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        recall = Recall(self.current, self.current.documents)
        for part in tensors(output):
            if part.requires_grad:
                part.register_hook(recall)


@dataclass
class Pad:
    """The hook before a mixer: turns one flat row into the first group of padded documents.

    It leaves a call as it is where the batch is not flat.

    Raises:
        ModelError: the documents are not those of the row.
    """

    current: Current
    conversion: Conversion
    pending: tuple[tuple, dict[str, Any], Views] | None = field(default=None, repr=False)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        self.pending = None
        if self.current.documents is None:
            return None
        views = self.current.views(self.conversion.grouping)
        if not any(part.shape[:2] == (1, views.total) for part in tensors((args, kwargs))):
            what = f"{type(module).__name__} got no row of {views.total} tokens, as many as the documents have"
            raise ModelError(what, key="model", fix="use a padded layout for virtual tokens (prompt tuning)")
        args, kwargs = bound(module, args, kwargs, by_name=self.conversion.whole)
        self.pending = (args, kwargs, views)
        return self.conversion.padded(names(module, args), args, kwargs, views, views.groups[0])

    def __getstate__(self) -> dict[str, Any]:
        return {"current": self.current, "conversion": self.conversion, "pending": None}


@dataclass(frozen=True)
class Join:
    """The hook behind a mixer: computes the other groups, and puts all back into one flat row."""

    pad: Pad

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if self.pad.pending is None:
            return None
        args, kwargs, views = self.pad.pending
        self.pad.pending = None
        outputs = [output]
        for group in views.groups[1:]:
            these, named = self.pad.conversion.padded(names(module, args), args, kwargs, views, group)
            outputs.append(module.forward(*these, **named))
        return flat(outputs, views)


def bound(module: nn.Module, args: tuple, kwargs: dict[str, Any], *, by_name: bool) -> tuple[tuple, dict[str, Any]]:
    """Returns a module's arguments all by name, or as many by position as can be: hooks on gradients (ZeRO-3's) see no
    others."""
    signature = inspect.signature(module.forward)
    found = signature.bind(*args, **kwargs)
    if not by_name:
        return found.args, found.kwargs
    more = [name for name, one in signature.parameters.items() if one.kind is inspect.Parameter.VAR_KEYWORD]
    rest = found.arguments.pop(more[0], {}) if more else {}
    return (), found.arguments | rest


def names(module: nn.Module, args: tuple) -> list[str]:
    """Returns the names of a module's positional arguments."""
    known = [name for name, one in inspect.signature(module.forward).parameters.items() if one.kind < 2]
    return (known + [""] * len(args))[: len(args)]


def tensors(values: Any) -> Iterator[Tensor]:
    """Yields the tensors inside tuples, lists and mappings."""
    if torch.is_tensor(values):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from tensors(value)
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from tensors(value)
