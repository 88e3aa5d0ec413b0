"""The most valuable pattern at given prices: unbounded knapsacks by dynamic programming over the tokens.

Both functions return (worth, trace): `worth[room]` is the most that items of these lengths within `room` tokens are
worth, float64 `[capacity + 1]`, and `trace(rooms)` names such items for rooms `[m]`, int32 `[m, D]`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Knapsack = tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]
BETTER = 1e-12  # less than this is rounding


def any_items(lengths: np.ndarray, prices: np.ndarray, capacity: int) -> Knapsack:
    """Any number of items; `lengths` ascending and positive.

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
    """At most `most` items: one layer of the dynamic program per item."""
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
