"""Attention over documents that share a prefix: the keys of one begin with those of the one before it.

    query      document            attends
    p p p a a  prompt, answer      itself, causally
    b b        another answer      the first 3 keys of the document before it, and then its own, causally
    u c        a later turn        the first 4 keys (p p p b) of the document before it, and then its own

    flat row     p p p a a b b u c      cu_seq_lens_q  [0, 5, 7, 9]      position_ids  0 1 2 3 4 3 4 4 5
    keys         p p p a a  p p p b b  p p p b u c                       cu_seq_lens_k [0, 5, 10, 16]
    key_index    0 1 2 3 4  0 1 2 5 6  0 1 2 5 7 8

A causal prefix is the same whatever follows, so all that a document alone would compute is computed, what it shares
once; its keys and values gather the gradients of all documents that read them. Positions being those of the document
alone, a sliding window is exact, too.

On any device there is one dense call per document; on CUDA a varlen kernel takes the keys gathered by `key_index`, with
offsets of queries and keys that differ (the causal mask is aligned at their ends).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from packtrain.modeling.attention.documents import refusal
from packtrain.modeling.attention.kernels import Documents, OnDevice, Pattern, attend_one, fused_kernel

KEY = "shared_prefixes"


class SharedPrefixes:
    """What the documents of a flat row share, on the host; like `Bounds`, nothing that engines look into.

    Attributes:
        lengths: tokens of every document, without what it shares.
        prefixes: tokens of every document that are the first of the one before it, as that would be alone; 0 where it
            shares nothing.
    """

    def __init__(self, lengths: Sequence[int], prefixes: Sequence[int]):
        self.lengths, self.prefixes = tuple(lengths), tuple(prefixes)

    def __repr__(self) -> str:
        return f"SharedPrefixes({self.lengths}, {self.prefixes})"

    @property
    def longest(self) -> int:
        """Tokens of the longest document with its prefix."""
        return max(self._key_lengths())

    def entries(self) -> dict[str, Any]:
        """Returns the entries of a batch that tell of the keys: `cu_seq_lens_k` int32 `[S + 1]`, `max_length_k` and
        `key_index` int64 `[K]`, the place in the row of every key that a document reads.

        >>> SharedPrefixes([5, 2, 2], [0, 3, 4]).entries()["key_index"].tolist()
        [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 0, 1, 2, 5, 7, 8]
        """
        index, start = [np.zeros(0, dtype=np.int64)], 0
        for length, prefix in zip(self.lengths, self.prefixes, strict=True):
            index.append(np.concatenate([index[-1][:prefix], np.arange(start, start + length)]))
            start += length
        lengths = self._key_lengths()
        return {
            "cu_seq_lens_k": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
            "max_length_k": max(lengths),
            "key_index": torch.from_numpy(np.concatenate(index)),
        }

    def _key_lengths(self) -> list[int]:
        return [length + prefix for length, prefix in zip(self.lengths, self.prefixes, strict=True)]


def attend_shared(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, kwargs: Mapping, pattern: Pattern
) -> Tensor:
    """Attends within every document and its prefix.

    Args:
        query, key, value, pattern: as `packtrain.modeling.attention.kernels.attend` has them.
        documents: those of the queries.
        kwargs: the arguments of the attention function, with `shared_prefixes` and its `entries()`.

    Returns:
        `[1, T, H, Dv]`.

    Raises:
        ModelError: a layer whose attention isn't causal, or that brings a mask or a position bias.
    """
    shared: SharedPrefixes = kwargs[KEY]
    if pattern.mask is not None or pattern.bias is not None or not pattern.causal:
        what = (
            "a mask of its own" if pattern.mask is not None else "a position bias" if pattern.bias is not None else ""
        )
        fix = "set `objective.shared_prefix: false`"
        raise refusal(f"a shared prefix in a layer with {what or 'attention both ways'}", fix)
    if [*shared.lengths] != documents.lengths:
        raise refusal("shared prefixes of other documents than those of the row", "pass batches on as they are made")
    if torch.is_autocast_enabled(query.device.type):  # varlen kernels have no autocast rule
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    kernel = fused_kernel(query, value, pattern)
    if kernel is not None:
        keys = OnDevice(kwargs["cu_seq_lens_k"], kwargs["max_length_k"])
        index = kwargs["key_index"]
        return kernel(query, key.index_select(2, index), value.index_select(2, index), documents, pattern, keys=keys)
    return attend_each_shared(query, key, value, shared, pattern)


def attend_each_shared(query: Tensor, key: Tensor, value: Tensor, shared: SharedPrefixes, pattern: Pattern) -> Tensor:
    """Attends by one dense call per document; arguments and result as `attend_shared`."""
    pieces = zip(*(states.split(shared.lengths, dim=2) for states in (query, key, value)), strict=True)
    outputs, keys, values = [], key[:, :, :0], value[:, :, :0]  # those of the document before
    for (q, k, v), prefix in zip(pieces, shared.prefixes, strict=True):
        if prefix:
            keys, values = torch.cat([keys[:, :, :prefix], k], dim=2), torch.cat([values[:, :, :prefix], v], dim=2)
        else:
            keys, values = k, v
        mask = continued_mask(q.shape[2], prefix, pattern.window, q.device) if prefix else None
        outputs.append(attend_one(q, keys, values, replace(pattern, mask=mask)))
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1)


def continued_mask(length: int, prefix: int, window: int | None, device: torch.device) -> Tensor:
    """Makes the mask of a document that goes on from its prefix, bool `[length, prefix + length]`, True attends.

    >>> continued_mask(2, 2, None, torch.device("cpu")).int().tolist()
    [[1, 1, 1, 0], [1, 1, 1, 1]]
    """
    mask = torch.ones(length, prefix + length, dtype=torch.bool, device=device).tril_(prefix)
    return mask if window is None else mask.triu_(prefix + 1 - window)
