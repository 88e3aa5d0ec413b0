"""A few static shapes: every micro-batch of a plan rounded up to one of N numbers of tokens.

    sizes of the plan    4093 4096 4071 4088 2950 4094 ...
    shapes, N = 2        2950 4096          every micro-batch is padded to the next of these

A compiler makes a graph per shape (`torch.compile`, CUDA graphs), and a flat micro-batch has hardly ever the shape of
another. The N numbers are those with the least padding over the plan: a shortest path, found exactly by dynamic
programming over the sizes that occur. Padding is documents without an example, which nothing supervises, none longer than
the longest document of the plan. `balanced` then deals the documents of an update anew, so that they fill the shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from packtrain.packing.scopes import EMPTY_TOKENS

MOST_SIZES = 1024  # sizes the dynamic program looks at; beyond, neighbours count as the larger one


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """The shapes of a plan's flat micro-batches.

    Attributes:
        tokens: tokens of a micro-batch, ascending.
        documents: entries of `example_ids`, one fewer than those of `cu_seq_lens_q`; more only if updates that were not
            looked at have more.
        longest: `max_length_q` of every micro-batch: tokens of the plan's longest document.
        padding_share: share of the computed tokens that is padding, of the updates looked at.
    """

    tokens: tuple[int, ...]
    documents: int
    longest: int
    padding_share: float

    @classmethod
    def of(cls, parts: Sequence[np.ndarray], tokens: tuple[int, ...], *, longest: int = 0) -> Shapes:
        """Looks at micro-batches that will be padded to one of these numbers of tokens.

        Args:
            parts: lengths of the documents of every micro-batch, int `[S]` each; one without documents is all padding.
            longest: the least that `longest` must be, for micro-batches not among `parts`.
        """
        sizes = np.array([size_of(part) for part in parts])
        longest = max(longest, *(int(part.max(initial=EMPTY_TOKENS)) for part in parts))
        computed = np.array(tokens)[np.searchsorted(tokens, sizes)]
        pads = -(-(computed - sizes) // longest)  # documents of padding
        return cls(
            tokens=tokens,
            documents=int(max(len(part) + pad for part, pad in zip(parts, pads.tolist(), strict=True))),
            longest=longest,
            padding_share=float(1 - sum(int(part.sum()) for part in parts) / computed.sum()),
        )

    def round_up(self, tokens: int) -> int:
        """Returns the tokens of the micro-batch that holds so many."""
        at = int(np.searchsorted(self.tokens, tokens))
        assert at < len(self.tokens), f"a micro-batch of {tokens} tokens, and the largest shape is {self.tokens[-1]}"
        return self.tokens[at]

    def padding(self, tokens: int) -> np.ndarray:
        """Returns the lengths of the documents of padding that a micro-batch of so many tokens gets, int64 `[P]`."""
        missing = self.round_up(tokens) - tokens
        whole, rest = divmod(missing, self.longest)
        return np.array([self.longest] * whole + [rest] * (rest > 0), dtype=np.int64)


def size_of(lengths: np.ndarray) -> int:
    """Counts the tokens of a micro-batch of documents of these lengths; there is no micro-batch without any."""
    return int(lengths.sum()) or EMPTY_TOKENS


def least_padding(sizes: np.ndarray, number: int, largest: int) -> tuple[int, ...]:
    """Returns at most `number` values, the last `largest`, so that rounding every size up to one of them adds least.

    Time grows with `number` times the square of the sizes that occur; memory with that square.

    Args:
        sizes: int `[m]`, all at least 1 and none above `largest`.

    >>> least_padding(np.array([10, 10, 10, 11, 30, 31]), 2, 31)
    (11, 31)
    >>> least_padding(np.array([10, 10, 10, 11, 30, 31]), 3, 40)
    (11, 31, 40)
    """
    values, counts = np.unique(np.append(sizes, largest), return_counts=True)
    counts[-1] -= 1  # `largest` itself, which may not occur
    if len(values) > MOST_SIZES:
        kept = np.unique(np.append(np.arange(0, len(values), -(-len(values) // MOST_SIZES)), len(values) - 1))
        counts = np.add.reduceat(counts, np.append(0, kept[:-1] + 1))
        values = values[kept]
    number, many = min(number, len(values)), len(values)
    below = np.concatenate([[0], np.cumsum(counts)])  # [V + 1]
    # computed[i, j]: tokens computed if sizes i .. j are rounded up to value j; the real tokens are the same in any case
    computed = np.where(np.tri(many, dtype=bool).T, values * (below[1:] - below[:-1, None]), np.inf)
    best, chosen = computed[0], []  # best[j]: of sizes up to j, with the last shape j
    for _ in range(number - 1):
        ways = best[:-1, None] + computed[1:]  # the last shape but one is i, the sizes after it go to j
        chosen.append(np.append(0, ways[:, 1:].argmin(axis=0)))
        best = np.append(np.inf, ways[:, 1:].min(axis=0))
    return tuple(values[_path(chosen, many - 1)].tolist())


def _path(chosen: list[np.ndarray], last: int) -> list[int]:
    """Follows the choices back from the last shape; ascending."""
    path = [last]
    for before in reversed(chosen):
        path.append(int(before[path[-1]]))
    return path[::-1]
