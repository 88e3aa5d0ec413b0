"""FlashAttention over documents: flash-attn's kernel, or the one that torch carries, where they can do it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from packtrain.modeling.attention.pattern import Documents, Pattern, repeat_heads

HALF = (torch.float16, torch.bfloat16)


def fused_kernel(query: Tensor, value: Tensor, pattern: Pattern) -> Callable[..., Tensor] | None:
    """The varlen kernel that can compute `pattern` on this device and dtype, or None."""
    if query.device.type != "cuda" or query.dtype not in HALF or max(query.shape[-1], value.shape[-1]) > 256:
        return None
    if pattern.mask is not None or pattern.bias is not None or pattern.sinks is not None:
        return None
    if torch.version.hip is None and torch.cuda.get_device_capability(query.device) < (8, 0):
        return None  # FlashAttention needs Ampere
    if flash_attn_varlen() is not None:
        return attend_flash_attn
    parameters = torch_varlen_parameters()
    if parameters and not pattern.dropout and pattern.softcap is None:
        if pattern.window is None or "window_size" in parameters:
            return attend_torch_varlen
    return None


@cache
def flash_attn_varlen() -> Callable[..., Tensor] | None:
    """`flash_attn.flash_attn_varlen_func`, or None where flash-attn is not installed."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


@cache
def torch_varlen_parameters() -> frozenset[str]:
    """Parameter names of torch's `varlen_attn`: `is_causal` in 2.10, `scale` and `window_size` since 2.11,
    `enable_gqa` later. Empty where torch has no such function."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def attend_flash_attn(query: Tensor, key: Tensor, value: Tensor, documents: Documents, pattern: Pattern):
    """flash-attn's varlen kernel; arguments and result as `attend`."""
    query, key, value, dim = rows_first(query, key, value)
    output = flash_attn_varlen()(
        query,
        key,
        value,
        documents.cu_seq_lens,
        documents.cu_seq_lens,
        documents.longest,
        documents.longest,
        dropout_p=pattern.dropout,
        softmax_scale=pattern.scaling,
        causal=pattern.causal,
        window_size=window_size(pattern, right_if_causal=-1),
        softcap=pattern.softcap or 0.0,
    )
    return output[..., :dim].unsqueeze(0)


def attend_torch_varlen(query: Tensor, key: Tensor, value: Tensor, documents: Documents, pattern: Pattern):
    """torch's varlen kernel; arguments and result as `attend`."""
    from torch.nn.attention.varlen import varlen_attn

    parameters, options = torch_varlen_parameters(), {}
    if "enable_gqa" in parameters:
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    else:
        key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    query, key, value, dim = rows_first(query, key, value)
    if "scale" in parameters:
        options["scale"] = pattern.scaling
    else:  # 2.10 divides by the root of the (padded) head size; undo that on the query
        query = query * (pattern.scaling * query.shape[-1] ** 0.5)
    if "window_size" in parameters:
        options["window_size"] = window_size(pattern, right_if_causal=0)
    else:
        options["is_causal"] = pattern.causal
    cu_seq_lens, longest = documents.cu_seq_lens, documents.longest
    output = varlen_attn(query, key, value, cu_seq_lens, cu_seq_lens, longest, longest, **options)
    return output[..., :dim].unsqueeze(0)


def rows_first(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """`[1, H, T, D]` -> contiguous `[T, H, D8]` as the kernels want it, and the width of the values.

    The kernels need one head size for all three, a multiple of 8; zeros appended to query and key change no
    dot product, and those appended to value are cut off the output again.
    """
    dim = value.shape[-1]
    width = -(-max(query.shape[-1], dim) // 8) * 8
    padded = (x[0].transpose(0, 1) for x in (query, key, value))
    query, key, value = (F.pad(x, (0, width - x.shape[-1])).contiguous() for x in padded)
    return query, key, value, dim


def window_size(pattern: Pattern, *, right_if_causal: int) -> tuple[int, int]:
    """FlashAttention's (left, right): tokens attended before and after, -1 for all of them. Causality is
    `right = 0` to torch's kernel, and a flag of its own to flash-attn, which sets `right` itself."""
    left = -1 if pattern.window is None else pattern.window - 1
    if not pattern.causal:
        return left, left
    return left, right_if_causal if pattern.window is None else 0
