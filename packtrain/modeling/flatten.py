"""The hooks of `packtrain.unpad`: `[B, T]` rows to one flat row before a module, and back behind it.

    attention_mask   1 1 1 0        inside   a b c d e f        outside   A B C 0
                     0 1 1 1                 0 0 0 1 1 1                  0 D E F

They are callable objects that keep nothing between calls, so a model with them can be pickled, copied and saved.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.utils import ModelOutput

from packtrain.data.formats import IGNORED
from packtrain.errors import ModelError
from packtrain.modeling.attention.kernels import Documents
from packtrain.modeling.attention.varlen import NAME, register

Rule = Literal["columns", "real tokens", "tokens behind padding_idx"]
RULES: tuple[Rule, ...] = ("columns", "real tokens", "tokens behind padding_idx")
FLAT = "cu_seq_lens_q"  # the argument by which a call is known to be flat
_WITHOUT_CACHE = {"use_cache": False, "cache_position": None}
_between_graphs = torch.compiler.disable(
    reason="packtrain.unpad keeps the real tokens of a batch, whose number depends on its attention_mask, so its hooks run "
    "between compiled graphs: compile with fullgraph=False, or remove them first (`.remove()`)"
)


class NoCache(DynamicCache):
    """Stands in an output where the padded model would have its cache, which a flat row does not fill.

    Without it a loop that gives `outputs.past_key_values` to the next call would go on without what came before.

    Raises:
        ModelError: it is used.
    """

    def refuse(self, *given: Any, **named: Any) -> Any:
        what = "was not filled: the layers ran without padding"
        raise ModelError(
            what, key="past_key_values", fix="call the model with use_cache=True, or `.remove()` the hooks"
        )

    update = get_seq_length = get_mask_sizes = refuse


register()  # a model that was saved with its hooks names the attention, and is loaded where nobody has registered it


@dataclass(frozen=True)
class Rows:
    """Where the tokens of a flat row come from.

    Attributes:
        rows, width: B and T.
        index: int64 `[N]`, the real tokens among the `B * T`, in order.
        as_tuple: whether the caller wants a tuple for an output.
        caches: whether the padded model would have returned a cache.
    """

    rows: int
    width: int
    index: Tensor
    as_tuple: bool = False
    caches: bool = False

    def flat(self, values: Tensor, at: int = 0) -> Tensor:
        """Returns `[..., 1, N, ...]` of `[..., B, T, ...]`, of which B is dimension `at`."""
        return values.flatten(at, at + 1).index_select(at, self.index).unsqueeze(at)

    def padded(self, values: Tensor) -> Tensor:
        """Returns `[B * T, ...]` of `[N, ...]`, 0 at padding."""
        whole = values.new_zeros(self.rows * self.width, *values.shape[1:])
        return whole.index_copy(0, self.index, values)

    def scattered(self, value: Any) -> Any:
        """Returns `[B, T, ...]` for `[1, N, ...]` and `[B * T, ...]` for `[N, ...]`, also inside tuples; other things as
        they are."""
        if isinstance(value, tuple):
            return tuple(self.scattered(part) for part in value)
        if not torch.is_tensor(value) or value.dim() < 2:
            return value
        if value.shape[:2] == (1, len(self.index)):
            return self.padded(value[0]).unflatten(0, (self.rows, self.width))
        return self.padded(value) if len(value) == len(self.index) else value  # router logits


@dataclass(frozen=True)
class Flatten:
    """The hook before a module: turns padded rows into one flat row of documents.

    It leaves a call as it is where there is nothing to gain or something needs the padded view: one row, no padding,
    padding between the tokens of a row, a row of padding only, a cache, a mask that is not `[B, T]`, attention weights.

    Attributes:
        positions: how the module numbers tokens that it is given no positions for: by their column, among the real tokens
            of their row, or (RoBERTa) among those behind its padding row.
        left: whether rows padded on the left are flattened.
        attention: the module's own attention, used where attention weights are asked for.
        within: the attention of flat rows: the module's own where it takes no other and is padded inside.
        stretches_at: the position from which the module's rotary embedding depends on the largest position of a batch.
    """

    positions: Rule = "columns"
    left: bool = True
    attention: str = "sdpa"
    within: str = NAME
    stretches_at: int | None = None

    @_between_graphs
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        signature = inspect.signature(module.forward)
        given = signature.bind_partial(*args, **kwargs).arguments
        given |= given.pop(_rest(signature), {})
        weights = _asked(module, given, "output_attentions")
        use_attention(module, self.attention if weights else self.within)
        if isinstance(given.get("past_key_values"), NoCache):
            given["past_key_values"].refuse()
        mask: Any = given.get("attention_mask")
        if weights or not _is_rows(mask, given):
            return None
        real = mask.cpu() != 0  # the one time that something is read from the device
        if not _is_ragged(real) or not (self.left or bool(real[:, 0].all())):
            return None
        index = real.flatten().nonzero().flatten().to(mask.device)
        as_tuple = not _asked(module, given, "return_dict", default=True)
        rows = Rows(*mask.shape, index, as_tuple=as_tuple, caches=_caches(module, given))
        positions = given.get("position_ids")
        if positions is None:
            positions = self._positions(module, given.get("input_ids"), mask)
        per_axis = positions.dim() == 3  # `[A, B, T]`: a row of positions for each axis of a picture
        positions = positions.expand(-1, *mask.shape) if per_axis else positions.expand(*mask.shape)
        kept = rows.flat(positions, at=int(per_axis))
        if self.stretches_at is not None and mask.shape[1] > self.stretches_at and kept.max() != positions.max():
            return None
        flat = {name: rows.flat(value) if _per_token(value, mask) else value for name, value in given.items()}
        flat |= {"attention_mask": None, "position_ids": kept, **_documents(real.sum(1).tolist(), rows)}
        flat |= {name: value for name, value in _WITHOUT_CACHE.items() if name in signature.parameters}
        flat |= {"return_dict": True} if rows.as_tuple else {}
        return (), flat

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
    """The hook behind a module: puts all that has one entry per token back to `[B, T]`, 0 at padding, and pools again.

    Attributes:
        within: as `Flatten.within`.

    Raises:
        ModelError: the module pools in its own `forward`, where the rows are one.
    """

    within: str = NAME

    @_between_graphs
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        use_attention(module, self.within)
        rows = getattr(kwargs.get(FLAT), "_packtrain_rows", None)
        if rows is None:
            return None
        if not isinstance(output, ModelOutput):
            return rows.scattered(output)
        done = {name: rows.scattered(value) for name, value in output.items()}
        if done.get("pooler_output") is not None:
            done["pooler_output"] = _pooled(module, done["last_hidden_state"])
        if rows.caches and not rows.as_tuple and hasattr(output, "past_key_values"):
            done["past_key_values"] = NoCache()
        whole = type(output)(**done)
        return whole.to_tuple() if rows.as_tuple else whole


@dataclass(frozen=True)
class RefuseLabels:
    """The hook before a model with a loss: refuses labels that the padded model predicts from padding.

    Such are the first token of a row padded on the left, and padding itself.

    Attributes:
        ahead: how many tokens ahead a label is predicted: 1 by a causal language model, 0 otherwise.

    Raises:
        ModelError: a batch has such labels.
    """

    ahead: int

    @_between_graphs
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        mask, labels = kwargs.get("attention_mask"), kwargs.get("labels")
        if not (torch.is_tensor(mask) and torch.is_tensor(labels)) or mask.shape != labels.shape or mask.dim() != 2:
            return
        width = mask.shape[1] - self.ahead
        refused = (mask[:, :width] == 0) & (labels[:, self.ahead :] != IGNORED)
        if len(mask) > 1 and bool(refused.any()) and _is_ragged(mask != 0):
            whose = "the first token of a row padded on the left, or padding" if self.ahead else "padding"
            what = f"supervise {whose}, which the padded model predicts from padding"
            raise ModelError(what, key="labels", fix=f"set them to {IGNORED} there")


def use_attention(module: Any, name: str) -> None:
    """Makes a module use this attention, if it doesn't."""
    if module.config._attn_implementation != name:
        module.set_attn_implementation(name)


def _rest(signature: inspect.Signature) -> str:
    """Returns the name of the parameter that takes all other keyword arguments."""
    parameters = signature.parameters.values()
    return next(one.name for one in parameters if one.kind is inspect.Parameter.VAR_KEYWORD)


def _asked(module: Any, given: dict[str, Any], name: str, default: bool = False) -> bool:
    asked = given.get(name)
    return bool(getattr(module.config, name, default) if asked is None else asked)


def _caches(module: nn.Module, given: dict[str, Any]) -> bool:
    """Returns whether a decoder that is not asked whether to return a cache would do so by its config."""
    by_config = given.get("use_cache") is None and getattr(module.config, "use_cache", False)
    return bool(by_config) and any(getattr(inner, "is_causal", False) for inner in module.modules())


def _is_rows(mask: Any, given: dict[str, Any]) -> bool:
    """Returns whether a call is of several rows of tokens with their mask, and not a step of generation."""
    tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    if not torch.is_tensor(mask) or mask.dim() != 2 or len(mask) < 2:
        return False
    if not torch.is_tensor(tokens) or tokens.shape[:2] != mask.shape or given.get(FLAT) is not None:
        return False
    return given.get("past_key_values") is None and not given.get("use_cache")


def _is_ragged(real: Tensor) -> bool:
    """Returns whether there is padding, and nowhere but before and behind the tokens that every row has."""
    begins = real[:, 0] + (real[:, 1:] & ~real[:, :-1]).sum(1)
    return not bool(real.all()) and bool((begins == 1).all())


def _per_token(value: Any, mask: Tensor) -> bool:
    return torch.is_tensor(value) and value.shape[:2] == mask.shape


def _documents(lengths: list[int], rows: Rows) -> dict[str, Any]:
    """Returns the arguments by which attention knows the documents of a flat row, with what is known on the host."""
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    seq_lens = bounds.to(rows.index.device)
    documents = Documents(bounds=tuple(bounds.tolist()), device=seq_lens.device)
    known = (None if seq_lens.is_inference() else seq_lens._version, documents)
    setattr(seq_lens, "_packtrain_documents", known)  # noqa: B010
    setattr(seq_lens, "_packtrain_rows", rows)  # noqa: B010
    longest = max(lengths)
    return {FLAT: seq_lens, "cu_seq_lens_k": seq_lens, "max_length_q": longest, "max_length_k": longest}


def _pooled(module: Any, hidden: Tensor) -> Tensor:
    pooler = getattr(module, "pooler", None)
    if pooler is None:
        what = f"{type(module).__name__} pools its rows itself, without a module that could do so behind it"
        raise ModelError(what, key="model", fix="leave it padded")
    activation = getattr(module, "pooler_activation", None)  # ALBERT's, whose pooler is the matrix alone
    return pooler(hidden) if activation is None else activation(pooler(hidden[:, 0]))


def _padding_idx(module: nn.Module) -> int | None:
    for name, inner in module.named_modules():
        if name.endswith("position_embeddings") and getattr(inner, "padding_idx", None) is not None:
            return inner.padding_idx
    return None
