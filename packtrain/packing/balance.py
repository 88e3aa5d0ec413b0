"""Balance: a step's examples over ranks and micro-steps so that no rank waits for another.

Under FSDP and ZeRO-3 the ranks meet in every micro-step, and the slowest one sets the pace. With documents of very
different length, equal numbers of tokens are not equal work (attention grows with the square), and one long document
can cost more than the average micro-batch. So the micro-batches of one micro-step are made equally expensive, and the
micro-steps need not be:

    costs 9 5 4 4 2 1 1, two ranks, two micro-steps

                 equal everywhere, as far as it goes        level by level
    micro-step 0     [9]    [5 1]                            [9]  [5 4]
    micro-step 1     [4 2]  [4 1]   slowest: 9 + 6           [4]  [2 1 1]    slowest: 9 + 4

The levels are found first, from the longest documents down; then every document goes, longest first, to the micro-batch
that is furthest below its level and has room for it. Where there are few documents, they are then moved and swapped as
long as the update gets faster (`exchange`). Which examples the step has is not touched.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import product

import numpy as np

from packtrain.packing.cost import Cost
from packtrain.packing.lengths import histogram
from packtrain.packing.packers import best_fit_decreasing
from packtrain.packing.packs import PatternPacks, sort_by_length


def balanced(
    lengths: np.ndarray, *, micro_steps: int, ranks: int, capacity: int, cost: Cost, sizes: Sequence[int] = ()
) -> list[np.ndarray]:
    """Partitions a step's examples so that in each micro-step the ranks' costs are level, none above `capacity` tokens.

    Args:
        sizes: numbers of tokens, ascending, to one of which every micro-batch will be padded; see `aim`.

    Returns:
        `micro_steps * ranks` index arrays, number `m * ranks + r` for rank r in micro-step m; micro-steps from the most
        expensive to the cheapest, and the ranks' sums over the micro-steps level too. If the examples don't fit, the one
        array too many (or more) is for the caller to notice.

        >>> parts = balanced(np.array([9, 5, 4, 4, 2, 1, 1]), micro_steps=2, ranks=2, capacity=10, cost=Cost())
        >>> [part.tolist() for part in parts]
        [[0], [1, 2], [3], [4, 5, 6]]
    """
    if not np.any(lengths):  # no documents, or none with a token
        return np.array_split(np.arange(len(lengths)), micro_steps * ranks)
    costs = cost(lengths)
    order = np.argsort(-lengths.astype(np.int64), kind="stable")  # costs grow with length: the most expensive first
    for weights in (costs, costs / costs.mean() + lengths / lengths.mean(), lengths.astype(np.float64)):
        # Where memory is tight, level by cost may leave no room for the last documents: then mind the tokens too.
        parts = _fill(lengths, weights, order, np.repeat(levels(weights[order], micro_steps, ranks), ranks), capacity)
        if parts is not None:
            break
    else:
        parts = _pack(lengths, micro_steps * ranks, capacity)
    if len(parts) == micro_steps * ranks:
        parts = exchange(_in_micro_steps(parts, costs, ranks), lengths.astype(np.int64), costs, ranks, capacity)
        if len(sizes):
            return aim(_in_micro_steps(parts, costs, ranks), lengths.astype(np.int64), cost, ranks, np.array(sizes))
    return _in_micro_steps(parts, costs, ranks)


def levels(descending: np.ndarray, micro_steps: int, ranks: int) -> np.ndarray:
    """Returns the cost that a micro-batch of each micro-step should have: float64 `[micro_steps]`, descending.

    The average of what is left, or more where the longest document left costs more than that (its micro-step is then
    as long as that document at least, and the other ranks had better work as long).

        >>> levels(np.array([9.0, 8, 3, 3, 2, 2, 2, 1]), micro_steps=2, ranks=2).tolist()
        [9.0, 6.0]
    """
    result, left = [], descending.sum()
    for micro_step in range(micro_steps):
        first = micro_step * ranks
        costliest = descending[first] if first < len(descending) else 0.0
        result.append(max(costliest, left / (ranks * (micro_steps - micro_step))))
        left = max(left - ranks * result[-1], 0.0)
    return np.array(result)


def into_micro_steps(costs: list[float], ranks: int) -> list[int]:
    """Returns an order of micro-batches that is level: `order[m * ranks + r]` is what rank r computes in micro-step m.

    Neighbours in cost share a micro-step; within it the most expensive goes to the rank that has had least.

        >>> into_micro_steps([1.0, 9.0, 5.0, 8.0], ranks=2)
        [1, 3, 0, 2]
    """
    descending = sorted(range(len(costs)), key=lambda part: -costs[part])
    done = np.zeros(ranks)
    order = []
    for start in range(0, len(descending), ranks):
        group = descending[start : start + ranks]
        place = np.argsort(done[: len(group)], kind="stable")
        own = np.empty(len(group), dtype=np.int64)
        own[place] = group
        done[: len(group)] += np.array(costs)[own]
        order += own.tolist()
    return order


def _in_micro_steps(parts: list[np.ndarray], costs: np.ndarray, ranks: int) -> list[np.ndarray]:
    return [parts[part] for part in into_micro_steps([costs[part].sum() for part in parts], ranks)]


def _fill(lengths, weights, order, targets, capacity) -> list[np.ndarray] | None:
    """Puts each document, in this order, into the part furthest below its target that has room; None if none has.

    `capacity` is that of every part, or an array of one for each.
    """
    parts: list[list[int]] = [[] for _ in targets]
    capacities = np.broadcast_to(capacity, len(targets)).tolist()
    open_parts = [
        (-target, part, capacities[part]) for part, target in enumerate(targets.tolist())
    ]  # (-gap, part, tokens left)
    heapq.heapify(open_parts)
    parked: list[tuple[int, float, int]] = []  # too full for the documents so far: (-tokens left, -gap, part)
    for index, length, weight in zip(order.tolist(), lengths[order].tolist(), weights[order].tolist(), strict=True):
        while parked and -parked[0][0] >= length:
            room, gap, part = heapq.heappop(parked)
            heapq.heappush(open_parts, (gap, part, -room))
        while open_parts and open_parts[0][2] < length:
            gap, part, room = heapq.heappop(open_parts)
            heapq.heappush(parked, (-room, gap, part))
        if not open_parts:
            return None
        gap, part, room = open_parts[0]
        parts[part].append(index)
        heapq.heapreplace(open_parts, (gap + weight, part, room - length))
    return [np.array(part, dtype=np.int64) for part in parts]


def _pack(lengths, number, capacity) -> list[np.ndarray]:
    """Makes the tightest packs, when memory is the only concern left."""
    counts = histogram(lengths)
    patterns = best_fit_decreasing(counts, capacity)
    packs = list(
        PatternPacks(patterns=patterns, counts=counts, by_length=sort_by_length(lengths, counts), key=0, bound=0)
    )
    return packs + [np.zeros(0, dtype=np.int64)] * (number - len(packs))


MOST_PAIRS = 1 << 14  # looked at in a round; beyond it there are documents enough for the greedy rule
ROUNDS = 64
_GAIN = 1e-9  # of the whole cost; less is rounding


def exchange(
    parts: list[np.ndarray], lengths: np.ndarray, costs: np.ndarray, ranks: int, capacity: int
) -> list[np.ndarray]:
    """Moves and swaps documents between micro-batches as long as the update gets faster.

    A greedy partition of many documents is level to a few in a thousand; of a handful it may be a third too slow. The
    time of an update is the sum over micro-steps of the most expensive rank, so only the most expensive micro-batches are
    worth lightening: of all ways to give one of their documents away, or to swap it for another, the best is taken until
    none helps. Every round is a matrix of (documents of these micro-batches) x (all documents and places), so updates of
    many documents are left alone.

    Args:
        parts: index arrays, number `m * ranks + r` for rank r in micro-step m; none above `capacity` tokens.
        lengths, costs: int64 and float64 `[documents]`.

    Returns:
        As many index arrays, in which each document occurs once.

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
        costliest = table.argmax(axis=1) + np.arange(len(table)) * ranks
        first = table.max(axis=1)
        second = np.partition(table, -2, axis=1)[:, -2] if ranks > 1 else np.zeros(len(table))
        mine = np.flatnonzero(costliest[rows[where]] == where)  # documents of the most expensive parts, [B]
        if len(mine) * (documents + number) > MOST_PAIRS:
            break
        place = np.append(where, np.arange(number))  # [P], the part of each place
        moved = costs[mine, None] - given_costs  # [B, P]
        tokens = lengths[mine, None] - given_lengths
        here, there = where[mine], place
        lighter = np.maximum(second[rows[here]][:, None], load[here][:, None] - moved)  # this micro-step's new maximum
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


MOST_CHOICES = 1 << 10  # combinations of sizes that are looked at for an update
TRIES = 8  # of these, the smallest with room for all tokens, into which documents are put


def aim(parts: list[np.ndarray], lengths: np.ndarray, cost: Cost, ranks: int, sizes: np.ndarray) -> list[np.ndarray]:
    """Deals documents anew so that they fill the sizes that micro-batches are padded to.

    Level micro-batches are equally large, so padding to the next size costs all of them the same. But micro-steps need not
    be equal: where three of 74 tokens would be padded to 100, one of 100 and two of 60 can hold the same documents. So
    every micro-step goes some sizes up or down, all its ranks alike, and of the combinations with room for all tokens
    the smallest is taken into which the documents fit.

    Args:
        parts: index arrays, number `m * ranks + r`, level; none has more than `sizes[-1]` tokens.
        lengths: int64 `[documents]`.
        sizes: int64 `[n]`, ascending.

    Returns:
        As many index arrays, in which each document occurs once: those given, unless the update gets faster, with its
        padding counted.

        >>> parts, lengths = [np.array([0, 1, 2, 3]), np.array([4, 5, 6, 7]), np.array([8, 9, 10])], np.full(11, 20)
        >>> [int(lengths[part].sum()) for part in aim(parts, lengths, Cost(), 1, np.array([60, 100]))]
        [100, 60, 60]
    """
    costs, tokens = cost(lengths), np.array([lengths[part].sum() for part in parts])
    load = np.array([costs[part].sum() for part in parts])
    order = np.argsort(-lengths, kind="stable")

    def padded(own: list[np.ndarray]) -> np.ndarray:
        """Returns the cost of every part with its padding, float64 `[parts]`."""
        size = np.array([lengths[part].sum() for part in own])
        return np.array([costs[part].sum() for part in own]) + cost(sizes[np.searchsorted(sizes, size)] - size)

    def waited(own: list[np.ndarray]) -> float:
        return float(padded(own).reshape(-1, ranks).max(axis=1).sum())

    up, steps = np.searchsorted(sizes, tokens), len(parts) // ranks
    free = min(steps, MOST_CHOICES.bit_length() - 1)  # micro-steps that choose; others keep the next size
    around = max(2, min(len(sizes), int(MOST_CHOICES ** (1 / free))))
    choices = np.array(list(product(range(-(around // 2), (around + 1) // 2), repeat=free)))
    chosen = up + np.pad(choices, [(0, 0), (0, steps - free)]).repeat(ranks, axis=1)  # [choices, parts]
    chosen = chosen[((chosen >= 0) & (chosen < len(sizes))).all(axis=1)]
    sums, first = np.unique(
        sizes[chosen].sum(axis=1), return_index=True
    )  # equal sums are mostly the same in another order
    smaller = first[(sums >= lengths.sum()) & (sums < sizes[up].sum())]
    least = waited(parts)
    for room in sizes[chosen[smaller[:TRIES]]]:  # [parts]
        for weights, targets in ((costs, load * room / np.maximum(tokens, 1)), (lengths, room)):
            found = _fill(lengths, weights, order, targets, room)
            if found is None:
                continue
            found = [found[part] for part in into_micro_steps(padded(found).tolist(), ranks)]
            if waited(found) < least:
                return found
    return parts
