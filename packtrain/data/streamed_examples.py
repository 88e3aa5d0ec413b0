"""Streamed rows as the examples of a run: those of the blocks that are held, by their numbers from its beginning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np

from packtrain.data.blocks import Blocks
from packtrain.data.examples import Examples
from packtrain.data.report import DataReport
from packtrain.data.store import hash_of, tokenizer_fingerprint


class StreamedExamples:
    """Streamed rows as examples, numbered from the beginning of the run (see `AnyExamples`); those of held blocks alone.

    Attributes:
        blocks: where they are read.
        longest: most tokens that an example can have.
        fingerprint: of the first block and the tokenizer.
    """

    def __init__(self, blocks: Blocks, longest: int):
        self.blocks, self.longest = blocks, longest
        self.fingerprint = hash_of(blocks.first().examples.fingerprint, tokenizer_fingerprint(blocks.tokenizer))

    @property
    def report(self) -> DataReport:
        """The report of the rows read so far."""
        return self.blocks.report()

    @property
    def lengths(self) -> np.ndarray:
        """int32 `[n]`, tokens of each example of the first block."""
        return self.blocks.first().examples.lengths

    def lengths_in(self, layout: str) -> np.ndarray:
        return self.lengths

    @property
    def supervised(self) -> np.ndarray:
        """Supervised tokens, to be asked for by the numbers of examples."""
        return cast(np.ndarray, _ByNumber(self.blocks, lambda block: block.examples.supervised))

    @property
    def rows(self) -> np.ndarray:
        """The source rows, to be asked for by the numbers of examples."""
        return cast(np.ndarray, _ByNumber(self.blocks, lambda block: block.examples.rows + block.start.row))

    @property
    def source(self) -> None:
        """None: nobody keeps the rows."""
        return None

    @property
    def has_factors(self) -> bool:
        """Whether a row of the first block gives a token a factor of the loss other than 1."""
        return self.blocks.first().examples.has_factors

    def __len__(self) -> int:
        """Counts the examples read so far, of the first epoch."""
        return self.blocks.tally().examples

    def __getitem__(self, example_id: int) -> dict[str, np.ndarray]:
        input_ids, labels = self.gather([example_id])
        return {"input_ids": input_ids, "labels": labels}

    def gather(
        self, example_ids: Sequence[int] | np.ndarray, starts: np.ndarray | None = None, stops: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns documents end to end, as `Examples.gather`."""
        examples, ids = self._found(example_ids)
        return examples.gather(ids, starts, stops)

    def factors(
        self, example_ids: Sequence[int] | np.ndarray, starts: np.ndarray | None = None, stops: np.ndarray | None = None
    ) -> np.ndarray | None:
        """Returns the factors of the loss, as `Examples.factors`."""
        examples, ids = self._found(example_ids)
        return examples.factors(ids, starts, stops)

    def extras(self, example_ids: np.ndarray) -> Mapping[str, Any]:
        return {}

    def _found(self, example_ids: Sequence[int] | np.ndarray) -> tuple[Examples, np.ndarray]:
        ids = np.asarray(example_ids, dtype=np.int64)
        block = self.blocks.of_examples(ids)
        return block.examples, ids - block.start.example


class _ByNumber:
    """A column of streamed examples that is looked up in the block that holds them."""

    def __init__(self, blocks: Blocks, column: Any):
        self._blocks, self._column = blocks, column

    def __getitem__(self, ids: Any) -> Any:
        block = self._blocks.of_examples(np.asarray(ids))
        return self._column(block)[np.asarray(ids) - block.start.example]

    def __iter__(self) -> Iterator[Any]:
        raise TypeError("streamed examples are looked up by their numbers")
