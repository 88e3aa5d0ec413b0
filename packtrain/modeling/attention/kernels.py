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
passes to an attention function is translated in `packtrain.modeling.attention`.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from packtrain.modeling.attention.cuda import HALF, fused_kernel
from packtrain.modeling.attention.pattern import (
    Documents,
    Pattern,
    add_bias,
    causal_mask,
    pattern_mask,
    repeat_heads,
    restrict,
)


def attend(query: Tensor, key: Tensor, value: Tensor, documents: Documents, pattern: Pattern) -> Tensor:
    """Attention of every document to itself alone, by the fastest way that computes `pattern` exactly.

    Args:
        query: `[1, H, T, D]`; key: `[1, Hkv, T, D]`; value: `[1, Hkv, T, Dv]`, H a multiple of Hkv.

    Returns:
        `[1, T, H, Dv]`.
    """
    if torch.is_autocast_enabled(query.device.type):  # varlen kernels have no autocast rule of their own
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if len(documents.bounds) == 2 and (pattern.window is None or documents.longest <= pattern.window):
        return attend_each(query, key, value, documents, pattern)  # SDPA has a fused kernel for this itself
    kernel = fused_kernel(query, value, pattern) or attend_each
    return kernel(query, key, value, documents, pattern)


def attend_each(query: Tensor, key: Tensor, value: Tensor, documents: Documents, pattern: Pattern) -> Tensor:
    """One dense call per document. Splitting and joining once costs two copies forward and two backward;
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
    """Attention of one document: `[B, H, L, D]` -> `[B, H, L, Dv]`, by SDPA where SDPA can express it."""
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
    """Whether SDPA has a fused kernel for grouped heads as they are. Elsewhere it falls back to one that forms all
    `[H, L, L]` scores, which costs more than repeating keys and values (transformers' `use_gqa_in_sdpa`)."""
    if key.device.type == "cuda" and key.dtype not in HALF:
        return False
    return mask is None and key.shape[-1] == value.shape[-1] <= 256


def add_sink(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, pattern: Pattern
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """A sink in terms that SDPA knows: one more key, before the others, with the sink's logit for every query and
    a value of zero. Queries and keys get one more component to say so, 1 and 0 but for the sink's own:

        (q, 1) . (k, 0) * scaling = q . k * scaling          (q, 1) . (0, sink / scaling) * scaling = sink

    More components, 1 and 0 throughout, fill the width up to a multiple of 8, without which half precision has no fused
    kernel on CUDA. So no `[H, L, L]` scores are ever formed, as spelling it out would.
    """
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
    """Attention spelled out, for what SDPA cannot express: softcap (and sinks under any mask). Softmax in float32.

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
