"""The loop of best-fit decreasing on a histogram, compiled with numba (`pip install packtrain[fast]`).

The same placements in the same order as the plain loop in `histogram.py`, which says when this module is imported: loading
numba takes half a second, once in a process. The machine code is kept beside this file, or in the user's cache folder.
"""

from __future__ import annotations

import numba
import numpy as np


def place(lengths: np.ndarray, numbers: np.ndarray, capacity: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit decreasing: int64 lengths `[D]`, descending, and how many documents have each.

    Returns:
        int64 nodes `[N, 5]` and final runs `[M, 4]`, those of `histogram._place`.
    """
    return _place(lengths, numbers, capacity, limit)


@numba.njit(cache=True)
def _place(lengths, numbers, capacity, limit):
    nodes, used = np.empty((4 * len(lengths) + 16, 5), dtype=np.int64), 0
    runs, made = np.empty((4 * len(lengths) + 16, 5), dtype=np.int64), 0  # the last column: the run below in its stack
    closed = (
        capacity + 1
    )  # runs at the document limit have a stack of their own, after one for each number of tokens left
    top = np.full(capacity + 2, -1, dtype=np.int64)
    occupied = np.zeros((capacity >> 6) + 1, dtype=np.uint64)  # bit r is set when stack r is not empty
    for index in range(len(lengths)):
        length, left, rank = lengths[index], numbers[index], 0
        while left:
            if used + 2 > len(nodes):
                nodes = np.concatenate((nodes, np.empty_like(nodes)))
            if made + 3 > len(runs):
                runs = np.concatenate((runs, np.empty_like(runs)))
            room = _first_set(occupied, length)
            if room < 0:  # open as many packs as these documents need
                each = min(capacity // length, limit) if length else limit
                room, node, offset, packs, documents = capacity, -1, 0, -(-left // each), 0
            else:
                run = top[room]
                node, offset, packs, documents, top[room] = runs[run]
                if top[room] < 0:
                    occupied[room >> 6] ^= np.uint64(1) << np.uint64(room & 63)
            each = min(room // length, limit - documents) if length else limit - documents
            done = min(packs, left // each)
            rest = left - done * each if done < packs else 0  # the last few documents go into one more pack
            for first, size, added in ((0, done, each), (done, min(rest, 1), rest)):
                if size:
                    nodes[used] = node, offset + first, length, added, rank
                    stack = closed if documents + added == limit else room - added * length
                    made = _push(runs, made, top, occupied, stack, used, 0, size, documents + added)
                    used, rank, left = used + 1, rank + size * added, left - size * added
            done += min(rest, 1)
            if done < packs:
                made = _push(runs, made, top, occupied, room, node, offset + done, packs - done, documents)
    return nodes[:used], _final(runs, made, top)


@numba.njit(cache=True)
def _first_set(bits, start):
    """The first set bit at or after `start`, or -1."""
    word = start >> 6
    if word >= len(bits):
        return -1
    value = bits[word] >> np.uint64(start & 63) << np.uint64(start & 63)
    while not value:
        word += 1
        if word == len(bits):
            return -1
        value = bits[word]
    return (word << 6) + _trailing_zeros(value)


@numba.njit(cache=True)
def _trailing_zeros(value):
    zeros = 0
    for step in (32, 16, 8, 4, 2, 1):
        low = value & ((np.uint64(1) << np.uint64(step)) - np.uint64(1))
        if not low:
            value >>= np.uint64(step)
            zeros += step
    return zeros


@numba.njit(cache=True)
def _push(runs, made, top, occupied, stack, node, offset, packs, documents):
    """Write run number `made` and put it on a stack; returns the number of the next one."""
    runs[made] = node, offset, packs, documents, top[stack]
    top[stack] = made
    if stack < len(top) - 1:
        occupied[stack >> 6] |= np.uint64(1) << np.uint64(stack & 63)
    return made + 1


@numba.njit(cache=True)
def _final(runs, made, top):
    """The runs still on a stack: the closed ones first, then by tokens left; within a stack the oldest first."""
    order, number = np.empty(made, dtype=np.int64), 0
    for stack in range(-1, len(top) - 1):
        first, run = number, top[stack]
        while run >= 0:
            order[number] = run
            number, run = number + 1, runs[run, 4]
        order[first:number] = order[first:number][::-1].copy()
    return runs[order[:number], :4]
