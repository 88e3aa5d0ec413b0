"""The last percents of balance: move or swap documents as long as an update gets faster.

A greedy partition of many documents is level to a few in a thousand; of a handful it may be a third too slow. The time of
an update is the sum over micro-steps of the dearest rank, so only a dearest micro-batch is worth lightening: the best of all
ways to give one of its documents away, or to swap it for another, is taken until none helps. Every such step is a matrix
of (documents of dearest micro-batches) x (all documents and places), so updates of many documents are left alone.
"""

from __future__ import annotations

import numpy as np

MOST_PAIRS = 1 << 14  # looked at in a round; beyond it there are documents enough for the greedy rule
ROUNDS = 64
_GAIN = 1e-9  # of the whole cost; less is rounding


def exchange(
    parts: list[np.ndarray], lengths: np.ndarray, costs: np.ndarray, ranks: int, capacity: int
) -> list[np.ndarray]:
    """The same documents in as many micro-batches, their micro-steps' dearest ranks cheaper in sum, or as they are.

    Args:
        parts: index arrays, number `m * ranks + r` for rank r in micro-step m; none above `capacity` tokens.
        lengths, costs: int64 and float64 `[documents]`.

        >>> parts = [np.array([2]), np.array([0]), np.array([1]), np.array([], int)]
        >>> [part.tolist() for part in exchange(parts, np.array([4, 4, 7]), np.array([4.0, 4, 7]), 2, 99)]
        [[2], [0, 1], [], []]
    """
    number, documents = len(parts), len(lengths)
    where = np.empty(documents, dtype=np.int64)
    for part, own in enumerate(parts):
        where[own] = part
    # A place is a document to swap with, or the end of a part: nothing comes back.
    given_costs, given_lengths = np.append(costs, np.zeros(number)), np.append(lengths, np.zeros(number, np.int64))
    rows = np.arange(number) // ranks
    for _ in range(ROUNDS):
        load = np.bincount(where, weights=costs, minlength=number)
        left = capacity - np.bincount(where, weights=lengths, minlength=number)
        table = load.reshape(-1, ranks)
        dearest = table.argmax(axis=1) + np.arange(len(table)) * ranks
        first = table.max(axis=1)
        second = np.partition(table, -2, axis=1)[:, -2] if ranks > 1 else np.zeros(len(table))
        mine = np.flatnonzero(dearest[rows[where]] == where)  # documents of dearest parts, [B]
        if len(mine) * (documents + number) > MOST_PAIRS:
            break
        place = np.append(where, np.arange(number))  # [P], the part of each place
        moved = costs[mine, None] - given_costs  # [B, P]
        tokens = lengths[mine, None] - given_lengths
        here, there = where[mine], place
        lighter = np.maximum(second[rows[here]][:, None], load[here][:, None] - moved)  # this micro-step's new dearest
        heavier = load[there] + moved
        same = rows[here][:, None] == rows[there]
        gain = np.where(
            same,
            first[rows[here]][:, None] - np.maximum(lighter, heavier),
            first[rows[here]][:, None] - lighter + np.minimum(first[rows[there]] - heavier, 0.0),
        )
        gain[(tokens > left[there]) | (-tokens > left[here][:, None]) | (here[:, None] == there)] = 0
        best = int(gain.argmax())
        document, other = mine[best // len(place)], best % len(place)
        if gain.flat[best] <= _GAIN * first.sum():
            break
        if other < documents:
            where[other] = where[document]
        where[document] = place[other]
    order = np.argsort(where, kind="stable")
    return np.split(order, np.cumsum(np.bincount(where, minlength=number))[:-1])
