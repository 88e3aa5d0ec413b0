"""Packers that work on the histogram of lengths: best-fit and first-fit decreasing, and packs as full as can be.

Best fit and first fit place the longest document first. Equal documents in equal packs take equal decisions, so whole
runs are placed at once: if best fit puts a document of 300 into a pack with 1,000 tokens left, it puts the next two there
too (700 and 400 left are tighter than any other pack that fits), and then does the same to every pack with 1,000 left.
The work grows with the number of distinct lengths and the packs are those of the textbook algorithm, document by
document (tests/packing/test_packers.py compares the two).

Background: Johnson, "Near-optimal bin packing algorithms" (1973): at most 11/9 of the optimum plus one; Ding et al.,
"Fewer Truncations Improve Language Modeling" (2024) brought best-fit decreasing to training data.

Where packs hold many documents, `fill_up` reaches the lower bound that best-fit decreasing misses.
"""

from __future__ import annotations

import numpy as np

from packtrain.packing.packs import Patterns

Row = tuple[int, int, int, int, int]  # of a `_Tree`
Run = tuple[int, int, int, int]  # node, offset, packs, documents


def best_fit_decreasing(counts: np.ndarray, capacity: int, max_documents: int | None = None) -> Patterns:
    """Packs a histogram by best-fit decreasing: each document into the fullest pack that still takes it.

    Args:
        counts: int64 `[longest + 1]`, documents of each length; `longest <= capacity`.
        capacity: tokens in a pack.
        max_documents: most documents in a pack; None for no limit.
    """
    lengths = np.flatnonzero(counts)[::-1]
    limit = max_documents or int(counts.sum())
    return _patterns(*_place(lengths, counts[lengths], capacity, limit))


def _place(lengths: np.ndarray, numbers: np.ndarray, capacity: int, limit: int) -> tuple[list[Row], list[Run]]:
    """Returns the rows of a `_Tree` and the final runs."""
    tree = _Tree()
    open_runs: list[list[Run]] = [[] for _ in range(capacity + 1)]  # by tokens left
    closed: list[Run] = []  # runs at the document limit
    occupied = 0  # bit r is set when open_runs[r] is not empty
    for length, left in zip(lengths.tolist(), numbers.tolist(), strict=True):
        rank = 0
        while left:
            fitting = occupied >> length
            if not fitting:  # open as many packs as these documents need, as a fresh run with no node above it
                each = min(capacity // length, limit) if length else limit
                room, run = capacity, (-1, 0, -(-left // each), 0)
            else:
                room = length + (fitting & -fitting).bit_length() - 1
                run = open_runs[room].pop()
                if not open_runs[room]:
                    occupied ^= 1 << room
            node, offset, packs, documents = run
            each = min(room // length, limit - documents) if length else limit - documents
            full, rest = min(packs, left // each), 0
            pieces = []  # (tokens left, run) after this placement
            if full:
                child = tree.add(node, offset, length, each, rank)
                pieces.append((room - each * length, (child, 0, full, documents + each)))
                rank, left = rank + full * each, left - full * each
            if full < packs and left:  # the last few documents go into one more pack
                rest = left
                child = tree.add(node, offset + full, length, rest, rank)
                pieces.append((room - rest * length, (child, 0, 1, documents + rest)))
                left = 0
            untouched = packs - full - (1 if rest else 0)
            if untouched:
                pieces.append((room, (node, offset + full + (1 if rest else 0), untouched, documents)))
            for room, run in pieces:
                if run[3] == limit:
                    closed.append(run)
                else:
                    open_runs[room].append(run)
                    occupied |= 1 << room
    return tree.rows, closed + [run for runs in open_runs for run in runs]


def first_fit_decreasing(counts: np.ndarray, capacity: int, max_documents: int | None = None) -> Patterns:
    """Packs a histogram by first-fit decreasing: each document into the pack opened first that still takes it.

    Arguments as `best_fit_decreasing`. Runs are kept in the order in which their packs were opened.
    """
    limit = max_documents or int(counts.sum())
    tree = _Tree()
    runs = np.zeros((0, 5), dtype=np.int64)  # rows (node, offset, packs, documents, tokens left)
    finished = []
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        each_new = min(capacity // length, limit) if length else limit
        fresh = (-1, 0, -(-left // each_new), 0, capacity)  # never needed beyond what is left
        runs = np.vstack([runs, [fresh]])
        each = limit - runs[:, 3]
        if length:
            each = np.minimum(runs[:, 4] // length, each)
        taken_up_to = np.cumsum(each * runs[:, 2])
        last = int(np.searchsorted(taken_up_to, left))  # the run in which the last document lands
        touched = np.flatnonzero(each[: last + 1])
        pieces, rank, previous = [], 0, 0
        for index in touched.tolist():
            node, offset, packs, documents, room = runs[index].tolist()
            number = int(each[index])
            pieces.append(runs[previous:index])
            previous = index + 1
            full = min(packs, left // number)
            if full:
                child = tree.add(node, offset, length, number, rank)
                pieces.append([(child, 0, full, documents + number, room - number * length)])
                rank, left = rank + full * number, left - full * number
            rest = left if full < packs else 0
            if rest:
                child = tree.add(node, offset + full, length, rest, rank)
                pieces.append([(child, 0, 1, documents + rest, room - rest * length)])
                left = 0
            untouched = packs - full - (1 if rest else 0)
            if untouched and node >= 0:
                pieces.append([(node, offset + full + (1 if rest else 0), untouched, documents, room)])
        pieces.append(runs[previous:-1] if previous < len(runs) else runs[:0])
        runs = np.vstack([np.asarray(piece, dtype=np.int64).reshape(-1, 5) for piece in pieces])
        done = (runs[:, 3] == limit) | (runs[:, 4] == 0)
        if length:  # a pack with no room left can still take documents of no tokens
            done &= (runs[:, 3] == limit) | (counts[0] == 0)
        finished += runs[done, :4].tolist()
        runs = runs[~done]
    return _patterns(tree.rows, finished + runs[:, :4].tolist())


class _Tree:
    """The history of runs of packs: a node is "`number` documents of `length`, ranks from `first` on, were added to
    each pack of a run, which are packs `offset...` of the parent node's run"."""

    def __init__(self):
        self.rows: list[Row] = []

    def add(self, parent: int, offset: int, length: int, number: int, first: int) -> int:
        self.rows.append((parent, offset, length, number, first))
        return len(self.rows) - 1


def _patterns(rows, runs) -> Patterns:
    """Walks from every final run (node, offset, packs, documents) up to the root, all runs at once."""
    rows = np.array(rows, dtype=np.int64).reshape(-1, 5)
    node, offset, repeats, _ = np.array(runs, dtype=np.int64).reshape(-1, 4).T
    pattern, levels = np.arange(len(node)), []
    while len(node):
        parent, parent_offset, length, number, first = rows[node].T
        levels.append((pattern, length, number, first + offset * number))
        up = parent >= 0
        node, offset, pattern = parent[up], (offset + parent_offset)[up], pattern[up]
    columns = (
        [np.concatenate(column) for column in zip(*levels, strict=True)] if levels else [np.zeros(0, np.int64)] * 4
    )
    return Patterns.of_entries(repeats, *columns)


CANDIDATES = 512  # distinct lengths tried in a pack: half of them the longest that fit, the others spread over the rest


def fill_up(counts: np.ndarray, capacity: int) -> Patterns:
    """Packs a histogram, each pack as full as can be: the longest document left, and those that best fill the rest.

    A subset-sum heuristic (Caprara & Pferschy, "Worst-case analysis of the subset sum algorithm for bin packing", 2004;
    also known as minimum bin slack): a pack found is repeated while there are documents for it. The sums within reach are
    the bits of an integer, so that adding a document to all of them is one shift. Arguments as `best_fit_decreasing`.
    """
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
    """Returns documents by length: the first of `left` and those that fill the pack best, the longest where equal."""
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
    """Makes patterns from (documents by length, how often) pairs; documents of each length are handed out in this order."""
    taken = [0] * size
    rows = []
    for pattern, (pack, times) in enumerate(columns):
        for length, number in pack.items():
            rows.append((pattern, length, number, taken[length]))
            taken[length] += number * times
    return Patterns.of_entries([times for _, times in columns], *np.array(rows, dtype=np.int64).reshape(-1, 4).T)
