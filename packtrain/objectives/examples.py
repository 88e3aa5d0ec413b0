"""Examples as an objective lays them out: other tokens or labels than `packtrain.data` gives, for the same rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from packtrain.data.examples import Examples
from packtrain.data.report import DataReport
from packtrain.data.sources import Rows


class DerivedExamples(ABC):
    """The interface of examples to a plan and a collator; a subclass says its lengths and how to gather documents.

    Attributes:
        examples: as `packtrain.data` gives them.
        lengths: int64 `[n]`, tokens of each document: what a plan needs.
        supervised: int `[n]`, supervised tokens of each.
        fingerprint: of the examples and of what was made of them.
    """

    examples: Examples
    lengths: np.ndarray
    supervised: np.ndarray
    fingerprint: str

    @property
    def rows(self) -> np.ndarray:
        """int64 `[n]`, the source row of each example."""
        return self.examples.rows

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return int(self.lengths.max())

    @property
    def source(self) -> Rows | None:
        """The rows behind `rows`, where they are at hand."""
        return self.examples.source

    @property
    @abstractmethod
    def report(self) -> DataReport:
        """The examples' own report, and what was made of them."""

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, example_id: int) -> dict[str, np.ndarray]:
        """Returns `{"input_ids": int64 [L], "labels": int64 [L]}`."""
        if not 0 <= example_id < len(self):
            raise IndexError(example_id)
        input_ids, labels = self.gather([example_id])
        return {"input_ids": input_ids, "labels": labels}

    @abstractmethod
    def gather(
        self, example_ids: Sequence[int] | np.ndarray, starts: np.ndarray | None = None, stops: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns documents end to end, as `Examples.gather`."""

    def factors(
        self, example_ids: Sequence[int] | np.ndarray, starts: np.ndarray | None = None, stops: np.ndarray | None = None
    ) -> None:
        """Returns None: every factor is 1, as `load_task` sees to."""
        return None

    def extras(self, example_ids: np.ndarray) -> Mapping[str, Any]:
        """Returns further entries of the batch of some examples, for what their objective knows of each."""
        return {}

    def lengths_in(self, layout: str) -> np.ndarray:
        """Returns what a plan in that layout counts as the tokens of each document, int64 `[n]`."""
        return self.lengths
