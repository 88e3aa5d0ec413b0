"""Attention over documents that share a prefix: the keys of one begin with those of another, which are computed once.

    query      document        attends
    p p p a a  prompt, chosen  itself, causally
    r r r      rejected        the prompt's keys and then its own, causally, at the positions that go on from the prompt

    flat row     p p p a a r r r        cu_seq_lens_q  [0, 5, 8]        position_ids  0 1 2 3 4 3 4 5
    keys         p p p a a p p p r r r  cu_seq_lens_k  [0, 5, 11]       key_index     0 1 2 3 4 0 1 2 5 6 7

A causal prompt is the same whatever follows, so all that a document alone would compute is computed, the prompt's part of
it once; its keys and values gather the gradients of all documents that read them. Positions being those of the document
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
    """The groups of documents of a flat row that share a prefix, on the host; like `Bounds`, nothing that engines look into.

    Attributes:
        groups: tokens of the documents of each group, in the order of the row: the first with the prefix, others without.
        prompts: tokens of the prefix of each group.
    """

    def __init__(self, groups: Sequence[Sequence[int]], prompts: Sequence[int]):
        self.groups = tuple(tuple(group) for group in groups)
        self.prompts = tuple(prompts)

    def __repr__(self) -> str:
        return f"SharedPrefixes({self.groups}, {self.prompts})"

    @property
    def longest(self) -> int:
        """Tokens of the longest document with its prefix."""
        return max(self._key_lengths())

    def entries(self) -> dict[str, Any]:
        """Returns the entries of a batch that tell of the keys: `cu_seq_lens_k` int32 `[S + 1]`, `max_length_k` and
        `key_index` int64 `[K]`, the place in the row of every key that a document reads."""
        index, start = [], 0
        for group, prompt in zip(self.groups, self.prompts, strict=True):
            prefix = np.arange(start, start + prompt)
            for number, length in enumerate(group):
                own = np.arange(start, start + length)
                index.append(own if number == 0 else np.concatenate([prefix, own]))
                start += length
        lengths = self._key_lengths()
        return {
            "cu_seq_lens_k": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
            "max_length_k": max(lengths),
            "key_index": torch.from_numpy(np.concatenate(index)),
        }

    def _key_lengths(self) -> list[int]:
        pairs = zip(self.groups, self.prompts, strict=True)
        return [n + (prompt if number else 0) for group, prompt in pairs for number, n in enumerate(group)]


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
    if [length for group in shared.groups for length in group] != documents.lengths:
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
    lengths = [length for group in shared.groups for length in group]
    pieces = iter(zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True))
    outputs = []
    for group, prompt in zip(shared.groups, shared.prompts, strict=True):
        q, first_k, first_v = next(pieces)
        outputs.append(attend_one(q, first_k, first_v, pattern))
        for length in group[1:]:
            q, k, v = next(pieces)
            k = torch.cat([first_k[:, :, :prompt], k], dim=2)  # [1, Hkv, prompt + L, D]
            v = torch.cat([first_v[:, :, :prompt], v], dim=2)
            mask = continued_mask(length, prompt, pattern.window, q.device)
            outputs.append(attend_one(q, k, v, replace(pattern, mask=mask)))
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1)


def continued_mask(length: int, prompt: int, window: int | None, device: torch.device) -> Tensor:
    """Makes the mask of a document that goes on from its prefix, bool `[length, prompt + length]`, True attends.

    >>> continued_mask(2, 2, None, torch.device("cpu")).int().tolist()
    [[1, 1, 1, 0], [1, 1, 1, 1]]
    """
    mask = torch.ones(length, prompt + length, dtype=torch.bool, device=device).tril_(prompt)
    return mask if window is None else mask.triu_(prompt + 1 - window)
