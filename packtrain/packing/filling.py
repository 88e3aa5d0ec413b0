"""Pack after pack as full as can be: the longest document left, and the documents that best fill the rest.

A subset-sum heuristic (Caprara & Pferschy, "Worst-case analysis of the subset sum algorithm for bin packing", 2004; also
known as minimum bin slack), on the histogram: a pack found is repeated while there are documents for it. Where packs
hold many documents it reaches the lower bound that best-fit decreasing misses. The sums within reach are the bits of an
integer, so that adding a document to all of them is one shift.
"""

from __future__ import annotations

import numpy as np

from packtrain.packing.packs import Patterns

CANDIDATES = 512  # distinct lengths tried in a pack: half of them the longest that fit, the others spread over the rest


def fill_up(counts: np.ndarray, capacity: int) -> Patterns:
    """Pack a histogram, each pack as full as possible, long documents first; arguments as `best_fit_decreasing`."""
    left = dict(zip(np.flatnonzero(counts)[::-1].tolist(), counts[np.flatnonzero(counts)][::-1].tolist(), strict=True))
    columns: list[tuple[dict[int, int], int]] = []
    while left:
        pack = _fullest(left, capacity)
        times = min(left[length] // number for length, number in pack.items())
        columns.append((pack, times))
        for length, number in pack.items():
            left[length] -= number * times
            if not left[length]:
                del left[length]
    return patterns_of(columns, len(counts))


def _fullest(left: dict[int, int], capacity: int) -> dict[int, int]:
    """Number of documents by length: the first of `left` and those that fill the pack best, the longest where equal."""
    first = next(iter(left))
    room = capacity - first
    mask = (2 << room) - 1
    within, steps = 1, []  # bit s of `within`: documents looked at so far can sum to s
    fitting = [length for length in left if length <= room]
    if len(fitting) > CANDIDATES:
        half = CANDIDATES // 2
        fitting = fitting[:half] + fitting[half :: len(fitting) // half]
    for length in fitting:
        number = left[length] - (length == first)
        for _ in range(min(number, room // length) if length else 0):
            wider = (within | within << length) & mask
            if wider == within:
                break
            steps.append((within, length))
            within = wider
        if within >> room:
            break
    pack, total = {first: 1}, within.bit_length() - 1
    for before, length in reversed(steps):
        if not before >> total & 1:
            pack[length] = pack.get(length, 0) + 1
            total -= length
    return pack


def patterns_of(columns: list[tuple[dict[int, int], int]], size: int) -> Patterns:
    """Patterns from (documents by length, how often) pairs; documents of each length are handed out in this order."""
    taken = [0] * size
    rows = []
    for pattern, (pack, times) in enumerate(columns):
        for length, number in pack.items():
            rows.append((pattern, length, number, taken[length]))
            taken[length] += number * times
    return Patterns.of_entries([times for _, times in columns], *np.array(rows, dtype=np.int64).reshape(-1, 4).T)
