"""Lengths, the only thing a plan looks at: checked once, when they come in.

A list does, or an array, which may be memory-mapped and larger than memory:

    lengths = load_lengths("lengths.npy")     # memory-mapped: a billion lengths cost no memory
    lengths = check_lengths([12, 7, 2048])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from packtrain.errors import PlanError, shorten

LONGEST = (1 << 24) - 1  # tokens in one example; packing keeps one counter per possible length
MOST_EPOCHS = 100_000  # every one is planned
CHUNK = 1 << 22  # lengths read at once: 16 MiB of int32


def check_lengths(lengths: Sequence[int] | np.ndarray, *, where: str | None = None) -> np.ndarray:
    """Returns the lengths as a one-dimensional integer array, not copied when they are one already.

    Raises:
        PlanError: not one-dimensional, not integers (floats and NaN included), or negative; names the first
            offending example.
    """
    try:
        array = lengths if isinstance(lengths, np.ndarray) else np.asarray(lengths)
    except (ValueError, OverflowError) as error:  # ragged lists, integers beyond 64 bits
        raise PlanError("lengths must be a flat list of integers", where=where, value=lengths) from error
    if array.ndim != 1:
        raise PlanError(f"lengths must be one-dimensional, not of shape {array.shape}", where=where)
    if array.size == 0:
        return np.zeros(0, dtype=np.int64)
    if array.dtype.kind not in "iu":
        raise PlanError(
            f"lengths must be integers, not {array.dtype}",
            where=where,
            value=array[0],
            fix="count tokens, and store the counts with an integer dtype (int32, uint16)",
        )
    for start, chunk in chunks(array):
        if chunk.dtype.kind == "i" and chunk.min() < 0:
            first = int(np.flatnonzero(chunk < 0)[0])
            raise PlanError(
                "has a negative length", where=where, key=f"example {start + first}", value=int(chunk[first])
            )
        if (longest := int(chunk.max())) > LONGEST:
            first = start + int(chunk.argmax())
            raise PlanError(f"has a length above {LONGEST:,}", where=where, key=f"example {first}", value=longest)
    return array


def load_lengths(path: str | Path) -> np.ndarray:
    """Loads lengths from a `.npy` file, memory-mapped and checked. Raises PlanError for any other kind of file."""
    path = Path(path)
    fix = "write it with numpy.save('lengths.npy', lengths), where lengths is a one-dimensional integer array"
    if not path.is_file():
        raise PlanError("there is no such lengths file", where=str(path), fix=fix)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise PlanError(f"is not a .npy file of integers: {shorten(str(error))}", where=str(path), fix=fix) from error
    if not isinstance(array, np.ndarray):  # a .npz archive
        raise PlanError("is an .npz archive, not a .npy file", where=str(path), fix=fix)
    return check_lengths(array, where=str(path))


def chunks(array: np.ndarray, size: int = CHUNK) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (first index, slice) over an array that may be memory-mapped and larger than memory."""
    for start in range(0, len(array), size):
        yield start, array[start : start + size]


def histogram(lengths: np.ndarray) -> np.ndarray:
    """Counts the examples of each length: int64 `[longest + 1]`; memory O(longest), whatever the count."""
    counts = np.zeros(1, dtype=np.int64)
    for _, chunk in chunks(lengths):
        part = np.bincount(chunk)
        if len(part) > len(counts):
            counts = np.pad(counts, (0, len(part) - len(counts)))
        counts[: len(part)] += part
    return counts
