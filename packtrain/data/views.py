"""Views: examples as block diffusion lays them out, three copies of each, filled to whole blocks.

    example     q a b                        3 tokens
    document    q a b F  q a b F  q a b F    12 tokens in blocks of 2: view 1, view 2, clean; F fills

The copies are equal here; noise is drawn where batches are made (`packtrain.objectives.block_diffusion`). They belong
to the data room because a plan must count them: a micro-batch of `max_tokens` holds what is computed, not what was
read.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from packtrain.data.examples import Examples
from packtrain.data.formats import IGNORED
from packtrain.data.report import DataReport

COPIES = 3  # view 1, view 2, clean


class ViewedExamples:
    """Examples with the lengths of their three copies.

    Args:
        examples: prompt and answer of each.
        fill_token_id: what fills the last block; the mask.
        block_size: D.

    Attributes:
        lengths: int64 `[n]`, tokens of the three copies: what a plan needs.
        supervised: int `[n]`, supervised tokens of the example; each is masked in one of the views.
    """

    def __init__(self, examples: Examples, fill_token_id: int, *, block_size: int):
        self.examples, self.fill_token_id, self.block_size = examples, fill_token_id, block_size
        self.lengths = occupied(np.asarray(examples.lengths, dtype=np.int64), block_size)
        self.supervised = examples.supervised
        self.fingerprint = f"{examples.fingerprint} views of {block_size}"

    @property
    def rows(self) -> np.ndarray:
        """int64 `[n]`, the source row of each example."""
        return self.examples.rows

    @property
    def report(self) -> DataReport:
        """The examples' own report, and what their views are."""
        old, tokens = self.examples.report, int(self.lengths.sum())
        what = f"views: {COPIES} copies of every example, filled to blocks of {self.block_size}"
        note = f"{what}: {old.tokens:,} tokens are laid out as {tokens:,}"
        return replace(old, notes=(*old.notes, note))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, example_id: int) -> dict[str, np.ndarray]:
        """`{"input_ids": int64 [L], "labels": int64 [L]}`."""
        if not 0 <= example_id < len(self):
            raise IndexError(example_id)
        input_ids, labels = self.gather([example_id])
        return {"input_ids": input_ids, "labels": labels}

    def gather(
        self, example_ids: np.ndarray, starts: np.ndarray | None = None, stops: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Documents end to end, as `Examples.gather`; `starts` and `stops` can only be those of whole documents."""
        ids = np.asarray(example_ids, dtype=np.int64)
        whole = (starts is None or not np.any(starts)) and (stops is None or np.array_equal(stops, self.lengths[ids]))
        assert whole, "views can't be cut"
        input_ids, labels = self.examples.gather(ids)
        lengths = np.asarray(self.examples.lengths[ids], dtype=np.int64)
        return lay_out_copies(input_ids, lengths, self.block_size, self.fill_token_id), lay_out_copies(
            labels, lengths, self.block_size, IGNORED
        )


def occupied(lengths: np.ndarray, block_size: int) -> np.ndarray:
    """Tokens that the three copies of examples of these lengths take, int64 `[n]`."""
    return COPIES * -(-lengths // block_size) * block_size


def lay_out_copies(values: np.ndarray, lengths: np.ndarray, block_size: int, fill: int) -> np.ndarray:
    """Documents end to end, `[T]`, each filled with `fill` to whole blocks and repeated three times.

    >>> lay_out_copies(np.array([7, 8, 9, 5]), np.array([3, 1]), 2, 0)
    array([7, 8, 9, 0, 7, 8, 9, 0, 7, 8, 9, 0, 5, 0, 5, 0, 5, 0])
    """
    copies = []
    for document in np.split(values, np.cumsum(lengths)[:-1]):
        copies += [np.pad(document, (0, -len(document) % block_size), constant_values=fill)] * COPIES
    return np.concatenate(copies)
