"""A seeded shuffle that is computed, never stored: a keyed bijection on [0, n).

Why: a plan must answer "which examples does step 1,234,567 see?" on any rank without holding a permutation of a billion
ids. So the shuffle is a small hash that happens to be invertible, on the next power of two: rounds of adding a key,
multiplying by an odd key and xoring the high half onto the low one (as in Kensler, "Correlated Multi-Jittered
Sampling", Pixar 2013). The few results at or above n are sent through again until they fall below it ("cycle walking",
Black & Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002), which keeps it a bijection.

Only integer arithmetic modulo 2^64 is used: the result is the same on every platform and in every version of numpy, and
no random state exists anywhere.

    >>> sorted(shuffled(5, seed=0).tolist())
    [0, 1, 2, 3, 4]
"""

from __future__ import annotations

import numpy as np

ROUNDS = 8  # four leave patterns in small domains; tests/packing/test_shuffle.py measures
BLOCK = 1 << 15  # indices worked on at once, so that the temporaries stay in the cache
LARGEST = 1 << 53  # domain up to which the bit length of a size is exact in float64

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, the increment of SplitMix64
_32 = np.uint64(32)


def mix64(value: int) -> int:
    """Applies SplitMix64's output function (Steele, Lea & Flood 2014), a bijection on 64-bit integers."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def derive_key(*parts: int) -> int:
    """Makes one 64-bit key from any integers (seed, epoch, purpose, ...), order-sensitive."""
    key = len(parts)
    for part in parts:
        key = mix64(key ^ mix64(part & _MASK))
    return key


def round_keys(key: int) -> np.ndarray:
    """Returns what each round adds, and by what odd number it multiplies: uint64 `[ROUNDS, 2]`."""
    return np.array([(derive_key(key, 2 * i), derive_key(key, 2 * i + 1) | 1) for i in range(ROUNDS)], dtype=np.uint64)


def permute(index: np.ndarray, size: int | np.ndarray, key: int, stream: np.ndarray | None = None) -> np.ndarray:
    """Sends each index through the bijection on `[0, size)` that `key` chooses.

    Args:
        index: integers `[m]`, each in `[0, size)`.
        size: the domain, at most 2^53; or one domain per index, `[m]`.
        key: any 64-bit integer, see `derive_key`.
        stream: integers `[m]` below 2^32; every stream has its own bijection (used to shuffle the examples of
            each length apart).

    Returns:
        int64 `[m]`, each in `[0, size)`.
    """
    index, sizes = np.asarray(index), np.asarray(size)
    # Only the low bits of a sum or product reach the low bits of the result: where the domain fits 32 bits, 32-bit
    # arithmetic gives the same answer, faster.
    word = np.uint32 if np.max(size, initial=0) <= 1 << 32 else np.uint64
    keys = round_keys(key).astype(word)
    result = np.empty(index.shape, dtype=np.int64)
    for start in range(0, len(index), BLOCK):
        block = slice(start, start + BLOCK)
        last = (sizes if sizes.ndim == 0 else sizes[block]) - 1
        tweak = None if stream is None else (stream[block].astype(np.uint64) * np.uint64(_GOLDEN) >> _32).astype(word)
        result[block] = _permute_block(index[block].astype(word), last, keys, tweak)
    return result


def shuffled(
    n: int, *, seed: int, epoch: int = 0, purpose: int = 0, start: int = 0, stop: int | None = None
) -> np.ndarray:
    """Returns positions `start..stop` of the seeded shuffle of `range(n)`: int64 `[stop - start]`.

    `purpose` tells apart the shuffles that one epoch needs (examples, packs).
    """
    stop = n if stop is None else min(stop, n)
    return permute(np.arange(start, max(stop, start)), n, derive_key(seed, epoch, purpose))


def _permute_block(value: np.ndarray, last: np.ndarray, keys: np.ndarray, tweak: np.ndarray | None) -> np.ndarray:
    bits = np.maximum(np.frexp(last.astype(np.float64))[1], 1)  # last < 2^bits
    mask, half, last = (
        (part).astype(value.dtype) for part in ((1 << bits.astype(np.int64)) - 1, (bits + 1) // 2, last)
    )
    _rounds(value, mask, half, keys, tweak)
    outside = np.flatnonzero(value > last)
    while outside.size:
        again = value[outside]
        _rounds(again, *(part if np.ndim(part) == 0 else part[outside] for part in (mask, half)), keys,
                None if tweak is None else tweak[outside])  # fmt: skip
        value[outside] = again
        outside = outside[again > (last if last.ndim == 0 else last[outside])]
    return value


def _rounds(value: np.ndarray, mask: np.ndarray, half: np.ndarray, keys: np.ndarray, tweak: np.ndarray | None) -> None:
    """Passes values once through the bijection on `[0, mask]`, in place."""
    for number, (added, multiplier) in enumerate(keys):
        if tweak is not None:
            value ^= tweak >> (3 * number)  # another window of its bits each round; those above the mask fall away
        value += added
        value *= multiplier
        value &= mask
        value ^= value >> half
