"""How many micro-batches a step needs: the smallest number, the same for the whole run, with which every one fits.

Every step of the run is looked at, but as rows of a matrix, a block of steps at a time: a run of a million steps is
checked in seconds. Only what is doubtful after simple bounds is packed for real.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from packtrain.packing.balance import balanced
from packtrain.packing.phases import Phase
from packtrain.packing.scopes import StepScope
from packtrain.packing.strategies import Strategy, equal_counts, sorted_groups

BLOCK_EXAMPLES = 1 << 20  # examples looked at together


def step_blocks(scope: StepScope, steps: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (first step, matrix `[steps, examples]` of lengths) over the steps of a run; a phase's short last step comes
    as its own matrix."""

    def matrix(start: int, stop: int, width: int) -> np.ndarray:
        rows = scope.lengths[scope.ids(epoch, start, stop)].reshape(-1, width)
        return np.broadcast_to(rows.max(axis=1, keepdims=True), rows.shape) if scope.equal_lengths else rows

    first = epoch = 0
    while first < steps:
        begin = 0
        for phase in scope.phases_of(epoch):
            size, end = phase.per_step, begin + phase.examples
            whole = max(0, min(phase.examples // size, steps - first))
            stride = max(1, BLOCK_EXAMPLES // size)
            for index in range(0, whole, stride):
                stop = min(index + stride, whole)
                yield first + index, matrix(begin + index * size, begin + stop * size, size)
            if whole < min(phase.updates, steps - first):
                start = begin + whole * size
                yield first + whole, matrix(start, end, end - start)
            first, begin = first + phase.updates, end
        epoch += 1


def always_enough(scope: StepScope, steps: int, ranks: int) -> int:
    """Returns the micro-steps that would do even if every example were as long as the longest of its phase."""
    phases = [*scope.phases_of(0), *(scope.phases_of(1) if steps > scope.steps_in_epoch(0) else ())]

    def micro_steps(phase: Phase) -> int:
        bounded = phase.longest is not None and scope.strategy.padded_to != "max_length"
        width = min(phase.longest, scope.width) if bounded else scope.width
        return -(-min(phase.per_step, phase.examples) // (ranks * (scope.max_tokens // width)))

    return max(map(micro_steps, phases))


def smallest_accumulation(scope: StepScope, *, steps: int, ranks: int) -> int:
    """Returns the micro-steps with which every micro-batch of every step holds at most `scope.max_tokens` tokens; no length
    exceeds them."""
    enough = always_enough(scope, steps, ranks)
    if enough == 1 or scope.strategy.padded_to == "max_length":
        return enough
    micro_steps, settled = 1, False
    while not settled:
        settled = True
        for _, matrix in step_blocks(scope, steps):
            before = micro_steps
            while not (fit := fits(scope, matrix, micro_steps, ranks)).all():
                matrix = matrix[~fit]
                micro_steps += 1
            # With more, smaller chunks of the shuffle a step that fitted may not fit any more: look again.
            settled &= before == micro_steps or scope.strategy.function in (balanced, sorted_groups)
    return micro_steps


def first_misfit(scope: StepScope, micro_steps: int, *, steps: int, ranks: int) -> tuple[int, int] | None:
    """Returns (step, micro-steps that it needs) of the first step that doesn't fit, or None."""
    if always_enough(scope, steps, ranks) <= micro_steps:
        return None
    for first, matrix in step_blocks(scope, steps):
        fit = fits(scope, matrix, micro_steps, ranks)
        if not fit.all():
            row = int(np.flatnonzero(~fit)[0])
            needed = micro_steps + 1
            while not fits(scope, matrix[row : row + 1], needed, ranks).all():
                needed += 1
            return first + row, needed
    return None


def fits(scope: StepScope, matrix: np.ndarray, micro_steps: int, ranks: int) -> np.ndarray:
    """Returns whether each step (row of lengths) fits into `micro_steps * ranks` micro-batches: bool `[steps]`."""
    strategy, capacity, width, groups = scope.strategy, scope.max_tokens, scope.width, micro_steps * ranks
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
            for part in strategy.function(row, micro_steps=micro_steps, ranks=ranks, capacity=capacity, cost=scope.cost)
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
