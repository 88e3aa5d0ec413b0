"""Token ids with the characters they stand for: from spans of a text to the tokens in them.

A token is in a span if any of its characters is, or any byte of one: an emoji of four tokens is in it with all four.

    text     Hi !<|end|>\\n<|user|>          span of "Hi !<|end|>"
    tokens   Hi, " !", <|end|>, \\n, <|user|>
    in it     1    1      1     0     0

Blanks that an added token swallows (`lstrip`, `rstrip`) are not its characters. Blanks that a byte-level token begins with
are: transformers' own offsets leave them out (`trim_offsets`), so the offsets come from a copy without post-processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int, float]  # first character, one behind the last, factor of the loss


class OffsetTokenizer:
    """Tokenises texts as a transformers tokenizer does without special tokens, and says where each token stands.

    Args:
        tokenizer: a fast one; see `has_offsets`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def __reduce__(self):
        return OffsetTokenizer, (self.tokenizer,)

    @cached_property
    def has_offsets(self) -> bool:
        """Whether the tokenizer is a fast one, which alone knows characters."""
        return getattr(self.tokenizer, "backend_tokenizer", None) is not None

    @cached_property
    def _backend(self) -> Tokenizer:
        from tokenizers import Tokenizer

        backend = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        backend.post_processor = None
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = self.tokenizer.backend_tokenizer.encode_special_tokens
        return backend

    @cached_property
    def _swallows_blanks(self) -> np.ndarray:
        """int64, ids of the added tokens that swallow blanks next to them."""
        added = self._backend.get_added_tokens_decoder()
        return np.array([i for i, token in added.items() if token.lstrip or token.rstrip], dtype=np.int64)

    def __call__(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns ids int64 `[L]` and offsets int64 `[L, 2]` (first character, one behind the last) of each text."""
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        found = []
        for text, encoding in zip(texts, encodings, strict=True):
            ids = np.array(encoding.ids, dtype=np.int64)
            offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
            for token in np.flatnonzero(np.isin(ids, self._swallows_blanks)):
                start, end = offsets[token].tolist()
                own = text[start:end].strip() or text[start:end]  # an added token may be of blanks
                start = text.index(own, start)
                offsets[token] = start, start + len(own)
            found.append((ids, offsets))
        return found


def factors_of(offsets: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """Returns the factor of every token, 0 outside the spans: float64 `[L]`.

    Args:
        offsets: int64 `[L, 2]`, ascending.
        spans: ascending, disjoint. A token in two of them has the higher factor.
    """
    factors = np.zeros(len(offsets))
    for start, end, factor in spans:
        if start < end:
            first = np.searchsorted(offsets[:, 1], start, side="right")
            last = np.searchsorted(offsets[:, 0], end, side="left")
            inside = factors[first:last]
            np.maximum(inside, factor * (offsets[first:last, 0] < offsets[first:last, 1]), out=inside)
    return factors


def intersect(spans: Sequence[Span], others: Sequence[Span]) -> list[Span]:
    """Returns the characters that are in both, with the product of their factors."""
    both = [
        (max(a, c), min(b, d), factor * other)
        for a, b, factor in spans
        for c, d, other in others
        if max(a, c) < min(b, d)
    ]
    return sorted(both)


def outside(spans: Sequence[Span], length: int) -> list[Span]:
    """Returns the characters of a text of that length that are in none of the spans, with factor 1."""
    bounds = [0, *(bound for start, end, _ in sorted(spans) for bound in (start, end)), length]
    return [(a, b, 1.0) for a, b in zip(bounds[::2], bounds[1::2], strict=True) if a < b]
