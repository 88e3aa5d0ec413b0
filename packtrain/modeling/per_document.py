"""Lets arithmetic that depends on the longest row of a micro-batch, or on the place in a row, be that of each document.

Three kinds of models compute something else for a document in company than for the same document alone, and not only when
documents are packed: padding them does the same.

- *LongRoPE* (Phi-3 and its family) has two sets of rotary frequencies and takes the long one for all rows of a micro-batch
  as soon as one of them is longer than `original_max_position_embeddings`.
- *Dynamic NTK* RoPE stretches its frequencies by the longest row of a micro-batch, and goes on with the longest that it has
  met.
- *Llama 4* scales the queries of its layers without rotary positions by the place of a token in its row.

What is right is the document alone, as a trained model will read it. Public hooks on the modules compute that: from
`position_ids`, which restart with every document, in padded and flat batches alike. Documents below the threshold keep what
they had; nothing is read back to the host but by dynamic NTK, as in transformers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from packtrain.modeling.audit.settings import base
from packtrain.modeling.equality import same_frequencies

_POSITIONS = "packtrain_positions"  # the argument by which a layer hands them on
SHORT = 6  # tokens: what thresholds become for a check, so that its documents are on both sides of them


# -------------------------------------------------------------------------------------------------- the hooks


@dataclass(frozen=True)
class RotaryPerDocument:
    """The hook behind a rotary embedding: chooses frequencies by the length of each document, not of the longest."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        x, positions, layer_type = given["x"], given.get("position_ids"), given.get("layer_type")
        kind, threshold = rope_kind(module, layer_type)
        if threshold is None or positions is None or positions.dim() != 2:
            return None
        more = {} if layer_type is None else {"layer_type": layer_type}

        def embed(positions: Tensor) -> Any:  # past this hook
            return module.forward(x, positions, **more)

        lengths = document_lengths(positions)
        if kind == "dynamic":
            embed(torch.zeros_like(positions[:, :1]))  # back to its own frequencies, from those of the longest so far
        short = embed(positions.clamp(max=threshold - 1))
        if kind == "longrope":
            return _where(lengths > threshold, _as_in_length(embed, positions, threshold + 1), short)
        result = short
        for length in lengths[lengths > threshold].unique().tolist():
            result = _where(lengths == length, _as_in_length(embed, positions.clamp(max=length - 1), length), result)
            embed(torch.zeros_like(positions[:, :1]))
        return result


def document_lengths(positions: Tensor) -> Tensor:
    """Returns for every token the number of positions of its document, int64 `[B, T]`: one more than its last position.

    >>> document_lengths(torch.tensor([[0, 1, 2, 0, 0, 1]]))
    tensor([[3, 3, 3, 1, 2, 2]])
    """
    rows, width = positions.shape
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[:, 1:] = positions[:, 1:] <= positions[:, :-1]
    number = begins.flatten().cumsum(0) - 1
    longest = torch.zeros_like(number).scatter_reduce(0, number, positions.flatten() + 1, "amax")
    return longest[number].view(rows, width)


def _as_in_length(embed: Callable[[Tensor], Any], positions: Tensor, length: int) -> Any:
    """Embeds positions as in a row of that length, by one more token at its end."""
    last = torch.full_like(positions[:, :1], length - 1)
    return _each(lambda part: part[:, :-1], embed(torch.cat([positions, last], dim=1)))


def _where(choice: Tensor, one: Any, other: Any) -> Any:
    return _each(lambda a, b: torch.where(choice[..., None], a, b), one, other)


def _each(function: Callable[..., Tensor], *values: Any) -> Any:
    if isinstance(values[0], tuple):
        return tuple(function(*parts) for parts in zip(*values, strict=True))
    return function(*values)


@dataclass(frozen=True)
class PositionsOfTokens:
    """The hook before a model: numbers the real tokens of padded rows, and no padding.

    Positions then say how long a row is without its padding.
    """

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        mask, cache = given.get("attention_mask"), given.get("past_key_values")
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if cache is not None or not torch.is_tensor(mask) or tokens is None:
            return None
        if mask.dim() != 2 or mask.shape != tokens.shape[:2]:
            return None
        positions = given.get("position_ids")
        if positions is None:
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        elif positions.shape != mask.shape:
            return None
        return (), given | {"position_ids": positions * (mask != 0)}  # at padding they would run on


@dataclass(frozen=True)
class HandOverPositions:
    """The hook before a layer: hands its positions to its attention, also where the layer runs again for its gradients."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, kwargs | {_POSITIONS: kwargs.get("position_ids")}


@dataclass
class _Places:
    """Where the tokens of a call of an attention module are: their positions, and the tokens before them in its cache."""

    positions: Tensor | None = None
    past: int = 0


@dataclass(frozen=True)
class NotePositions:
    """The hook before an attention module: notes positions for the query projection inside it."""

    places: _Places

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        cache = kwargs.get("past_key_values")
        self.places.past = 0 if cache is None else cache.get_seq_length(getattr(module, "layer_idx", 0))
        self.places.positions = kwargs.get(_POSITIONS)
        return args, {name: value for name, value in kwargs.items() if name != _POSITIONS}


@dataclass(frozen=True)
class ScaleByPosition:
    """The hook behind the query projection of Llama 4: replaces the scale of a token's place in its row, which the attention
    will apply, by that of its position."""

    places: _Places
    floor: Callable[[], float]
    strength: float

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        positions, self.places.positions = self.places.positions, None
        if positions is None:
            return None
        in_row = torch.arange(output.shape[1], device=output.device) + self.places.past
        scale = self._scale(positions) / self._scale(in_row)
        return (output * scale[..., None]).to(output.dtype)

    def _scale(self, positions: Tensor) -> Tensor:
        return torch.log1p(torch.floor((positions.float() + 1.0) / self.floor())) * self.strength + 1.0


@dataclass(frozen=True)
class _Attribute:
    """The value of a module's attribute at the time of a call."""

    module: nn.Module
    name: str

    def __call__(self) -> Any:
        return getattr(self.module, self.name)


# ------------------------------------------------------------------------------------------------ the models


class PerDocument:
    """What `compute_per_document` has installed: `remove()` takes it away, and so does leaving a `with` block.

    Attributes:
        what: what is computed per document, in words; empty where nothing has to be.
        threshold: the fewest tokens of a document or row above which that makes a difference; None where nothing does.
    """

    def __init__(self, what: list[str], threshold: int | None, handles: list[RemovableHandle]):
        self.what, self.threshold, self._handles = what, threshold, handles

    def remove(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> PerDocument:
        return self

    def __exit__(self, *failure: object) -> None:
        self.remove()


def compute_per_document(model: nn.Module, *, rotary: bool = True) -> PerDocument:
    """Lets a model compute for every document of a micro-batch what it computes for that document alone.

    A model that has it already, or does not need it, is left as it is.

    Args:
        model: a transformers model, with or without an adapter.
        rotary: whether rotary frequencies are among it; `unpad` leaves those to the longest row, as they were.
    """
    what: list[str] = []
    handles: list[RemovableHandle] = []
    for module in list(model.modules()):
        if rotary and (kind := rope_kinds(module)) and not _has(module, RotaryPerDocument):
            handles.append(module.register_forward_hook(RotaryPerDocument(), with_kwargs=True))
            what.append(f"rotary frequencies ({kind})")
        attention: Any = getattr(module, "self_attn", None)
        if scales_by_place(attention) and not _has(attention.q_proj, ScaleByPosition):
            places = _Places()
            scale = ScaleByPosition(places, _Attribute(attention, "floor_scale"), attention.attn_scale)
            handles.append(module.register_forward_pre_hook(HandOverPositions(), with_kwargs=True))
            handles.append(attention.register_forward_pre_hook(NotePositions(places), with_kwargs=True))
            handles.append(attention.q_proj.register_forward_hook(scale))
            what.append("the scale of queries by position")
    if what and rotary:
        handles.append(base(model).register_forward_pre_hook(PositionsOfTokens(), with_kwargs=True))
    return PerDocument(list(dict.fromkeys(what)), threshold_of(model), handles)


def _has(module: nn.Module, kind: type) -> bool:
    return any(isinstance(hook, kind) for hook in module._forward_hooks.values())


def scales_by_place(attention: Any) -> bool:
    """Returns whether an attention module scales queries by their place in the row (Llama 4's without rotary positions)."""
    wanted = ("attn_temperature_tuning", "floor_scale", "attn_scale", "use_rope", "q_proj")
    if not isinstance(attention, nn.Module) or not all(hasattr(attention, name) for name in wanted):
        return False
    return bool(attention.attn_temperature_tuning) and not attention.use_rope


def rope_kinds(module: nn.Module) -> str | None:
    """Returns "longrope" or "dynamic" for a rotary embedding of that kind, in any of its layer types."""
    kinds = getattr(module, "rope_type", None)
    if kinds is None or not {"x", "position_ids"} <= inspect.signature(module.forward).parameters.keys():
        return None
    kinds = list(kinds.values()) if isinstance(kinds, dict) else [kinds]
    found = (_known(kind) for kind in kinds if isinstance(kind, str))
    return next((kind for kind in found if kind), None)


def rope_kind(module: Any, layer_type: str | None) -> tuple[str | None, int | None]:
    """Returns the kind of a rotary embedding for one type of layers, and its threshold in tokens."""
    kind = module.rope_type if layer_type is None else module.rope_type[layer_type]
    if _known(kind) == "longrope":
        parameters = module.config.rope_parameters
        parameters = parameters if layer_type is None else parameters[layer_type]
        return "longrope", parameters["original_max_position_embeddings"]
    return (_known(kind), module.original_max_seq_len) if _known(kind) else (None, None)


def _known(kind: str) -> str | None:
    return "longrope" if kind == "longrope" else "dynamic" if "dynamic" in kind else None


# ------------------------------------------------------------------------------------------------ thresholds


def threshold_of(model: nn.Module) -> int | None:
    """Returns the fewest tokens above which a model's arithmetic depends on the longest row or on the place in it; None
    where it never does."""
    return min((value for _, _, value in _thresholds(model)), default=None)


@contextmanager
def small_thresholds(model: nn.Module, *, longest: int | None = None, rotary: bool = True) -> Iterator[int | None]:
    """Makes the thresholds of a model so small while open that documents of a check are on both sides of them.

    Args:
        longest: tokens of the longest row of the data: thresholds that it does not reach are left alone.
        rotary: whether those of rotary embeddings are among them.

    Yields:
        The smallest of the thresholds that were cut, None for none.
    """
    cut = [
        (owner, name, value)
        for owner, name, value in _thresholds(model, rotary=rotary)
        if value > SHORT and (longest is None or longest > value)
    ]
    try:
        with same_frequencies(model):
            for owner, name, _ in cut:
                _set(owner, name, SHORT)
            yield min((value for _, _, value in cut), default=None)
    finally:
        for owner, name, value in cut:
            _set(owner, name, value)


def _thresholds(model: nn.Module, *, rotary: bool = True) -> list[tuple[Any, str, int]]:
    """Returns where a model keeps thresholds: object or mapping, name, value."""
    found: dict[tuple[int, str], tuple[Any, str, Any]] = {}

    def add(owner: Any, name: str) -> None:
        value = owner.get(name) if isinstance(owner, dict) else getattr(owner, name, None)
        if value is not None:
            found[id(owner), name] = (owner, name, int(value))

    for module in model.modules():
        if scales_by_place(module):
            add(module, "floor_scale")
        kind = rope_kinds(module) if rotary else None
        config: Any = getattr(module, "config", None)
        parameters = getattr(config, "rope_parameters", None) or {}
        nested = [part for part in (parameters, *parameters.values()) if isinstance(part, dict)]
        for part in nested if rotary else ():
            if kind == "longrope" or "llama_4_scaling_beta" in part:  # Ministral's scale, by position_ids
                add(part, "original_max_position_embeddings")
        if kind == "longrope":
            add(config, "original_max_position_embeddings")  # Phi-3's, from which the mapping is renewed
        if kind == "dynamic":
            add(module, "original_max_seq_len")
            add(module, "max_seq_len_cached")
            add(config, "max_position_embeddings")
    return list(found.values())


def _set(owner: Any, name: str, value: int) -> None:
    if isinstance(owner, dict):
        owner[name] = value
    else:
        setattr(owner, name, value)


def depends_on_length(threshold: int) -> str:
    """Says why documents of different lengths are not what they are alone."""
    return (
        f"above {threshold:,} tokens its arithmetic depends on the longest row of a micro-batch or on places in a row"
    )
