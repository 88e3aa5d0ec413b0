"""How many micro-batches a step needs: the smallest number, the same for the whole run, with which every one fits.

Every step of the run is looked at, but as rows of a matrix, a block of steps at a time: a run of a million steps is
checked in seconds. Only what is doubtful after simple bounds is packed for real.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from packtrain.packing.balance import balanced
from packtrain.packing.cost import Cost
from packtrain.packing.shuffle import shuffled
from packtrain.packing.strategies import Strategy, equal_counts, sorted_groups

BLOCK_EXAMPLES = 1 << 20  # examples looked at together


def step_blocks(
    lengths: np.ndarray, *, examples_per_step: int, seed: int, steps: int, equal_lengths: bool = False
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (first step, matrix `[steps, examples]` of lengths) over the steps of a run; an epoch's short last step comes
    as its own matrix."""
    n, size = len(lengths), examples_per_step
    per_epoch = -(-n // size)

    def matrix(ids: np.ndarray, width: int) -> np.ndarray:
        rows = lengths[ids].reshape(-1, width)
        return np.broadcast_to(rows.max(axis=1, keepdims=True), rows.shape) if equal_lengths else rows

    stride = max(1, BLOCK_EXAMPLES // size)
    for first in range(0, steps, per_epoch):
        whole = min(n // size, steps - first)
        for index in range(0, whole, stride):
            stop = min(index + stride, whole)
            ids = shuffled(n, seed=seed, epoch=first // per_epoch, start=index * size, stop=stop * size)
            yield first + index, matrix(ids, size)
        if whole < min(per_epoch, steps - first):
            ids = shuffled(n, seed=seed, epoch=first // per_epoch, start=whole * size)
            yield first + whole, matrix(ids, len(ids))


def smallest_accumulation(
    lengths: np.ndarray, strategy: Strategy, *, examples_per_step: int, seed: int, steps: int, ranks: int, capacity: int,
    width: int, cost: Cost, equal_lengths: bool = False,
) -> int:  # fmt: skip
    """Returns the micro-steps with which every micro-batch of every step holds at most `capacity` tokens.

    Args:
        width: the padded width of a micro-batch (`pad_max`), or the longest length.
        Others as in `make_plan`; no length exceeds `capacity`.
    """
    rows = capacity // width
    enough = -(-min(examples_per_step, len(lengths)) // (ranks * rows))  # fits even if all were as long as the longest
    if enough == 1 or strategy.padded_to == "max_length":
        return enough
    micro_steps, settled = 1, False
    while not settled:
        settled = True
        for _, matrix in step_blocks(
            lengths, examples_per_step=examples_per_step, seed=seed, steps=steps, equal_lengths=equal_lengths
        ):
            before = micro_steps
            while not (fit := fits(matrix, strategy, micro_steps, ranks, capacity, width, cost)).all():
                matrix = matrix[~fit]
                micro_steps += 1
            # With more, smaller chunks of the shuffle a step that fitted may not fit any more: look again.
            settled &= before == micro_steps or strategy.function in (balanced, sorted_groups)
    return micro_steps


def first_misfit(
    lengths: np.ndarray, strategy: Strategy, micro_steps: int, *, examples_per_step: int, seed: int, steps: int, ranks: int,
    capacity: int, width: int, cost: Cost, equal_lengths: bool = False,
) -> tuple[int, int] | None:  # fmt: skip
    """Returns (step, micro-steps that it needs) of the first step that doesn't fit, or None."""
    rows = capacity // width
    if -(-min(examples_per_step, len(lengths)) // (micro_steps * ranks)) <= rows:
        return None
    for first, matrix in step_blocks(
        lengths, examples_per_step=examples_per_step, seed=seed, steps=steps, equal_lengths=equal_lengths
    ):
        fit = fits(matrix, strategy, micro_steps, ranks, capacity, width, cost)
        if not fit.all():
            row = int(np.flatnonzero(~fit)[0])
            needed = micro_steps + 1
            while not fits(matrix[row : row + 1], strategy, needed, ranks, capacity, width, cost).all():
                needed += 1
            return first + row, needed
    return None


def fits(
    matrix: np.ndarray, strategy: Strategy, micro_steps: int, ranks: int, capacity: int, width: int, cost: Cost
) -> np.ndarray:
    """Returns whether each step (row of lengths) fits into `micro_steps * ranks` micro-batches: bool `[steps]`."""
    groups = micro_steps * ranks
    if groups >= matrix.shape[1]:
        return np.ones(len(matrix), dtype=bool)
    if strategy.function is equal_counts:
        sizes = np.array([len(part) for part in np.array_split(np.empty(matrix.shape[1], dtype=bool), groups)])
        starts = np.cumsum(sizes) - sizes
        if strategy.layout == "flat":
            return np.add.reduceat(matrix, starts, axis=1, dtype=np.int64).max(axis=1) <= capacity
        if strategy.padded_to == "max_length":
            return np.full(len(matrix), width * sizes.max() <= capacity)
        return (np.maximum.reduceat(matrix, starts, axis=1) * sizes.astype(np.int64)).max(axis=1) <= capacity
    if strategy.function is sorted_groups:
        return _groups_within(matrix, capacity) <= groups
    if strategy.function is balanced:
        return _packable(matrix, groups, capacity)
    return np.array([
        all(
            micro_batch_tokens(row[part], strategy, width) <= capacity
            for part in strategy.function(row, micro_steps=micro_steps, ranks=ranks, capacity=capacity, cost=cost)
        )
        for row in matrix
    ])  # fmt: skip


def micro_batch_tokens(lengths: np.ndarray, strategy: Strategy, width: int) -> int:
    """Counts the tokens that a micro-batch of these documents computes, padding included."""
    if strategy.layout == "flat":
        return int(lengths.sum(dtype=np.int64))
    return len(lengths) * (width if strategy.padded_to == "max_length" else int(lengths.max(initial=0)))


def _groups_within(matrix: np.ndarray, capacity: int) -> np.ndarray:
    """Counts the groups of neighbours in sorted order, rows x longest <= capacity, of each row: int64 `[steps]`."""
    descending = -np.sort(-matrix.astype(np.int64), axis=1)
    steps, size = descending.shape
    place, groups = np.zeros(steps, dtype=np.int64), np.zeros(steps, dtype=np.int64)
    while (unfinished := place < size).any():
        longest = descending[np.arange(steps), np.minimum(place, size - 1)]
        place += np.where(unfinished, capacity // np.maximum(longest, 1), 0)
        groups += unfinished
    return groups


def _packable(matrix: np.ndarray, groups: int, capacity: int) -> np.ndarray:
    """Returns whether best-fit decreasing packs each row into `groups` packs: bool `[steps]`."""
    totals, longest = matrix.sum(axis=1, dtype=np.int64), matrix.max(axis=1).astype(np.int64)
    # Putting each document into the emptiest pack never passes total / groups + longest * (1 - 1 / groups).
    fit = totals + longest * (groups - 1) <= capacity * groups
    doubtful = np.flatnonzero(~fit & (totals <= capacity * groups))
    chunk = max(1, BLOCK_EXAMPLES // groups)
    for start in range(0, len(doubtful), chunk):
        rows = doubtful[start : start + chunk]
        fit[rows] = _best_fit(matrix[rows], groups, capacity)
    return fit


def _best_fit(matrix: np.ndarray, groups: int, capacity: int) -> np.ndarray:
    """Runs best-fit decreasing on all rows at once, document by document; whether each row fits: bool `[steps]`."""
    descending = -np.sort(-matrix.astype(np.int64), axis=1)
    left = np.full((len(matrix), groups), capacity, dtype=np.int64)  # tokens left, [steps, groups]
    steps = np.arange(len(matrix))
    fit = np.ones(len(matrix), dtype=bool)
    for length in descending.T:  # [steps]
        room = np.where(left >= length[:, None], left, capacity + 1)
        best = room.argmin(axis=1)
        fits_somewhere = room[steps, best] <= capacity
        left[steps, best] -= np.where(fits_somewhere, length, 0)
        fit &= fits_somewhere
    return fit
