"""The packs that an epoch-scope strategy returns, as arrays instead of a list of a hundred million lists.

Two kinds, with the same three operations (`len`, `packs[number]`, `packs.take(numbers)`):

* `ListedPacks`: every item written down, pack after pack.
* `PatternPacks`: a few thousand patterns ("two of 700 tokens, one of 600, and 120,000 packs like this") plus the
  examples sorted by length. Which examples a pack holds is computed when it is asked for, so that a billion
  examples cost no more planning than a thousand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from packtrain.packing.lengths import CHUNK, chunks
from packtrain.packing.shuffle import permute


@dataclass(frozen=True, kw_only=True, eq=False)
class ListedPacks(Sequence):
    """Packs written down.

    Attributes:
        items: int64 `[m]` indices into the lengths, or `[m, 3]` rows (index, start, stop) for strategies that
            split examples; pack after pack.
        offsets: int64 `[packs + 1]`, pack p is `items[offsets[p]:offsets[p + 1]]`.
    """

    items: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, packs: Iterable[Sequence[int] | np.ndarray]) -> ListedPacks:
        arrays = [np.asarray(pack) for pack in packs if len(pack)]
        offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
        return cls(
            items=np.concatenate(arrays).astype(np.int64, casting="same_kind")
            if offsets[-1]
            else np.zeros(0, np.int64),
            offsets=offsets,
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, number):
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        return self.items[self.offsets[number] : self.offsets[number + 1]]

    def take(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (items, offsets) of some packs, in the order asked for."""
        sizes = self.offsets[numbers + 1] - self.offsets[numbers]
        return self.items[ranges(self.offsets[numbers], sizes)], offsets_of(sizes)


@dataclass(frozen=True, kw_only=True, eq=False)
class Patterns:
    """A packing of a histogram: which lengths lie together, and how often.

    The examples of one length are interchangeable, numbered 0, 1, ... ("rank"). Pack k of a pattern (k from 0)
    holds, for each of the pattern's slots s, rank `slot_first[s] + k * slot_stride[s]` of length `slot_length[s]`.

    Attributes:
        repeats: int64 `[P]`, packs of each pattern.
        offsets: int64 `[P + 1]`, the slots of pattern p are `offsets[p]:offsets[p + 1]`.
        slot_length, slot_first, slot_stride: int64 `[slots]`.
    """

    repeats: np.ndarray
    offsets: np.ndarray
    slot_length: np.ndarray
    slot_first: np.ndarray
    slot_stride: np.ndarray

    @classmethod
    def of_entries(cls, repeats, pattern, length, number, first) -> Patterns:
        """Makes patterns from entries "each pack of `pattern` holds `number` examples of `length`, from rank `first` on"."""
        order = np.argsort(pattern, kind="stable")
        pattern, length, number, first = pattern[order], length[order], number[order], first[order]
        documents = np.bincount(np.repeat(pattern, number), minlength=len(repeats))
        within = np.arange(number.sum()) - np.repeat(np.cumsum(number) - number, number)
        return cls(
            repeats=np.asarray(repeats, dtype=np.int64),
            offsets=offsets_of(documents),
            slot_length=np.repeat(length, number),
            slot_first=np.repeat(first, number) + within,
            slot_stride=np.repeat(number, number),
        )

    @cached_property
    def ends(self) -> np.ndarray:
        """int64 `[P]`, the number of packs up to and including each pattern."""
        return np.cumsum(self.repeats)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def slots(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the documents of some packs: lengths `[m]`, ranks `[m]`, and offsets `[packs + 1]` into both."""
        pattern = np.searchsorted(self.ends, numbers, side="right")
        nth = numbers - (self.ends[pattern] - self.repeats[pattern])  # this is the nth pack of its pattern
        sizes = self.offsets[pattern + 1] - self.offsets[pattern]
        slot = ranges(self.offsets[pattern], sizes)
        ranks = self.slot_first[slot] + np.repeat(nth, sizes) * self.slot_stride[slot]
        return self.slot_length[slot], ranks, offsets_of(sizes)


@dataclass(frozen=True, kw_only=True, eq=False)
class PatternPacks(Sequence):
    """Packs computed on demand from patterns; the examples within a length are shuffled by `key`.

    Attributes:
        patterns: the packing of the histogram.
        counts: int64 `[longest + 1]`, the histogram.
        by_length: `[n]` indices of the examples, sorted by length (see `sort_by_length`).
        key: 64-bit key of the shuffle within each length.
        bound: no packing of these lengths has fewer packs than this.
    """

    patterns: Patterns
    counts: np.ndarray
    by_length: np.ndarray
    key: int
    bound: int

    @cached_property
    def starts(self) -> np.ndarray:
        return np.cumsum(self.counts) - self.counts

    def __len__(self) -> int:
        return len(self.patterns)

    def by_cost(self, cost: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Returns the numbers of all packs, the cheapest first; `cost` of lengths `[m]`."""
        slots = np.append(cost(self.patterns.slot_length), 0.0)
        costs = np.add.reduceat(slots, self.patterns.offsets[:-1]) if len(self) else np.zeros(0)
        order = np.argsort(costs, kind="stable")
        repeats = self.patterns.repeats
        return ranges((self.patterns.ends - repeats)[order], repeats[order])

    def __getitem__(self, number):
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        return self.take(np.array([range(len(self))[number]]))[0]

    def take(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (indices, offsets) of some packs, in the order asked for."""
        lengths, ranks, offsets = self.patterns.slots(numbers)
        ranks = permute(ranks, self.counts[lengths], self.key, stream=lengths)
        return self.by_length[self.starts[lengths] + ranks].astype(np.int64), offsets


def sort_by_length(lengths: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns the indices sorted by length, ties in index order: uint32 `[n]` (int64 from 2^32 on), chunk by chunk.

    A counting sort: memory is the result plus a few arrays of one chunk.
    """
    dtype = np.uint32 if len(lengths) < 1 << 32 else np.int64
    if len(lengths) <= CHUNK:
        return _stable_argsort(lengths).astype(dtype)
    result = np.empty(len(lengths), dtype=dtype)
    next_place = np.cumsum(counts) - counts
    for start, chunk in chunks(lengths):
        order = _stable_argsort(chunk)
        present = np.bincount(chunk, minlength=len(counts))
        first = np.cumsum(present) - present
        result[np.repeat(next_place - first, present) + np.arange(len(chunk))] = order + start
        next_place += present
    return result


def _stable_argsort(chunk: np.ndarray) -> np.ndarray:
    """Sorts stably; 16-bit integers by radix, which in numpy is several times faster than wider ones."""
    assert len(chunk) <= CHUNK
    if chunk.max(initial=0) < 1 << 16:
        return np.argsort(chunk.astype(np.uint16), kind="stable")
    low = np.argsort((chunk & 0xFFFF).astype(np.uint16), kind="stable")
    return low[np.argsort((chunk >> 16).astype(np.uint16)[low], kind="stable")]


def ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Returns `[starts[0], starts[0] + 1, ..., starts[1], ...]`: `sizes[i]` integers from each `starts[i]`, end to end."""
    return np.repeat(starts - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())


def offsets_of(sizes: np.ndarray) -> np.ndarray:
    """Returns int64 `[len(sizes) + 1]`: 0 and the running sum."""
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
