"""The proof of `packtrain.unpad`: does a module give the same padded and flat?"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from packtrain.errors import ModelError
from packtrain.modeling.attention.varlen import NAME
from packtrain.modeling.audit.probe import precision
from packtrain.modeling.audit.settings import COUNTED, register_counted, switchable, using
from packtrain.modeling.flatten import FLAT, RULES, Flatten, Scatter, use_attention
from packtrain.modeling.mixers.finding import find_mixers
from packtrain.modeling.mixers.padding import Padding, find_padding

_LENGTHS = (4, 1, 13, 9)  # of the rows that a model is asked with
_WINDOW = 6  # what windows are cut to meanwhile, so that rows reach beyond them
_WINDOWS = ("sliding_window", "attention_chunk_size")  # names of fields, and of attributes of layers
_LARGE = 50_000_000  # weights, above which gradients are compared at the embeddings only

Given = dict[str, Tensor]  # what a module gives for ragged rows, by name


# ------------------------------------------------------------------------------------------------ a module


def find_hook(name: str, border: PreTrainedModel) -> tuple[Flatten, Padding | None]:
    """Finds the hook before a module with which it gives what it gave, by asking it.

    A module that mixes tokens otherwise than by attention that is looked up by name is padded inside. It is left with
    `packtrain_varlen`, where it takes that.

    Returns:
        The hook, and what was padded inside.

    Raises:
        ModelError: there is none.
    """
    own, stretches = border.config._attn_implementation, stretches_at(border)
    padded = {left: _ask(border, left) for left in (False, True)}
    by_name = own == NAME or switchable(border, NAME)
    plain = Flatten(attention=own, within=NAME if by_name else own, stretches_at=stretches)
    use_attention(border, plain.within)
    if by_name:
        try:
            return _find_rule(name, border, padded, plain), None
        except ModelError as error:
            refusal = error
    else:
        what = f"{type(border).__name__} does not look up its attention by name, so its rows cannot be kept apart"
        refusal = ModelError(what, key=name or "model", fix="leave the model padded")

    def prove() -> Flatten | None:
        try:
            return _find_rule(name, border, padded, plain)
        except ModelError:
            return None

    register_counted()
    ids, mask = _ragged(border.config, left=False)
    with using(border, COUNTED.name if by_name else None):
        found = find_mixers(border, [ids[mask.sum(1).argmax()].to(border.device)])
    inside = find_padding(border, found, prove, lambda hook: hook is not None, costly=False)
    if inside is None or inside[1] is None:
        raise refusal
    return inside[1], inside[0]


def _find_rule(name: str, border: PreTrainedModel, padded: dict[bool, Given], plain: Flatten) -> Flatten:
    """Finds how a module numbers positions, see `find_hook`.

    Args:
        padded: what it gives padded on the right (False) and on the left (True).
        plain: the hook but for that.
    """
    tolerance = precision(next(border.parameters()).dtype)
    worst: list[tuple[float, str, Flatten]] = []
    for rule in RULES:
        hook = replace(plain, positions=rule)
        right, what = _difference(padded[False], _ask_flat(border, hook, False))
        if right <= tolerance:
            left, _ = _difference(padded[True], _ask_flat(border, hook, True))
            if left <= tolerance:
                return hook
        worst.append((right, what, hook))
    right, what, hook = min(worst, key=lambda one: one[0])
    if right <= tolerance:
        return replace(hook, left=False)
    what = (
        f"{type(border).__name__} does not give the same without padding: its {what} differs by {right:.1e} "
        f"(allowed {tolerance:.0e})"
    )
    fix = "see `packtrain audit` for what mixes tokens beside its attention; leave the model padded"
    raise ModelError(what, key=name or "model", fix=fix)


def stretches_at(module: nn.Module) -> int | None:
    """Returns the length above which rotary embeddings depend on the longest row of a batch (dynamic NTK, LongRoPE)."""
    found = []
    for inner in module.modules():
        kinds = getattr(inner, "rope_type", None)
        kinds = list(kinds.values()) if isinstance(kinds, dict) else [kinds]
        if any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in kinds):
            config: Any = inner.config
            parameters = config.rope_parameters if isinstance(config.rope_parameters, dict) else {}
            nested = [part for part in (parameters, *parameters.values()) if isinstance(part, dict)]
            lengths = [part.get("original_max_position_embeddings") for part in nested]
            found += [length for length in (*lengths, config.max_position_embeddings) if length is not None]
    return min(found, default=None)


def _ask_flat(border: PreTrainedModel, hook: Flatten, left: bool) -> Given:
    handles = [
        border.register_forward_pre_hook(hook, with_kwargs=True, prepend=True),
        border.register_forward_hook(Scatter(hook.within), with_kwargs=True),
    ]
    try:
        return _ask(border, left)
    except (RuntimeError, IndexError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, ModelError):
            raise
        what = f"{type(border).__name__} fails without padding: {type(error).__name__}: {error}"
        raise ModelError(what, key="model", fix="leave it padded") from error
    finally:
        for handle in handles:
            handle.remove()


def _ask(module: PreTrainedModel, left: bool) -> Given:
    """Returns a module's outputs at the real tokens of ragged rows, and gradients of a random projection of them."""
    table: Any = module.get_input_embeddings()
    ids, mask = (part.to(table.weight.device) for part in _ragged(module.config, left))
    generator = torch.Generator().manual_seed(1)
    embedded: list[Tensor] = []
    capture = table.register_forward_hook(_Capture(embedded))
    try:
        with torch.enable_grad():
            given = _at_tokens(module(input_ids=ids, attention_mask=mask), mask)
            loss = torch.zeros((), device=mask.device)
            for part in given.values():
                loss = loss + (part * torch.randn(part.shape, generator=generator).to(part)).sum()
            trained = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
            if sum(weight.numel() for weight in trained.values()) > _LARGE:
                trained = {}
            found = torch.autograd.grad(loss, [*embedded, *trained.values()], allow_unused=True)
    finally:
        capture.remove()
    gradients = {"gradient of the embeddings": found[0]} if len(embedded) == 1 else {}
    for name, part in gradients.items():  # as outputs: of the real tokens
        gradients[name] = part[mask.bool()] if part.shape[:2] == mask.shape else part[0]
    gradients |= {f"gradient of `{name}`": part for name, part in zip(trained, found[len(embedded) :], strict=True)}
    return {name: part.detach().float() for name, part in (given | gradients).items() if part is not None}


# ------------------------------------------------------------------------------------------- the whole model


def outputs_of(model: nn.Module, borders: Iterable[PreTrainedModel]) -> dict[bool, Given] | None:
    """Returns a model's outputs for rows padded on the right (False) and on the left (True): of every row, every real token,
    and scalars such as a router loss. None for a model that needs more than token ids and a mask.

    Heads for question answering are asked for their loss: its softmax is over all of a row, padding included."""
    border = next(iter(borders))
    spans = {"start_positions", "end_positions"} & inspect.signature(model.forward).parameters.keys()
    given = {}
    for left in (False, True):
        ids, mask = (part.to(border.device) for part in _ragged(border.config, left))
        try:
            with torch.no_grad():
                answers = dict.fromkeys(spans, mask.argmax(1))
                given[left] = _at_tokens(model(input_ids=ids, attention_mask=mask, **answers), mask)
        except Exception:  # whatever a model says that also needs pictures
            return None
    return given


def check_whole(model: nn.Module, borders: Iterable[PreTrainedModel], before: dict[bool, Given]) -> bool:
    """Checks that a model with its hooks still gives what it gave; returns whether that includes rows padded on the left.

    Raises:
        ModelError: it does not, or no module runs flat inside it.
    """
    seen: list[bool] = []
    borders = list(borders)
    handles = [border.register_forward_pre_hook(_See(seen), with_kwargs=True) for border in borders]
    try:
        after = outputs_of(model, borders)
    finally:
        for handle in handles:
            handle.remove()
    if not any(seen):
        what = f"{type(model).__name__} passes {type(borders[0]).__name__} something else than a mask of its rows"
        raise ModelError(what, key="model", fix="leave it padded")
    tolerance = precision(next(model.parameters()).dtype)
    right, what = _difference(before[False], (after or {}).get(False, {}))
    if not right <= tolerance:
        what = f"{type(model).__name__} reads padding: its {what} differs by {right:.1e} (allowed {tolerance:.0e})"
        raise ModelError(what, key="model", fix="leave it padded")
    return _difference(before[True], (after or {}).get(True, {}))[0] <= tolerance


# ------------------------------------------------------------------------------------------- rows and outputs


def _ragged(config: PreTrainedConfig, left: bool) -> tuple[Tensor, Tensor]:
    """Returns ids and attention mask of ragged rows, int64 `[B, T]`, the same at every call. The longest has mask tokens,
    which ESM counts."""
    generator = torch.Generator().manual_seed(0)
    width = max(_LENGTHS)
    special = {getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "cls", "sep", "mask")}
    pad = getattr(config, "pad_token_id", None) or 0
    usual = [token for token in range(min(config.vocab_size, 997)) if token not in special and token != pad]
    ids = torch.full((len(_LENGTHS), width), pad)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(_LENGTHS):
        columns = slice(width - length, width) if left else slice(0, length)
        ids[row, columns] = torch.tensor(usual)[torch.randint(len(usual), (length,), generator=generator)]
        mask[row, columns] = 1
    hidden = getattr(config, "mask_token_id", None)
    if hidden is not None and hidden < config.vocab_size:
        ids[_LENGTHS.index(width), 3::7] = hidden
    return ids, mask


def _at_tokens(outputs: Any, mask: Tensor) -> Given:
    """Returns the tensors among outputs, in float32: `[N, ...]` of what has an entry per token, the rest as it is."""
    if not hasattr(outputs, "items"):
        outputs = dict(enumerate(outputs)) if isinstance(outputs, tuple) else {0: outputs}
    real = mask.bool()
    return {
        f"`{name}`": (part[real] if part.shape[:2] == mask.shape else part).float()
        for name, part in outputs.items()
        if torch.is_tensor(part)
    }


@dataclass(frozen=True)
class _Capture:
    """Collects the embeddings, as tensors that gradients reach also where the table is frozen."""

    into: list[Tensor]

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        output = output if output.requires_grad else output.detach().requires_grad_()
        self.into.append(output)
        return output


@dataclass(frozen=True)
class _See:
    """Notes whether a module is called with a flat row."""

    into: list[bool]

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.into.append(kwargs.get(FLAT) is not None)


def _difference(one: Given, other: Given) -> tuple[float, str]:
    """Returns the largest difference and where it is: as a share of the largest output of that name, or of the largest
    gradient of all, as some are 0 but for rounding (a bias of keys). Infinite where they don't compare."""
    shapes, others = ({name: part.shape for name, part in given.items()} for given in (one, other))
    if shapes != others:
        return float("inf"), next(iter(name for name in {**shapes, **others} if shapes.get(name) != others.get(name)))
    steepest = max((_largest(part) for name, part in one.items() if name.startswith("gradient")), default=0.0)
    worst = (0.0, "output")
    for name, part in one.items():
        scale = steepest if name.startswith("gradient") else _largest(part)
        apart = _largest(part - other[name])
        share = apart / scale if scale else apart
        worst = max(worst, (share if share == share else float("inf"), name))
    return worst


def _largest(part: Tensor) -> float:
    return float(part.abs().max()) if part.numel() else 0.0


# ------------------------------------------------------------------------------------------------ meanwhile


@contextmanager
def short_windows(modules: Iterable[PreTrainedModel]) -> Iterator[None]:
    """Cuts attention windows below the length of the rows that a model is asked with, for as long as it is open."""
    before = []
    for module in modules:
        for name in _WINDOWS:
            width = getattr(module.config, name, None)
            cut = width - _WINDOW if isinstance(width, int) else 0
            if cut <= 0:
                continue
            for owner in (module.config, *module.modules()):
                value = getattr(owner, name, None)
                if isinstance(value, int) and value > cut:
                    before.append((owner, name, value))
                    setattr(owner, name, value - cut)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


@contextmanager
def same_frequencies(model: nn.Module) -> Iterator[None]:
    """Restores what rotary embeddings remember of the longest row they have met (dynamic NTK)."""
    rotary = [module for module in model.modules() if hasattr(module, "rope_type")]
    before = [
        (dict(vars(module)), {name: buffer.clone() for name, buffer in module._buffers.items() if buffer is not None})
        for module in rotary
    ]
    try:
        yield
    finally:
        for module, (attributes, buffers) in zip(rotary, before, strict=True):
            vars(module).update(attributes)
            module._buffers.update(buffers)


def _adapters(model: nn.Module) -> set[str]:
    """Returns what the names of adapters' weights have in them: LoRA's, and those of peft's other tuners."""
    prefix = getattr(getattr(model, "base_model", None), "prefix", None)
    return {"lora_", "adapter"} | ({prefix} if isinstance(prefix, str) and prefix else set())


@contextmanager
def nonzero_adapters(model: nn.Module) -> Iterator[None]:
    """Draws the zero matrices of adapters at random: a difference that goes through an adapter shows only then."""
    generator = torch.Generator().manual_seed(1)
    zeros = [
        weight for name, weight in model.named_parameters()
        if any(part in name for part in _adapters(model)) and not weight.detach().any()
    ]  # fmt: skip
    with torch.no_grad():
        for weight in zeros:
            weight.copy_(torch.randn(weight.shape, generator=generator).to(weight) * 0.02)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight in zeros:
                weight.zero_()
