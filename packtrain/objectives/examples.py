"""Examples as an objective lays them out: other tokens or labels than `packtrain.data` gives, for the same rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from packtrain.data.examples import Examples
from packtrain.data.report import DataReport
from packtrain.data.sources import Rows
from packtrain.errors import DataError

_AT_ONCE = 10_000  # rows that are read at once


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


def read_column(examples: Examples, column: str) -> Iterator[tuple[Callable[[], str], Any]]:
    """Yields what stands in a column of the source row of every example, and a function that names the row.

    Raises:
        DataError: the rows have no such column, which `objective.label_column` names.
    """
    source = examples.source
    if source is None or column not in source.columns:
        known = "" if source is None else f"the columns are {', '.join(source.columns)}"
        raise DataError(f"the rows have no column '{column}'", key="objective.label_column", value=column, fix=known)
    rows = examples.rows
    assert (np.diff(rows) >= 0).all(), "examples come in the order of their rows"
    for start in range(0, len(source), _AT_ONCE):
        wanted = rows[(rows >= start) & (rows < start + _AT_ONCE)]
        block: list[Any] = source.read(start, start + _AT_ONCE) if len(wanted) else []
        for row in wanted.tolist():
            yield partial(source.where, row), block[row - start].get(column)


def notes_without(notes: Sequence[str], column: str) -> Iterator[str]:
    """Yields the notes of a report without a column among those that are not used: the objective does use it.

    >>> [*notes_without(["columns not used: id, label", "columns not used: label"], "label")]
    ['columns not used: id']
    """
    for note in notes:
        before, said, names = note.partition("columns not used: ")
        others = [name for name in names.split(", ") if name != column]
        if not said:
            yield note
        elif others:
            yield before + said + ", ".join(others)
