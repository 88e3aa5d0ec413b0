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
2-D, attention weights as outputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from packtrain.data.formats import IGNORED
from packtrain.errors import ModelError
from packtrain.modeling.attention.kernels import Documents
from packtrain.modeling.attention.varlen import NAME, register
from packtrain.modeling.audit.probe import precision
from packtrain.modeling.audit.settings import base, in_mode, quietly

Rule = Literal["columns", "real tokens", "tokens behind padding_idx"]
RULES: tuple[Rule, ...] = ("columns", "real tokens", "tokens behind padding_idx")
_LENGTHS = (5, 1, 29, 12)  # of the rows that a model is asked with
_FLAT = "cu_seq_lens_q"
_LARGE = 50_000_000  # weights, above which gradients are compared at the embeddings only


class Unpadding:
    """What `unpad` has installed: `remove()` takes it away, and so does leaving a `with` block.

    Attributes:
        modules: names of the modules whose layers run without padding.
    """

    def __init__(self, model: nn.Module, borders: dict[str, PreTrainedModel]):
        self.modules = list(borders)
        self._before = [(border, border.config._attn_implementation) for border in borders.values()]
        self._handles: list[RemovableHandle] = []
        self._top, self._borders = base(model), borders

    def _install(self, hooks: dict[str, Flatten]) -> None:
        """Installs these hooks, in the place of those that are there."""
        self._remove_hooks()
        for name, hook in hooks.items():
            border = self._borders[name]
            border.set_attn_implementation(NAME)
            self._handles.append(border.register_forward_pre_hook(hook, with_kwargs=True))
            self._handles.append(border.register_forward_hook(Scatter(), with_kwargs=True))
        if self._top not in self._borders.values():
            self._handles.append(self._top.register_forward_pre_hook(RefuseFirstLabels(), with_kwargs=True))

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def remove(self) -> None:
        """Removes the hooks, and gives the model its own attention back."""
        self._remove_hooks()
        for border, implementation in self._before:
            if border.config._attn_implementation != implementation:
                border.set_attn_implementation(implementation)

    def __enter__(self) -> Unpadding:
        return self

    def __exit__(self, *failure: object) -> None:
        self.remove()


def unpad(model: nn.Module, *, module: nn.Module | str | None = None) -> Unpadding:
    """Lets the layers of a model run without padding, and proves on the spot that nothing else changes.

    The proof asks the module for ragged rows, padded on the right and on the left, before and after: hidden states and
    gradients must agree at every real token. Left-padded batches stay padded where they alone do not agree.

    Args:
        model: a transformers model, with or without a PEFT adapter; on its device, not yet wrapped by an engine.
        module: the module at the border, or its name; by default every innermost `PreTrainedModel` that takes an
            `attention_mask`.

    Returns:
        What was installed; see `Unpadding`.

    Raises:
        ModelError: no such module, or its outputs or gradients are not the same; the model is left as it was.
    """
    register()
    borders, top = find_borders(model, module), base(model)
    unpadding = Unpadding(model, borders)
    whole = top not in borders.values()
    try:
        with quietly(), in_mode(model, train=False), nonzero_adapters(model):
            before = {left: _ask_whole(top, borders, left) if whole else [] for left in (False, True)}
            found = {name: _find_rule(name, border) for name, border in borders.items()}
            unpadding._install(found)
            after = {left: _ask_whole(top, borders, left) if whole else [] for left in (False, True)}
            tolerance = precision(next(top.parameters()).dtype)
            right, left = (_difference(before[side], after[side]) for side in (False, True))
            if not right <= tolerance:
                what = (
                    f"{type(top).__name__} reads padding: its outputs differ by {right:.1e} (allowed {tolerance:.0e})"
                )
                raise ModelError(what, key="model", fix="leave it padded")
            if not left <= tolerance:  # the first token of a row is read, and there it is padding
                unpadding._install({name: replace(hook, left=False) for name, hook in found.items()})
    except BaseException:
        unpadding.remove()
        raise
    return unpadding


def find_borders(model: nn.Module, module: nn.Module | str | None = None) -> dict[str, PreTrainedModel]:
    """Finds the modules at the border: name in the model -> module.

    Raises:
        ModelError: there is none, or not one that can be unpadded.
    """
    named = dict(model.named_modules())
    if module is not None:
        found = {name: inner for name, inner in named.items() if name == module or inner is module}
        if not found:
            raise ModelError(
                "is not a module of the model", key="module", value=module, fix="see `model.named_modules()`"
            )
    else:
        takes_rows = {
            name: inner
            for name, inner in named.items()
            if isinstance(inner, PreTrainedModel) and _takes_rows(inner) and not inner.config.is_encoder_decoder
        }
        found = {
            name: inner
            for name, inner in takes_rows.items()
            if not any(other is not inner and other in inner.modules() for other in takes_rows.values())
        }
    for inner in found.values():
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


# ---------------------------------------------------------------------------------------------------- the hooks


@dataclass(frozen=True)
class Rows:
    """Where the tokens of a flat row come from: `[B, T]` rows, of which `index`, int64 `[N]`, are real."""

    rows: int
    width: int
    index: Tensor

    def flat(self, values: Tensor, at: int = 0) -> Tensor:
        """Returns `[..., 1, N, ...]` of `[..., B, T, ...]`, of which B is dimension `at`."""
        return values.flatten(at, at + 1).index_select(at, self.index).unsqueeze(at)

    def padded(self, values: Tensor) -> Tensor:
        """Returns `[B, T, ...]` of `[N, ...]`, 0 at padding."""
        whole = values.new_zeros(self.rows * self.width, *values.shape[1:])
        return whole.index_copy(0, self.index, values).unflatten(0, (self.rows, self.width))


@dataclass(frozen=True)
class Flatten:
    """The hook before the module. It keeps no state, so a model with it can be pickled, copied and saved.

    Attributes:
        positions: how the module numbers tokens that it is given no positions for: by their column, among the real tokens
            of their row, or (RoBERTa) among those behind its padding row.
        left: whether rows padded on the left are flattened.
    """

    positions: Rule = "columns"
    left: bool = True

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs)
        given = given.arguments | given.arguments.pop(_rest(module), {})
        mask = given.get("attention_mask")
        if not torch.is_tensor(mask) or mask.dim() != 2 or len(mask) < 2:
            return None
        if any(given.get(name) is not None for name in ("past_key_values", "cu_seq_lens_q")) or self._weights(
            module, given
        ):
            return None
        real = mask.cpu() != 0  # the one time that something is read from the device
        index = real.flatten().nonzero().flatten()
        if len(index) in (0, mask.numel()) or (not self.left and not real[:, 0].all()):
            return None
        rows = Rows(*mask.shape, index.to(mask.device))
        lengths = real.sum(1).tolist()
        ids = given.get("input_ids")
        positions = given.get("position_ids")
        if positions is None:
            positions = self._positions(module, ids, mask)
        flat = {
            name: rows.flat(value) if torch.is_tensor(value) and value.shape[:2] == mask.shape else value
            for name, value in given.items()
        }
        if positions.dim() == 3:  # one row of positions for each axis of a picture
            flat["position_ids"] = rows.flat(positions.expand(-1, *mask.shape), at=1)
        else:
            flat["position_ids"] = rows.flat(positions.expand(*mask.shape))
        flat |= {"attention_mask": None, "use_cache": False, "cache_position": None}
        flat |= _documents(lengths, mask.device, rows)
        accepted = inspect.signature(module.forward).parameters
        for name in ("use_cache", "cache_position"):
            if name not in accepted:
                flat.pop(name)
        return (), flat

    @staticmethod
    def _weights(module: nn.Module, given: dict[str, Any]) -> bool:
        asked = given.get("output_attentions")
        return bool(getattr(module.config, "output_attentions", False) if asked is None else asked)

    def _positions(self, module: nn.Module, ids: Tensor | None, mask: Tensor) -> Tensor:
        columns = torch.arange(mask.shape[1], device=mask.device)[None]
        if self.positions == "columns":
            return columns
        if self.positions == "real tokens":
            return (mask.cumsum(1) - 1).clamp(min=0)
        start = _padding_idx(module)
        if start is None or ids is None:
            return columns + (0 if start is None else start + 1)
        counted = ids.ne(start)
        return counted.cumsum(1) * counted + start


@dataclass(frozen=True)
class Scatter:
    """The hook behind the module: puts everything that has one entry per token back to `[B, T]`."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        rows = getattr(kwargs.get(_FLAT), "_packtrain_rows", None)
        if rows is None:
            return None
        if not isinstance(output, ModelOutput):
            return type(output)(_scattered(rows, value) for value in output) if isinstance(output, tuple) else output
        done = {}
        for name, value in output.items():
            if name == "router_logits":  # [N, experts] of every layer
                done[name] = tuple(rows.padded(logits).flatten(0, 1) for logits in value)
            elif name != "pooler_output":
                done[name] = _scattered(rows, value)
        if output.get("pooler_output") is not None:
            pooler: Any = module.pooler
            done["pooler_output"] = pooler(done["last_hidden_state"])
        return type(output)(**done)


@dataclass(frozen=True)
class RefuseFirstLabels:
    """Refuses what would change the loss: a supervised first token of a row padded on the left, which the padded model
    predicts from a padding token."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        mask, labels = kwargs.get("attention_mask"), kwargs.get("labels")
        if not (torch.is_tensor(mask) and torch.is_tensor(labels)) or mask.shape != labels.shape or mask.dim() != 2:
            return
        begins = (mask[:, :-1] == 0) & (mask[:, 1:] != 0)
        if bool((begins & (labels[:, 1:] != IGNORED)).any()):
            what = (
                "supervise the first token of a row that is padded on the left, and the model predicts it from padding"
            )
            raise ModelError(what, key="labels", fix=f"set them to {IGNORED} there, or pad on the right")


def _rest(module: nn.Module) -> str:
    """Returns the name of the parameter that takes all other keyword arguments."""
    parameters = inspect.signature(module.forward).parameters.values()
    return next(one.name for one in parameters if one.kind is inspect.Parameter.VAR_KEYWORD)


def _documents(lengths: list[int], device: torch.device, rows: Rows) -> dict[str, Any]:
    """Returns the arguments by which attention knows the documents of a flat row, with what is known on the host."""
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    seq_lens = bounds.to(device)
    documents = Documents(bounds=tuple(dict.fromkeys(bounds.tolist())), device=seq_lens.device)
    known = (None if seq_lens.is_inference() else seq_lens._version, documents)
    setattr(seq_lens, "_packtrain_documents", known)  # noqa: B010
    setattr(seq_lens, "_packtrain_rows", rows)  # noqa: B010
    longest = max(lengths)
    return {_FLAT: seq_lens, "cu_seq_lens_k": seq_lens, "max_length_q": longest, "max_length_k": longest}


def _scattered(rows: Rows, value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_scattered(rows, part) for part in value)
    if torch.is_tensor(value) and value.dim() >= 2 and value.shape[:2] == (1, len(rows.index)):
        return rows.padded(value[0])
    return value


def _padding_idx(module: nn.Module) -> int | None:
    for name, inner in module.named_modules():
        if name.endswith("position_embeddings") and getattr(inner, "padding_idx", None) is not None:
            return inner.padding_idx
    return None


# ---------------------------------------------------------------------------------------------------- the proof


def _find_rule(name: str, border: PreTrainedModel) -> Flatten:
    """Finds the hook before a module with which it gives what it gave, by asking it.

    Raises:
        ModelError: there is none.
    """
    if any(isinstance(hook, Flatten) for hook in border._forward_pre_hooks.values()):
        raise ModelError("is unpadded already", key=name or type(border).__name__, fix="call unpad once")
    asked = {left: _ask(border, left) for left in (False, True)}
    border.set_attn_implementation(NAME)
    tolerance = precision(next(border.parameters()).dtype)
    worst: dict[Rule, tuple[float, float]] = {}
    for rule in RULES:
        hooks = [
            border.register_forward_pre_hook(Flatten(rule), with_kwargs=True),
            border.register_forward_hook(Scatter(), with_kwargs=True),
        ]
        try:
            worst[rule] = (_difference(asked[False], _ask(border, False)), _difference(asked[True], _ask(border, True)))
        finally:
            for hook in hooks:
                hook.remove()
        if max(worst[rule]) <= tolerance:
            return Flatten(rule)
    rule = min(RULES, key=lambda rule: worst[rule][0])
    right, _ = worst[rule]
    if right <= tolerance:
        return Flatten(rule, left=False)
    what = (
        f"{type(border).__name__} does not give the same without padding: hidden states or gradients differ by {right:.1e} "
        f"(allowed {tolerance:.0e})"
    )
    fix = "see `packtrain audit` for what mixes tokens beside its attention; leave the model padded"
    raise ModelError(what, key=name or "model", fix=fix)


def _ragged(config: PreTrainedConfig, left: bool) -> tuple[Tensor, Tensor]:
    """Returns ids and attention mask of ragged rows, int64 `[B, T]`, the same at every call."""
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
    return ids, mask


def _ask_whole(model: PreTrainedModel, borders: dict[str, PreTrainedModel], left: bool) -> list[Tensor]:
    """Returns the model's outputs for ragged rows: of every row, and of every real token."""
    border = next(iter(borders.values()))
    ids, mask = (part.to(border.device) for part in _ragged(border.config, left))
    with torch.no_grad():
        outputs = model(input_ids=ids, attention_mask=mask)
    parts = [part for part in outputs.values() if torch.is_tensor(part) and part.shape[:1] == ids.shape[:1]]
    real = mask.bool()
    return [(part[real] if part.shape[:2] == ids.shape else part).float() for part in parts]


def _ask(module: PreTrainedModel, left: bool) -> list[Tensor]:
    """Returns hidden states of the real tokens of ragged rows, and gradients of a random projection of them."""
    device: Any = module.get_input_embeddings().weight.device
    ids, mask = (part.to(device) for part in _ragged(module.config, left))
    generator = torch.Generator().manual_seed(1)
    embedded: list[Tensor] = []
    hook = module.get_input_embeddings().register_forward_hook(_Capture(embedded))
    try:
        with torch.enable_grad():
            hidden = module(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()].float()
            weights = torch.randn(hidden.shape, generator=generator).to(hidden)
            trained = [weight for weight in module.parameters() if weight.requires_grad]
            if sum(weight.numel() for weight in trained) > _LARGE:
                trained = []
            loss = (hidden * weights).sum()
            found = torch.autograd.grad(loss, [*embedded, *trained], allow_unused=True)
    finally:
        hook.remove()
    at_tokens = found[0] if len(embedded) == 1 else None
    if at_tokens is not None:  # as hidden states: of the real tokens
        at_tokens = at_tokens[mask.bool()] if at_tokens.shape[:2] == mask.shape else at_tokens[0]
    rest = [gradient for gradient in found[len(embedded) :] if gradient is not None]
    return [part.detach().float() for part in (hidden, at_tokens, *rest) if part is not None]


@dataclass(frozen=True)
class _Capture:
    """Collects the embeddings, as tensors that gradients reach also where the table is frozen."""

    into: list[Tensor]

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        output = output if output.requires_grad else output.detach().requires_grad_()
        self.into.append(output)
        return output


def _difference(one: list[Tensor], other: list[Tensor]) -> float:
    """Returns the largest difference, as a share of the largest hidden state, and of the largest gradient of all: some
    are 0 but for rounding (a bias of keys). Infinite where they don't compare."""
    if [part.shape for part in one] != [part.shape for part in other]:
        return float("inf")
    shares = []
    for these, those in ((one[:1], other[:1]), (one[1:], other[1:])):
        scale = max((float(part.abs().max()) for part in these if part.numel()), default=0.0)
        most = max((float((a - b).abs().max()) for a, b in zip(these, those, strict=True) if a.numel()), default=0.0)
        shares.append(most / scale if scale else most)
    return max(share if share == share else float("inf") for share in shares)


@contextmanager
def nonzero_adapters(model: nn.Module) -> Iterator[None]:
    """Draws the zero matrices of adapters at random: a difference that goes through an adapter shows only then."""
    generator = torch.Generator().manual_seed(1)
    zeros = [
        weight for name, weight in model.named_parameters()
        if ("lora_" in name or "adapter" in name) and not weight.detach().any()
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
