"""Lower bounds: no packing whatever has fewer packs. They turn "this packer is good" into a number."""

from __future__ import annotations

import numpy as np


def lower_bound(counts: np.ndarray, capacity: int, max_documents: int | None = None) -> int:
    """The larger of the simple bounds: total size, document limit, and Martello & Toth's L2.

    Args:
        counts: int64 `[longest + 1]`, documents of each length; `longest <= capacity`.
        capacity: tokens in a pack.
        max_documents: most documents in a pack; None for no limit.
    """
    counts = np.asarray(counts, dtype=np.int64)
    size = -(-int((counts * np.arange(len(counts))).sum()) // capacity)
    documents = -(-int(counts.sum()) // max_documents) if max_documents else int(counts.any())
    return max(size, documents, martello_toth(counts, capacity))


def martello_toth(counts: np.ndarray, capacity: int) -> int:
    """L2 of Martello & Toth, "Lower bounds and reduction procedures for the bin packing problem" (1990).

    For a threshold a <= capacity / 2: documents longer than `capacity - a` are alone with those from a on; those in
    (capacity / 2, capacity - a] have a pack each, and only their free space can take documents in [a, capacity / 2].

        >>> martello_toth(np.bincount([6, 6, 6, 5, 5]), capacity=10)   # size alone: 3
        4
    """
    wide = np.zeros(capacity + 2, dtype=np.int64)
    wide[: len(counts)] = counts
    number = np.cumsum(wide)  # documents of at most x tokens
    tokens = np.cumsum(wide * np.arange(len(wide)))
    half = capacity // 2
    threshold = np.arange(half + 1)
    alone_or_large = number[capacity] - number[half]
    large_number = number[capacity - threshold] - number[half]  # in (capacity / 2, capacity - a]
    large_tokens = tokens[capacity - threshold] - tokens[half]
    below = np.maximum(threshold - 1, 0)
    small_tokens = tokens[half] - np.where(threshold > 0, tokens[below], 0)  # in [a, capacity / 2]
    beyond = small_tokens - (large_number * capacity - large_tokens)
    return int(alone_or_large + max(0, -(-int(beyond.max()) // capacity)))
