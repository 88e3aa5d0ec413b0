"""Near-optimal packs with a proof of how near: column generation on the histogram, then rounding.

The number of packs of each pattern (a multiset of lengths that fits) is the unknown of Gilmore & Gomory, "A linear
programming approach to the cutting-stock problem" (1961): fewest packs, every document covered. There are too many
patterns to write down, so the linear program starts with those of best-fit decreasing and looks for better ones: given
the price of each length (the dual solution), the most valuable pattern is a knapsack. A pattern worth more than one pack
is added, until there is none. At any time, prices divided by the best pattern's worth prove a lower bound (Farley
1990). The prices used for this are pulled towards the best ones so far (Wentges 1997), without which they swing for
hundreds of rounds.

Fractions are then rounded by diving (Wäscher & Gau 1996): keep the whole parts, solve again for what is left, and let
best-fit decreasing finish at every stage; the best finish wins. The work depends on the number of distinct lengths, not
on the number of examples: seconds for a million. It is limited by rounds, never by the clock, so that every rank
finds the same packs.

From the top: `near_optimal`, its linear program, the knapsacks that find the most valuable patterns, and the lower bounds
that turn "this packer is good" into a number.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from packtrain.packing.packers import best_fit_decreasing, fill_up, patterns_of
from packtrain.packing.packs import Patterns
from packtrain.packing.shuffle import permute

WORTHWHILE = 0.001  # best-fit decreasing within this share of the bound is good enough to try nothing else
ENOUGH = 0.2  # of that share: where the search ends
MOST_LENGTHS = 2500  # distinct lengths beyond which the linear program is not tried
ROUNDS = 60  # of column generation on the whole problem
DIVES = 100
DIVE_ROUNDS = 3  # of column generation in each dive
COLUMNS = 8  # times the number of lengths: patterns kept
PULL = 0.7  # weight of the best prices so far
SPREAD = 0.02  # relative perturbation of the prices: patterns worth the same then differ from round to round
_EPSILON = 1e-6


def near_optimal(
    counts: np.ndarray, capacity: int, max_documents: int | None = None, *, worthwhile: float = WORTHWHILE
) -> tuple[Patterns, int]:
    """Returns (packing, proved lower bound on the number of packs); never more packs than best-fit decreasing.

    Args:
        counts, capacity, max_documents: as `best_fit_decreasing`.
        worthwhile: best-fit decreasing is returned as it is when within this share of the simple bounds; what is
            searched for is within a fifth of it. 0 searches until nothing is left to gain, or the rounds are used up.
    """
    best = best_fit_decreasing(counts, capacity, max_documents)
    bound = lower_bound(counts, capacity, max_documents)
    for improve in (_fill_up, _generate_and_dive):
        if len(best) <= bound * (1 + worthwhile) or counts[0]:  # documents of no tokens have no price
            break
        packing, proved = improve(counts, capacity, max_documents, best, bound, worthwhile * ENOUGH)
        best, bound = min(best, packing, key=len), max(bound, proved)
    return best, bound


def _fill_up(counts, capacity, max_documents, best, bound, gap) -> tuple[Patterns, int]:
    return (best if max_documents else fill_up(counts, capacity)), bound


def _generate_and_dive(counts, capacity, max_documents, best, bound, gap) -> tuple[Patterns, int]:
    if np.count_nonzero(counts) > MOST_LENGTHS:
        return best, bound
    problem = _CuttingStock(counts, capacity, max_documents, best)
    bound = problem.generate(bound, gap / 2)
    return (problem.dive(bound * (1 + gap)) if len(best) > bound else best), bound


class _CuttingStock:
    """The linear program of one histogram, with the patterns found for it so far.

    A pattern is a row of `columns`: how many documents of each distinct length it holds, int32 `[D]`.
    """

    def __init__(self, counts: np.ndarray, capacity: int, max_documents: int | None, start: Patterns):
        self.lengths = np.flatnonzero(counts)  # ascending, [D]
        self.demand = counts[self.lengths].astype(np.int64)  # [D]
        self.capacity, self.max_documents = capacity, max_documents
        documents = np.diff(start.offsets)
        pattern = np.repeat(np.arange(len(documents)), documents)
        first = np.zeros((len(documents), len(self.lengths)), dtype=np.int32)
        np.add.at(first, (pattern, np.searchsorted(self.lengths, start.slot_length)), 1)
        self.columns = first
        self._keep(np.ones(len(first), dtype=bool))
        self.packs = np.zeros(0)

    def generate(self, bound: float, gap: float) -> int:
        """Solves over all patterns, up to rounding or a relative gap; returns the lower bound that the prices prove."""
        best_prices, pull = self.lengths / self.capacity, PULL
        for number in range(ROUNDS):
            self.packs, prices = self._solve(self.demand)
            asked = pull * best_prices + (1 - pull) * prices
            worth, _ = self._price(asked)
            if (proved := float(asked @ self.demand) / max(worth, 1.0)) > bound:
                bound, best_prices = proved, asked / max(worth, 1.0)
            value = self.packs.sum()
            if np.ceil(bound * (1 - _EPSILON)) >= np.ceil(value * (1 - _EPSILON)) or value <= bound * (1 + gap):
                break
            noise = permute(np.arange(len(asked)), 1 << 30, key=number) / (1 << 30) - 0.5
            found = self._price(asked * (1 + SPREAD * noise))[1]
            if not self._add(found[found @ prices > 1 + _EPSILON]):
                if pull == 0:
                    break
                pull = pull - 0.3 if pull > 0.3 else 0.0
            if len(self.columns) > COLUMNS * len(self.lengths):
                worths = self.columns @ prices
                self._keep(worths >= np.partition(worths, -len(worths) // 2)[-len(worths) // 2])
        return int(np.ceil(bound * (1 - _EPSILON)))

    def dive(self, aim: float) -> Patterns:
        """Rounds the solution until `aim` packs: the whole parts stay, the rest is solved again, and rounded up where
        nothing is whole."""
        demand = self.demand.copy()
        fixed: list[tuple[np.ndarray, int]] = []
        best, best_size = None, np.inf
        packs = self.packs
        for _ in range(DIVES):
            rest = self._finish(demand)
            size = sum(times for _, times in fixed) + len(rest)
            if size < best_size:
                best, best_size = (list(fixed), rest), size
            if best_size <= aim or not demand.any():
                break
            if len(packs) != len(self.columns) or fixed:
                packs = self._solve_rest(demand)
            whole = np.floor(packs + _EPSILON).astype(np.int64)
            if not whole.any():  # round up the largest fractions, a few at a time
                whole[np.argsort(-packs, kind="stable")[: max(1, int(packs.sum() / 8))]] = 1
            for index in np.flatnonzero(whole):
                column = self.columns[index]
                used = np.flatnonzero(column)
                times = min(int(whole[index]), int((demand[used] // column[used]).min()))
                if times:
                    fixed.append((column, times))
                    demand -= column.astype(np.int64) * times
        assert best is not None, "the first dive is better than none"
        return self._patterns(*best)

    def _finish(self, demand: np.ndarray) -> Patterns:
        """Returns the better of two quick packings of what is left."""
        counts = np.zeros(self.lengths[-1] + 1, dtype=np.int64)
        counts[self.lengths] = demand
        packings = [best_fit_decreasing(counts, self.capacity, self.max_documents)]
        if not self.max_documents:
            packings.append(fill_up(counts, self.capacity))
        return min(packings, key=len)

    def _solve_rest(self, demand: np.ndarray) -> np.ndarray:
        """Returns the packs of each column that cover what is left, with patterns that can still be filled."""
        for _ in range(DIVE_ROUNDS):
            packs, prices = self._solve(demand)
            worth, found = self._price(prices)
            if worth <= 1 + _EPSILON or not self._add(np.minimum(found, demand).astype(np.int32)):
                return packs
        return self._solve(demand)[0]

    def _solve(self, demand: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (packs of each column, price of each length), with the columns known so far."""
        from scipy.optimize import linprog
        from scipy.sparse import csr_matrix

        wanted, usable = np.flatnonzero(demand), np.arange(len(self.columns))
        if demand is not self.demand:
            usable = np.flatnonzero((self.columns <= demand).all(axis=1))
        matrix = csr_matrix(self.columns[np.ix_(usable, wanted)].T.astype(np.float64))
        result = linprog(np.ones(len(usable)), A_ub=-matrix, b_ub=-demand[wanted].astype(np.float64), method="highs")
        assert result.status == 0, result.message
        packs, prices = np.zeros(len(self.columns)), np.zeros(len(demand))
        packs[usable] = result.x
        prices[wanted] = np.maximum(-result.ineqlin.marginals, 0)
        return packs, prices

    def _price(self, prices: np.ndarray) -> tuple[float, np.ndarray]:
        """Returns (worth of the most valuable pattern, for each length the best pattern that holds it, int32 `[D, D]`)."""
        most = self.max_documents
        if most and most * self.lengths[0] < self.capacity:
            worth, trace = few_items(self.lengths, prices, self.capacity, most - 1)
        else:
            worth, trace = any_items(self.lengths, prices, self.capacity)
        left = self.capacity - self.lengths
        columns = trace(left)
        columns[np.arange(len(columns)), np.arange(len(columns))] += 1
        return float((prices + worth[left]).max()), columns

    def _add(self, found: np.ndarray) -> int:
        """Keeps the patterns not known yet; returns how many those were."""
        unknown = {key: column for column in found if (key := column.tobytes()) not in self.known}
        self.known |= unknown.keys()
        new = list(unknown.values())
        if new:
            self.columns = np.concatenate([self.columns, new])
        return len(new)

    def _keep(self, which: np.ndarray) -> None:
        """Drops all other patterns, but not those of one document, with which any demand can be met."""
        columns = np.concatenate([np.eye(len(self.lengths), dtype=np.int32), self.columns[which]])
        self.columns, self.known = columns[:0], set()
        self._add(columns)

    def _patterns(self, fixed: list[tuple[np.ndarray, int]], rest: Patterns) -> Patterns:
        """Joins the fixed packs and those that best-fit decreasing made of the rest into one packing."""
        packs = [(dict(zip(self.lengths[used].tolist(), column[used].tolist(), strict=True)), times)
                 for column, times in fixed for used in [np.flatnonzero(column)]]  # fmt: skip
        own = patterns_of(packs, self.lengths[-1] + 1)
        used = np.zeros(self.lengths[-1] + 1, dtype=np.int64)
        for column, times in fixed:
            used[self.lengths] += column.astype(np.int64) * times
        return Patterns(
            repeats=np.concatenate([own.repeats, rest.repeats]),
            offsets=np.concatenate([own.offsets, own.offsets[-1] + rest.offsets[1:]]),
            slot_length=np.concatenate([own.slot_length, rest.slot_length]),
            slot_first=np.concatenate([own.slot_first, rest.slot_first + used[rest.slot_length]]),
            slot_stride=np.concatenate([own.slot_stride, rest.slot_stride]),
        )


# ------------------------------------------------------------------ the most valuable pattern at given prices
# Unbounded knapsacks by dynamic programming over the tokens. Both functions return (worth, trace): `worth[room]` is the
# most that items of these lengths within `room` tokens are worth, float64 `[capacity + 1]`, and `trace(rooms)` names such
# items for rooms `[m]`, int32 `[m, D]`.

Knapsack = tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]
BETTER = 1e-12  # less than this is rounding


def any_items(lengths: np.ndarray, prices: np.ndarray, capacity: int) -> Knapsack:
    """Solves the knapsack with any number of items; `lengths` ascending and positive.

    >>> worth, trace = any_items(np.array([3, 5]), np.array([0.3, 0.6]), capacity=8)
    >>> round(float(worth[8]), 6), trace(np.array([8, 6])).tolist()
    (0.9, [[1, 1], [0, 1]])
    """
    worth = np.zeros(capacity + 1)
    item = np.full(capacity + 1, -1)  # the last item put in, where it raised the worth
    fitting = np.searchsorted(lengths, np.arange(capacity + 1), side="right").tolist()
    for room in range(int(lengths[0]), capacity + 1):
        number = fitting[room]
        values = worth[room - lengths[:number]] + prices[:number]
        best = values.argmax()
        if values[best] > worth[room - 1] + BETTER:
            worth[room], item[room] = values[best], best
        else:
            worth[room] = worth[room - 1]
    needed = np.maximum.accumulate(np.where(item >= 0, np.arange(capacity + 1), -1))  # the room really used

    def trace(rooms: np.ndarray) -> np.ndarray:
        columns = np.zeros((len(rooms), len(lengths)), dtype=np.int32)
        row, room = np.arange(len(rooms)), needed[rooms]
        while len(row := row[room >= 0]):
            room = room[room >= 0]
            columns[row, item[room]] += 1
            room = needed[room - lengths[item[room]]]
        return columns

    return worth, trace


def few_items(lengths: np.ndarray, prices: np.ndarray, capacity: int, most: int) -> Knapsack:
    """Solves the knapsack with at most `most` items: one layer of the dynamic program per item."""
    worth = np.zeros(capacity + 1)
    layers = []  # the item put in last when there are 1, 2, ... items, by room; -1 for none
    for _ in range(most):
        fewer, item = worth.copy(), np.full(capacity + 1, -1)
        for index, (length, price) in enumerate(zip(lengths.tolist(), prices.tolist(), strict=True)):
            values = fewer[: capacity + 1 - length] + price
            better = np.flatnonzero(values > worth[length:] + BETTER) + length
            worth[better] = values[better - length]
            item[better] = index
        layers.append(item)

    def trace(rooms: np.ndarray) -> np.ndarray:
        columns = np.zeros((len(rooms), len(lengths)), dtype=np.int32)
        room = np.array(rooms)
        for layer in reversed(layers):
            row = np.flatnonzero(layer[room] >= 0)
            chosen = layer[room[row]]
            columns[row, chosen] += 1
            room[row] -= lengths[chosen]
        return columns

    return worth, trace


# ---------------------------------------------------------- lower bounds: no packing whatever has fewer packs


def lower_bound(counts: np.ndarray, capacity: int, max_documents: int | None = None) -> int:
    """Returns the largest of the simple bounds: total size, document limit, and Martello & Toth's L2.

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
    """Returns the bound L2 of Martello & Toth, "Lower bounds and reduction procedures for the bin packing problem" (1990).

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
