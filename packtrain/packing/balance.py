"""Balance: a step's examples over ranks and micro-steps so that no rank waits for another.

(v1: longest-processing-time-first within the capacity.)
"""

from __future__ import annotations

import heapq

import numpy as np

from packtrain.packing.cost import Cost
from packtrain.packing.histogram import best_fit_decreasing
from packtrain.packing.lengths import histogram
from packtrain.packing.packs import PatternPacks, sort_by_length


def balanced(lengths: np.ndarray, *, micro_steps: int, ranks: int, capacity: int, cost: Cost) -> list[np.ndarray]:
    """Partition over ranks x micro-steps with costs as equal as possible, micro-step by micro-step."""
    number = micro_steps * ranks
    costs = cost(lengths)
    parts = _greedy(lengths, costs, number, capacity) or _packed(lengths, number, capacity)
    parts.sort(key=lambda part: -costs[part].sum())
    return parts


def _greedy(lengths, costs, number, capacity) -> list[np.ndarray] | None:
    heap = [(0.0, part, 0) for part in range(number)]
    parts: list[list[int]] = [[] for _ in range(number)]
    for index in np.argsort(-costs, kind="stable").tolist():
        length, full = int(lengths[index]), []
        while heap:
            load, part, tokens = heapq.heappop(heap)
            if tokens + length <= capacity:
                parts[part].append(index)
                heapq.heappush(heap, (load + costs[index], part, tokens + length))
                break
            full.append((load, part, tokens))
        else:
            return None
        for entry in full:
            heapq.heappush(heap, entry)
    return [np.array(part, dtype=np.int64) for part in parts]


def _packed(lengths, number, capacity) -> list[np.ndarray]:
    counts = histogram(lengths)
    patterns = best_fit_decreasing(counts, capacity)
    packs = list(PatternPacks(patterns=patterns, counts=counts, by_length=sort_by_length(lengths, counts), key=0))
    return packs + [np.zeros(0, dtype=np.int64)] * (number - len(packs))
