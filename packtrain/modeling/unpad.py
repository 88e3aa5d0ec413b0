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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
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
        self._model, self._borders = model, borders

    def remove(self) -> None:
        """Removes the hooks, and gives the model its own attention back."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
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
    borders = find_borders(model, module)
    unpadding = Unpadding(model, borders)
    try:
        for name, border in borders.items():
            if any(isinstance(hook, Flatten) for hook in border._forward_pre_hooks.values()):
                raise ModelError("is unpadded already", key=name or type(border).__name__, fix="call unpad once")
            _install(unpadding, name, border)
        top = base(model)
        if top not in borders.values():
            unpadding._handles.append(top.register_forward_pre_hook(RefuseFirstLabels(), with_kwargs=True))
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
            raise ModelError("is not a module of the model", key="module", value=module, fix="see `model.named_modules()`")
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
        if any(given.get(name) is not None for name in ("past_key_values", "cu_seq_lens_q")) or self._weights(module, given):
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
            done["pooler_output"] = module.pooler(done["last_hidden_state"])
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
            what = "supervise the first token of a row that is padded on the left, and the model predicts it from padding"
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
    seq_lens._packtrain_documents = (None if seq_lens.is_inference() else seq_lens._version, documents)
    seq_lens._packtrain_rows = rows
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


def _install(unpadding: Unpadding, name: str, border: PreTrainedModel) -> None:
    """Installs the hooks on one module, with the first rule of positions by which it gives what it gave."""
    with quietly(), in_mode(border, train=False), _nonzero_adapters(border):
        asked = {left: _ask(border, left) for left in (False, True)}
        border.set_attn_implementation(NAME)
        worst: dict[Rule, tuple[float, float]] = {}
        for rule in RULES:
            hooks = [
                border.register_forward_pre_hook(Flatten(rule), with_kwargs=True),
                border.register_forward_hook(Scatter(), with_kwargs=True),
            ]
            try:
                worst[rule] = tuple(_difference(asked[left], _ask(border, left)) for left in (False, True))
            finally:
                for hook in hooks:
                    hook.remove()
    tolerance = precision(next(border.parameters()).dtype)
    best = min(RULES, key=lambda rule: [max(0.0, value - tolerance) for value in worst[rule]])
    right, left = worst[best]
    if not right <= tolerance:
        what = (
            f"{type(border).__name__} does not give the same without padding: hidden states or gradients differ by {right:.1e} "
            f"(allowed {tolerance:.0e}) for rows padded on the right"
        )
        fix = "see `packtrain audit` for what mixes tokens beside its attention; leave the model padded"
        raise ModelError(what, key=name or "model", fix=fix)
    hook = Flatten(best, left=left <= tolerance)
    unpadding._handles.append(border.register_forward_pre_hook(hook, with_kwargs=True))
    unpadding._handles.append(border.register_forward_hook(Scatter(), with_kwargs=True))


def _ask(module: PreTrainedModel, left: bool) -> list[Tensor]:
    """Returns hidden states of the real tokens of ragged rows, and gradients of a random projection of them."""
    generator = torch.Generator().manual_seed(0)
    config, width = module.config.get_text_config(), max(_LENGTHS)
    device = module.get_input_embeddings().weight.device
    special = {getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "cls", "sep", "mask")}
    pad = getattr(config, "pad_token_id", None) or 0
    usual = [token for token in range(min(config.vocab_size, 997)) if token not in special and token != pad]
    ids = torch.full((len(_LENGTHS), width), pad)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(_LENGTHS):
        columns = slice(width - length, width) if left else slice(0, length)
        chosen = torch.randint(len(usual), (length,), generator=generator)
        ids[row, columns] = torch.tensor(usual)[chosen]
        mask[row, columns] = 1
    ids, mask = ids.to(device), mask.to(device)
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
def _nonzero_adapters(model: nn.Module) -> Iterator[None]:
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


