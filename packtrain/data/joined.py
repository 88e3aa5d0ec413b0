"""The documents of several sources as one: numbered one after another, each read where it lies.

    source a   documents 0 1 2        joined   0 1 2 3 4
    source b   documents 0 1                   a a a b b

Sources may store their labels in different ways, so their tables are not put together; what is read is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from packtrain.data.store import hash_of
from packtrain.data.tokens import AnyTokens, Documents


class JoinedTokens:
    """Tokens of several sources, with the methods of `Tokens` that examples need.

    Args:
        parts: of each source.
        bounds: int64 `[parts + 1]`, the first document of each, and the end.
    """

    def __init__(self, parts: Sequence[AnyTokens], bounds: np.ndarray):
        self._parts, self._bounds = parts, bounds

    @property
    def blanks(self) -> np.ndarray:
        """int32 `[documents]`, as `Tokens.blanks`; 0 where a source doesn't know them."""
        sizes = np.diff(self._bounds).tolist()
        known = [(part.blanks, size) for part, size in zip(self._parts, sizes, strict=True)]
        return np.concatenate([np.zeros(size, np.int32) if blanks is None else blanks for blanks, size in known])

    def gather(self, documents: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (input_ids, labels) of the pieces, end to end in the order asked for, int64 `[T]` each."""
        source = np.searchsorted(self._bounds, documents, side="right") - 1  # [pieces]
        of_token = np.repeat(source, stops - starts)  # [T]
        input_ids, labels = np.empty(len(of_token), np.int64), np.empty(len(of_token), np.int64)
        for number in np.unique(source).tolist():
            mine = source == number
            local = documents[mine] - self._bounds[number]
            place = of_token == number
            input_ids[place], labels[place] = self._parts[number].gather(local, starts[mine], stops[mine])
        return input_ids, labels

    def count_supervised(self, documents: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """Counts the supervised tokens of each piece, int32 `[pieces]`."""
        source = np.searchsorted(self._bounds, documents, side="right") - 1  # [pieces]
        counts = np.empty(len(documents), np.int32)
        for number in np.unique(source).tolist():
            mine, local = source == number, documents - self._bounds[number]
            counts[mine] = self._parts[number].count_supervised(local[mine], starts[mine], stops[mine])
        return counts

    @property
    def has_factors(self) -> bool:
        """Whether a token has a factor of the loss other than 1."""
        return any(part.has_factors for part in self._parts)

    def factors(self, documents: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """Returns the factors of the loss of the pieces' tokens, end to end: float32 `[T]`."""
        source = np.searchsorted(self._bounds, documents, side="right") - 1  # [pieces]
        of_token = np.repeat(source, stops - starts)  # [T]
        factors = np.ones(len(of_token), np.float32)
        for number in np.unique(source).tolist():
            mine = source == number
            own = self._parts[number].factors(documents[mine] - self._bounds[number], starts[mine], stops[mine])
            if own is not None:
                factors[of_token == number] = own
        return factors


def join_documents(parts: Sequence[Documents]) -> Documents:
    """Numbers the documents of several sources one after another. A pickle holds paths where theirs does."""
    bounds = np.cumsum([0, *(len(part.lengths) for part in parts)])
    return Documents(
        fingerprint=hash_of([part.fingerprint for part in parts]),
        format=", ".join(dict.fromkeys(part.format for part in parts)),
        tokens=JoinedTokens([part.tokens for part in parts], bounds),
        lengths=np.concatenate([part.lengths for part in parts]),
        supervised=np.concatenate([part.supervised for part in parts]),
        contents=hash_of([part.contents for part in parts]),
        prompts=[*dict.fromkeys(kind for part in parts for kind in part.prompts)],
        reopen=partial(join_documents, list(parts)),
        parts=tuple(parts),
    )
