"""The two views of documents inside a model: one flat row `[1, N]`, and groups of padded rows `[S, L]`.

    flat    a a a a b b c c c d          groups   a a a a      b b
                                                  c c c .      d .

Rows are padded on the right, with copies of their last token where a value is not a mask, so that nothing unusual is
computed there. Documents of like length stand in one group: as few groups as keep padding below a share of the tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import Cache
from transformers.utils import ModelOutput

MOST_PADDING = 0.15  # of the real tokens
_MOST_CUTS = 64  # places between sorted documents that are tried
_OF_DOCUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "cu_seqlens")
_MASKS = re.compile("mask|bias|alibi")
Grouping = Literal["like lengths", "equal lengths", "one"]
Biases = Literal["rows", "shared"]


@lru_cache(maxsize=16)
def group(lengths: tuple[int, ...], grouping: Grouping = "like lengths") -> list[list[int]]:
    """Groups documents of like length: the fewest groups with at most `MOST_PADDING`, and of those the least padding.

        >>> group((9, 100, 95, 8, 8))
        [[1, 2], [0, 3, 4]]

    Args:
        lengths: tokens of each document.
        grouping: "equal lengths" allows no padding; "one" makes one group of all.

    Returns:
        Numbers of documents, each once, longest first.
    """
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    if grouping == "one":
        return [order]
    sizes = np.array([lengths[number] for number in order])
    cuts = np.flatnonzero(np.diff(sizes)) + 1  # before a shorter document
    if grouping == "equal lengths":
        ends = [*cuts.tolist(), len(order)]
    else:
        if len(cuts) > _MOST_CUTS:
            cuts = cuts[np.linspace(0, len(cuts) - 1, _MOST_CUTS).round().astype(int)]
        ends = _fewest(sizes, np.array([0, *cuts, len(order)]))
    return [order[start:stop] for start, stop in zip([0, *ends], ends, strict=False)]


def _fewest(sizes: np.ndarray, edges: np.ndarray) -> list[int]:
    """Returns the ends of the groups, by dynamic programming over the places `edges` where a group may end."""
    area = (edges[None, :] - edges[:, None]) * sizes[np.minimum(edges, len(sizes) - 1)][:, None]  # of a group i:j
    area = np.where(edges[None, :] > edges[:, None], area, np.iinfo(np.int64).max // 4)
    allowed = int(sizes.sum() * (1 + MOST_PADDING))
    best, choices = area[0], []
    while best[-1] > allowed:
        total = best[:, None] + area  # the last group begins at i
        choices.append(total.argmin(axis=0))
        best = total.min(axis=0)
    ends = [len(edges) - 1]
    for choice in reversed(choices):
        ends.append(int(choice[ends[-1]]))
    return [int(edges[end]) for end in reversed(ends)]


@dataclass(frozen=True)
class Group:
    """Rows of one padded batch.

    Attributes:
        index: int64 `[S, L]`, the token of the flat row at each place; at padding, the document's last one.
        real: bool `[S, L]`.
        rows: numbers of the documents.
    """

    index: Tensor
    real: Tensor
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Views:
    """How the tokens of one flat row lie in padded groups.

    Attributes:
        groups: the padded batches.
        back: int64 `[N]`, the place of each token in all groups, flattened and one after the other.
        rows_back: int64 `[documents]`, the same for rows.
    """

    groups: list[Group]
    back: Tensor
    rows_back: Tensor

    @classmethod
    def of(cls, bounds: Sequence[int], device: torch.device, grouping: Grouping = "like lengths") -> Views:
        """Makes the views of documents `bounds[i]:bounds[i + 1]`. Nothing is read from the device."""
        starts, lengths = np.array(bounds[:-1]), np.diff(bounds)
        groups, back, place = [], np.empty(bounds[-1], dtype=np.int64), 0
        numbers = group(tuple(lengths.tolist()), grouping)
        for rows in numbers:
            width = int(lengths[rows].max())
            columns = np.arange(width)[None]
            real = columns < lengths[rows][:, None]
            index = starts[rows][:, None] + np.minimum(columns, lengths[rows][:, None] - 1)
            back[index[real]] = place + np.flatnonzero(real)
            place += real.size
            parts = (torch.from_numpy(part).to(device, non_blocking=True) for part in (index, real))
            groups.append(Group(*parts, rows=tuple(rows)))
        rows_back = np.argsort(np.concatenate(numbers))
        return cls(groups, torch.from_numpy(back).to(device), torch.from_numpy(rows_back).to(device))

    @cached_property
    def total(self) -> int:
        return len(self.back)


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """How the arguments of one module are converted.

    Attributes:
        grouping: how documents are grouped.
        causal: whether a position is moved by none behind it.
        whole: whether the module is a whole model, which takes a 2-D `attention_mask`.
        biases: whether a bias `[H, 1, N]` of keys belongs to each row (BLOOM) or to all of them (MPT).
    """

    grouping: Grouping = "like lengths"
    causal: bool = True
    whole: bool = False
    biases: Biases = "rows"

    def padded(
        self, names: Iterable[str], args: tuple, kwargs: dict[str, Any], views: Views, group: Group
    ) -> tuple[tuple, dict[str, Any]]:
        """Returns the arguments of a call with `[1, N, ...]` for those with one group's `[S, L, ...]`.

        Args:
            names: of the positional arguments.
        """
        converted = tuple(self._value(value, name, views, group) for name, value in zip(names, args, strict=True))
        named = {
            name: self._value(value, name, views, group) for name, value in kwargs.items() if name not in _OF_DOCUMENTS
        }
        if self.whole:
            named["attention_mask"] = group.real.long()
        return converted, named

    def _value(self, value: Any, name: str, views: Views, group: Group) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(self._value(part, name, views, group) for part in value)
        if isinstance(value, dict):
            return {key: self._value(part, key, views, group) for key, part in value.items()}
        if isinstance(value, Cache):  # one for all groups would join them
            return None
        if not torch.is_tensor(value) or value.dim() < 2 or views.total == 1:
            return value
        return self._tensor(value, bool(_MASKS.search(name)), views.total, group)

    def _tensor(self, value: Tensor, is_mask: bool, total: int, group: Group) -> Tensor:
        """Converts by shape: which dimension is the tokens', and which the batch's."""
        shape, index = value.shape, group.index
        width = index.shape[1]
        if is_mask and shape[-2:] == (total, total):
            return self._square(value, total, group)
        if shape[:2] == (1, total):
            rows = value[0][index]
            return rows * group.real.to(rows.dtype) if is_mask and value.dim() == 2 else rows
        if value.dim() == 3 and shape[1:] == (1, total) and is_mask:
            if self.biases == "shared":  # differences of keys count: the end of the row is that of its longest document
                return value[..., -width:]
            return value[..., :width].repeat(len(index), 1, 1)
        if value.dim() > 2 and shape[1:3] == (1, total):
            rows = value[:, 0][:, index]  # [A, S, L, ...]
            return rows[0].unsqueeze(1) if shape[0] == 1 else rows
        if value.dim() == 4 and shape[0] == 1 and shape[2] == total:
            return value[0][:, index].transpose(0, 1)
        if value.dim() == 4 and shape[0] == 1 and shape[3] == total:
            columns = value[0][..., index].movedim(-2, 0)  # [S, h, 1, L]
            return torch.where(group.real[:, None, None], columns, masked(columns)) if is_mask else columns
        if shape[0] == total:
            return value[index.flatten()]
        return value

    def _square(self, value: Tensor, total: int, group: Group) -> Tensor:
        """Converts a mask `[..., N, N]` to its blocks `[S, ..., L, L]`."""
        index, width = group.index, group.index.shape[1]
        if value.dim() == 2:
            return value[:width, :width]
        blocks = value[..., index[:, :, None], index[:, None, :]]  # [..., S, L, L]
        hidden = value[..., :1, -1:].unsqueeze(-1) if self.causal else masked(value)  # the first sees no last
        real = group.real[:, None, :].expand(blocks.shape[-3:])
        blocks = torch.where(real, blocks, hidden)
        return blocks[0].movedim(-3, 0) if value.shape[0] == 1 else blocks.flatten(0, 1)


def masked(like: Tensor) -> Tensor:
    """Returns what hides a key in a mask like this: the lowest number where it is added, 0 where it is of zeros and ones."""
    if like.dtype.is_floating_point:
        lowest = like.new_tensor(torch.finfo(like.dtype).min)
        return torch.where(like.amax() > 0, torch.zeros_like(lowest), lowest)
    return like.new_zeros(())


def flat(outputs: list[Any], views: Views) -> Any:
    """Joins what a module gave for each group to what it would give for one flat row."""
    first = outputs[0]
    if isinstance(first, ModelOutput):
        return type(first)(**{name: flat([one[name] for one in outputs], views) for name in first})
    if isinstance(first, dict):
        return {name: flat([one[name] for one in outputs], views) for name in first}
    if isinstance(first, (tuple, list)):
        return type(first)(flat(list(parts), views) for parts in zip(*outputs, strict=True))
    if not torch.is_tensor(first) or isinstance(first, torch.nn.Parameter):  # the latter has no rows
        return first
    shapes = [(one.shape, group.index.shape) for one, group in zip(outputs, views.groups, strict=True)]
    if all(len(shape) > 2 and shape[:2] == rows for shape, rows in shapes):
        return torch.cat([one.flatten(0, 1) for one in outputs]).index_select(0, views.back).unsqueeze(0)
    if all(len(shape) and shape[0] == rows[0] * rows[1] for shape, rows in shapes):
        return torch.cat(outputs).index_select(0, views.back)
    if all(len(shape) and shape[0] == rows[0] for shape, rows in shapes) and first.dim() == 2:
        return torch.cat(outputs).index_select(0, views.rows_back)
    return None
