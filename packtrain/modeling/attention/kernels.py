"""Attention over documents that lie end to end in one row: the arithmetic behind `packtrain_varlen`.

    key     a a a b b c c c c        documents a, b, c of 3, 2 and 4 tokens, bounds (0, 3, 5, 9)
    query a ■ ⬚ ⬚ . . . . . .        ■ attended (causal)   ⬚ masked   . never computed
          a ■ ■ ⬚ . . . . . .
          a ■ ■ ■ . . . . . .        cost: sum of squared lengths, not the square of the sum
          b . . . ■ ⬚ . . . .
          b . . . ■ ■ . . . .
          c . . . . . ■ ⬚ ⬚ ⬚
          ...

`attend` picks the best of three ways to compute this: flash-attn's varlen kernel, the FlashAttention that
torch carries (`torch.nn.attention.varlen`), or one scaled-dot-product call per document, which works on any
device and dtype and with any mask. Everything here takes plain tensors and a `Pattern`; what transformers
passes to an attention function is translated in `packtrain.modeling.attention.varlen`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Documents:
    """The documents of a row: where each begins and ends.

    Attributes:
        bounds: `S + 1` increasing token offsets, from 0 to T; no document is empty.
        device: where the row is.
        offsets: `bounds` on the device, int32 `[S + 1]`, maybe with empty documents; None to copy them there.
    """

    bounds: tuple[int, ...]
    device: torch.device
    offsets: Tensor | None = field(default=None, repr=False, compare=False)

    @cached_property
    def lengths(self) -> list[int]:
        return [stop - start for start, stop in pairwise(self.bounds)]

    @cached_property
    def longest(self) -> int:
        return max(self.lengths)

    @cached_property
    def cu_seq_lens(self) -> Tensor:
        """`bounds` on the device, int32 `[S + 1]`."""
        if self.offsets is not None:
            return self.offsets
        return torch.tensor(self.bounds, dtype=torch.int32, device=self.device)


@dataclass(frozen=True)
class OnDevice:
    """What a varlen kernel wants to know of documents: int32 `[S + 1]` offsets, and the most tokens of one."""

    cu_seq_lens: Tensor
    longest: int


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """The rules of attention beyond query, key and value: who attends whom, and how strongly.

    Attributes:
        scaling: factor on the dot products.
        causal, window: query i attends key j where `0 <= i - j < window` (causal) or `|i - j| < window`.
            Not used where `mask` is given: a mask says everything, as in transformers' sdpa attention.
        mask: `[1, 1 or H, T, T]`, bool (True attends) or float (added to the scores).
        bias: `[1, 1 or H, 1 or T, T]`, added to the scores (T5's relative positions, ALiBi).
        softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2).
        sinks: `[H]`, the logit of a token that takes probability and gives nothing (gpt-oss).
        dropout: probability with which an attention weight is dropped.
    """

    scaling: float
    causal: bool = True
    window: int | None = None
    mask: Tensor | None = None
    bias: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0


def attend(query: Tensor, key: Tensor, value: Tensor, documents: Documents, pattern: Pattern) -> Tensor:
    """Attends within every document alone, by the fastest way that computes `pattern` exactly.

    Args:
        query: `[1, H, T, D]`; key: `[1, Hkv, T, D]`; value: `[1, Hkv, T, Dv]`, H a multiple of Hkv.

    Returns:
        `[1, T, H, Dv]`.
    """
    if torch.is_autocast_enabled(query.device.type):  # varlen kernels have no autocast rule
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if len(documents.bounds) == 2 and (pattern.window is None or documents.longest <= pattern.window):
        return attend_each(query, key, value, documents, pattern)  # SDPA has a fused kernel for this itself
    kernel = fused_kernel(query, value, pattern) or attend_each
    return kernel(query, key, value, documents, pattern)


def attend_each(query: Tensor, key: Tensor, value: Tensor, documents: Documents, pattern: Pattern) -> Tensor:
    """Attends by one dense call per document. Splitting and joining once costs two copies forward and two backward;
    slicing in the loop would add a T-sized zero tensor to the backward pass per document."""
    if len(documents.bounds) == 2:
        return attend_one(query, key, value, pattern).transpose(1, 2)
    pieces = zip(*(states.split(documents.lengths, dim=2) for states in (query, key, value)), strict=True)
    outputs = [
        attend_one(q, k, v, restrict(pattern, start, stop)).transpose(1, 2)  # [1, L, H, Dv]
        for (q, k, v), (start, stop) in zip(pieces, pairwise(documents.bounds), strict=True)
    ]
    return torch.cat(outputs, dim=1)  # [1, T, H, Dv]


def attend_one(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern) -> Tensor:
    """Attends within one document: `[B, H, L, D]` -> `[B, H, L, Dv]`, by SDPA where SDPA can express it."""
    mask = pattern.mask if pattern.mask is not None else pattern_mask(query.shape[2], pattern, query.device)
    needs_mask = pattern.softcap is not None or pattern.sinks is not None or pattern.bias is not None
    if mask is None and pattern.causal and needs_mask:
        mask = causal_mask(query.shape[2], None, query.device)
    if pattern.softcap is not None:
        return attend_dense(query, key, value, mask, pattern)
    if pattern.bias is not None:
        mask = add_bias(mask, pattern.bias)
    width = value.shape[-1]
    if pattern.sinks is not None:
        query, key, value, mask = add_sink(query, key, value, mask, pattern)
    grouped = query.shape[1] != key.shape[1]
    if grouped and not sdpa_takes_groups(key, value, mask):
        key, value, grouped = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1]), False
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=pattern.dropout,
        is_causal=pattern.causal and mask is None,
        scale=pattern.scaling,
        enable_gqa=grouped,
    )[..., :width]


def sdpa_takes_groups(key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Returns whether SDPA has a fused kernel for grouped heads as they are. Elsewhere it falls back to one that forms all
    `[H, L, L]` scores, which costs more than repeating keys and values (transformers' `use_gqa_in_sdpa`)."""
    if key.device.type == "cuda" and key.dtype not in HALF:
        return False
    return mask is None and key.shape[-1] == value.shape[-1] <= 256


def add_sink(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, pattern: Pattern
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Expresses a sink in terms that SDPA knows: one more key, before the others, with the sink's logit for every query and
    a value of zero. Queries and keys get one more component to say so, 1 and 0 but for the sink's own:

        (q, 1) . (k, 0) * scaling = q . k * scaling          (q, 1) . (0, sink / scaling) * scaling = sink

    More components, 1 and 0 throughout, pad the width to a multiple of 8, without which half precision has no fused
    kernel on CUDA. So no `[H, L, L]` scores are ever formed, as spelling it out would.
    """
    assert pattern.sinks is not None
    heads, dim = query.shape[1], query.shape[3]
    more = 8 - dim % 8
    key, value = repeat_heads(key, heads), repeat_heads(value, heads)
    sink = (pattern.sinks / pattern.scaling).to(key.dtype).view(1, heads, 1, 1)
    sink = F.pad(sink, (dim, more - 1)).expand(key.shape[0], -1, -1, -1)  # [B, H, 1, D8]
    query = F.pad(query, (0, more), value=1.0)
    key = torch.cat([sink, F.pad(key, (0, more))], dim=2)  # [B, H, L + 1, D8]
    value = F.pad(value, (0, 8 - value.shape[-1] % 8, 1, 0))  # as wide as the keys, if it was: flash wants one width
    if mask is not None:
        mask = F.pad(mask, (1, 0), value=True if mask.dtype == torch.bool else 0.0)
    return query, key, value, mask


def attend_dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, pattern: Pattern) -> Tensor:
    """Attends with all scores formed, for what SDPA cannot express: softcap (and sinks under any mask). Softmax in float32.

    Args:
        mask: broadcastable to `[B, H, Q, K]`, bool or additive; None attends everything.
    """
    key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    scores = torch.matmul(query, key.transpose(-1, -2)) * pattern.scaling  # [B, H, Q, K]
    if pattern.softcap is not None:
        scores = torch.tanh(scores / pattern.softcap) * pattern.softcap
    if pattern.bias is not None:
        scores = scores + pattern.bias
    if mask is not None:
        masked = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if masked else scores + mask
    if pattern.sinks is not None:
        sinks = pattern.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], dim=-1)  # [B, H, Q, K + 1]
    dtype = torch.promote_types(scores.dtype, torch.float32)
    weights = F.softmax(scores, dim=-1, dtype=dtype).to(value.dtype)
    if pattern.sinks is not None:
        weights = weights[..., :-1]
    return torch.matmul(F.dropout(weights, p=pattern.dropout, training=pattern.dropout > 0), value)


# ------------------------------------------------------------------------------ FlashAttention over documents

HALF = (torch.float16, torch.bfloat16)


def fused_kernel(query: Tensor, value: Tensor, pattern: Pattern) -> Callable[..., Tensor] | None:
    """Returns the varlen kernel that can compute `pattern` on this device and dtype, or None."""
    if query.device.type != "cuda" or query.dtype not in HALF or max(query.shape[-1], value.shape[-1]) > 256:
        return None
    if pattern.mask is not None or pattern.bias is not None or pattern.sinks is not None:
        return None
    if not runs_flash_attention(query.device):
        return None
    if has_flash_attn():
        return attend_flash_attn
    if torch_varlen_takes("query") and not pattern.dropout and pattern.softcap is None:
        if pattern.window is None or torch_varlen_takes("window_size"):
            return attend_torch_varlen
    return None


# What is installed does not change in a run. `torch.compile` is told so, or it would trace into the imports.


@torch.compiler.assume_constant_result
def runs_flash_attention(device: torch.device) -> bool:
    """Returns whether a CUDA device has FlashAttention, which needs Ampere."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


@torch.compiler.assume_constant_result
def has_flash_attn() -> bool:
    """Returns whether flash-attn is installed."""
    return _has_flash_attn()


@cache
def _has_flash_attn() -> bool:
    try:
        import flash_attn
    except ImportError:
        return False
    return hasattr(flash_attn, "flash_attn_varlen_func")


@torch.compiler.assume_constant_result
def torch_varlen_takes(parameter: str) -> bool:
    """Returns whether torch's `varlen_attn` has a parameter of this name; False where torch has no such function."""
    return parameter in torch_varlen_parameters()


@cache
def torch_varlen_parameters() -> frozenset[str]:
    """Returns the parameter names of torch's `varlen_attn`: `is_causal` in 2.10, `scale` and `window_size` since
    2.11, `enable_gqa` later. Empty where torch has no such function."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def attend_flash_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents | OnDevice,
    pattern: Pattern,
    *,
    keys: Documents | OnDevice | None = None,
) -> Tensor:
    """Calls flash-attn's varlen kernel; arguments and result as `attend`, with other documents of the `keys` if given."""
    from flash_attn import flash_attn_varlen_func

    keys = keys or documents
    query, key, value, dim = rows_first(query, key, value)
    output = flash_attn_varlen_func(
        query,
        key,
        value,
        documents.cu_seq_lens,
        keys.cu_seq_lens,
        documents.longest,
        keys.longest,
        dropout_p=pattern.dropout,
        softmax_scale=pattern.scaling,
        causal=pattern.causal,
        window_size=window_size(pattern, right_if_causal=-1),
        softcap=pattern.softcap or 0.0,
    )
    return output[..., :dim].unsqueeze(0)


def attend_torch_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents | OnDevice,
    pattern: Pattern,
    *,
    keys: Documents | OnDevice | None = None,
) -> Tensor:
    """Calls torch's varlen kernel; arguments and result as `attend`, with other documents of the `keys` if given."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {}
    if torch_varlen_takes("enable_gqa"):
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    else:
        key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    query, key, value, dim = rows_first(query, key, value)
    if torch_varlen_takes("scale"):
        options["scale"] = pattern.scaling
    else:  # 2.10 divides by the root of the (padded) head size; undo that on the query
        query = query * (pattern.scaling * query.shape[-1] ** 0.5)
    if torch_varlen_takes("window_size"):
        options["window_size"] = window_size(pattern, right_if_causal=0)
    else:
        options["is_causal"] = pattern.causal
    keys = keys or documents
    offsets, longest = (documents.cu_seq_lens, keys.cu_seq_lens), (documents.longest, keys.longest)
    output: Any = varlen_attn(query, key, value, *offsets, *longest, **options)
    return output[..., :dim].unsqueeze(0)


def rows_first(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Lays `[1, H, T, D]` out as contiguous `[T, H, D8]`, as the kernels want it; returns also the width of the values.

    The kernels need one head size for all three, a multiple of 8; zeros appended to query and key change no
    dot product, and those appended to value are cut off the output again.
    """
    dim = value.shape[-1]
    width = -(-max(query.shape[-1], dim) // 8) * 8
    padded = (x[0].transpose(0, 1) for x in (query, key, value))
    query, key, value = (F.pad(x, (0, width - x.shape[-1])).contiguous() for x in padded)
    return query, key, value, dim


def window_size(pattern: Pattern, *, right_if_causal: int) -> tuple[int, int]:
    """Returns FlashAttention's (left, right): tokens attended before and after, -1 for all of them. Causality is
    `right = 0` to torch's kernel, and a separate flag to flash-attn, which sets `right` itself."""
    left = -1 if pattern.window is None else pattern.window - 1
    if not pattern.causal:
        return left, left
    return left, right_if_causal if pattern.window is None else 0


# -------------------------------------------------------------------------------------- masks, bias and heads


def restrict(pattern: Pattern, start: int, stop: int) -> Pattern:
    """Returns the pattern of the document at `start:stop`: diagonal blocks of mask and bias."""
    if pattern.mask is not None:
        pattern = replace(pattern, mask=pattern.mask[..., start:stop, start:stop])
    if pattern.bias is not None:
        rows = slice(start, stop) if pattern.bias.shape[-2] > 1 else slice(None)
        pattern = replace(pattern, bias=pattern.bias[..., rows, start:stop])
    return pattern


def pattern_mask(length: int, pattern: Pattern, device: torch.device) -> Tensor | None:
    """Returns a bool mask `[L, L]` for a window shorter than the document, None where causality alone says it all."""
    if pattern.window is None or length <= pattern.window:
        return None
    if pattern.causal:
        return causal_mask(length, pattern.window, device)
    return window_mask(length, pattern.window, device)


def causal_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """Makes the mask `0 <= i - j < window`, bool `[L, L]`."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril_()
    return mask if window is None else mask.triu_(1 - window)


def window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """Makes the mask `|i - j| < window`, bool `[L, L]`."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device)
    return mask.tril_(window - 1).triu_(1 - window)


def add_bias(mask: Tensor | None, bias: Tensor) -> Tensor:
    """Makes one additive mask from a mask (bool or additive, or None) and a bias."""
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return bias + mask


def repeat_heads(states: Tensor, heads: int) -> Tensor:
    """Repeats `[B, Hkv, L, D]` to `[B, heads, L, D]`: each key/value head serves `heads / Hkv` query heads."""
    batch, kv_heads, length, dim = states.shape
    if kv_heads == heads:
        return states
    repeated = states[:, :, None].expand(batch, kv_heads, heads // kv_heads, length, dim)
    return repeated.reshape(batch, heads, length, dim)
