"""Where documents lie in a row, who attends whom within one, and masks that say so."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Where the documents of a row begin and end.

    Attributes:
        bounds: `S + 1` increasing token offsets, from 0 to T; no document is empty.
        device: where the row is.
    """

    bounds: tuple[int, ...]
    device: torch.device

    @cached_property
    def lengths(self) -> list[int]:
        return [stop - start for start, stop in pairwise(self.bounds)]

    @cached_property
    def longest(self) -> int:
        return max(self.lengths)

    @cached_property
    def cu_seq_lens(self) -> Tensor:
        """`bounds` on the device, int32 `[S + 1]`."""
        return torch.tensor(self.bounds, dtype=torch.int32, device=self.device)


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """Who attends whom, and how strongly, beyond query, key and value.

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


def restrict(pattern: Pattern, start: int, stop: int) -> Pattern:
    """The pattern of the document at `start:stop`: diagonal blocks of mask and bias."""
    if pattern.mask is not None:
        pattern = replace(pattern, mask=pattern.mask[..., start:stop, start:stop])
    if pattern.bias is not None:
        rows = slice(start, stop) if pattern.bias.shape[-2] > 1 else slice(None)
        pattern = replace(pattern, bias=pattern.bias[..., rows, start:stop])
    return pattern


def pattern_mask(length: int, pattern: Pattern, device: torch.device) -> Tensor | None:
    """Bool `[L, L]` for a window shorter than the document, None where causality alone says it all."""
    if pattern.window is None or length <= pattern.window:
        return None
    if pattern.causal:
        return causal_mask(length, pattern.window, device)
    return window_mask(length, pattern.window, device)


def causal_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """`mask[i, j] = 0 <= i - j < window`, bool `[L, L]`."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril_()
    return mask if window is None else mask.triu_(1 - window)


def window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """`mask[i, j] = |i - j| < window`, bool `[L, L]`."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device)
    return mask.tril_(window - 1).triu_(1 - window)


def add_bias(mask: Tensor | None, bias: Tensor) -> Tensor:
    """One additive mask from a mask (bool or additive, or None) and a bias."""
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return bias + mask


def repeat_heads(states: Tensor, heads: int) -> Tensor:
    """`[B, Hkv, L, D]` -> `[B, heads, L, D]`: each key/value head serves `heads / Hkv` query heads."""
    batch, kv_heads, length, dim = states.shape
    if kv_heads == heads:
        return states
    repeated = states[:, :, None].expand(batch, kv_heads, heads // kv_heads, length, dim)
    return repeated.reshape(batch, heads, length, dim)
