"""Several answers: examples of as many documents that are planned, balanced, weighted and resumed as one.

    row         {"prompt": "2+2?", "completions": ["4", "four", "It is 4."]}
    example     [2+2? 4 </s>] [2+2? four </s>] [2+2? It is 4. </s>]      documents, of which the answers are supervised

    flat        2+2? 4 </s> 2+2? four </s> ...                  documents end to end
    padded      a row for each, as wide as the longest document of the micro-batch
    shared      2+2? 4 </s> four </s> It is 4. </s> ...         the prompt once; see `modeling.attention.prefixes`

A document may go on where the one before it does, as the turns of a conversation do. So what it shares is counted in tokens:
those that both begin with, as far as its prompt goes.

    example     [2+2? 4 </s>] [2+2? 4 </s> sure? yes </s>]
    shared      2+2? 4 </s> sure? yes </s>

What a plan counts as the tokens of an example is what its documents take in the layout: all of them in a flat row, the
longest one as often as there are documents in padded rows, what is shared once where it is laid out once.

Batches have the keys of `packtrain.packing.collator`, with an entry of `example_ids` for every document, and `predictors`
int64 `[N]`, the flat position whose logits predict each supervised token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, Literal

import numpy as np
import torch

from packtrain.data.examples import Examples
from packtrain.data.formats import IGNORED
from packtrain.data.report import DataReport
from packtrain.modeling.attention.prefixes import KEY as SHARED
from packtrain.modeling.attention.prefixes import SharedPrefixes
from packtrain.objectives.examples import DerivedExamples
from packtrain.packing.collator import Batch, PackCollator
from packtrain.packing.packs import offsets_of

_AT_ONCE = 4096  # examples whose masks are read at once


class GroupExamples(DerivedExamples):
    """Answers with their prompts as a plan and a collator see them.

    Args:
        examples: documents end to end, each a prompt and a supervised answer.
        layout: "flat" or "padded".
        shared: what a document shares with the one before it is laid out once.

    Attributes:
        sizes: int64 `[n]`, documents of each example.
        documents: int64 `[D]`, tokens of every document, D of all examples.
        answers: int64 `[D]`, tokens of its answer.
        prefixes: int64 `[D]`, tokens of its prompt that the document before it begins with; 0 for an example's first.
    """

    def __init__(self, examples: Examples, *, layout: Literal["flat", "padded"] = "flat", shared: bool = False):
        self.examples, self.layout, self.shared = examples, layout, shared
        self.supervised = examples.supervised
        self.sizes, self.documents, self.answers, self.prefixes = _measure(examples)
        self.lengths = self.lengths_in(layout)
        self.fingerprint = f"{examples.fingerprint} groups"

    def lengths_in(self, layout: str) -> np.ndarray:
        """Returns the tokens that each example takes in a layout, int64 `[n]`."""
        firsts = np.cumsum(self.sizes) - self.sizes
        if layout == "padded":
            return self.sizes * np.maximum.reduceat(self.documents, firsts)
        return np.add.reduceat(self.documents - self.prefixes if self.shared else self.documents, firsts)

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return int(self.documents.max())

    @property
    def report(self) -> DataReport:
        """The examples' own report, and what the prompts are of them."""
        tokens, answers, shared = (int(each.sum()) for each in (self.documents, self.answers, self.prefixes))
        note = f"{self._counted()}; the prompts are {1 - answers / tokens:.1%} of their tokens"
        if self.shared:
            note += f", and what they share is laid out once: {tokens:,} tokens become {tokens - shared:,}"
        if self.layout == "padded":
            note += "; a plan counts rows as wide as the longest one of an example"
        return replace(self.examples.report, notes=(*self.examples.report.notes, note))

    def _counted(self) -> str:
        few, many = int(self.sizes.min()), int(self.sizes.max())
        each = f"{few}" if few == many else f"{few} to {many}"
        return f"answers: {len(self.answers):,} in {len(self):,} examples, {each} in each"

    def gather(
        self, example_ids: Sequence[int] | np.ndarray, starts: np.ndarray | None = None, stops: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the documents end to end, as `Examples.gather`, all with their prompt; always whole ones."""
        return self.examples.gather(example_ids)


def _measure(examples: Examples) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns `sizes`, `documents`, `answers` and `prefixes` of `GroupExamples`."""
    parts = []
    for start in range(0, len(examples), _AT_ONCE):
        example_ids = np.arange(start, min(start + _AT_ONCE, len(examples)))
        ids, labels = examples.gather(example_ids)
        lengths, answers = documents_of(labels)
        sizes = documents_in(answers, examples.supervised[example_ids])
        parts.append((sizes, lengths, answers, shared_with_previous(ids, lengths, answers, sizes)))
    sizes, lengths, answers, prefixes = (np.concatenate(part).astype(np.int64) for part in zip(*parts, strict=True))
    return sizes, lengths, answers, prefixes


def documents_in(answers: np.ndarray, supervised: np.ndarray) -> np.ndarray:
    """Counts the documents of examples by their supervised tokens, int64 `[n]`.

    Args:
        answers: int64 `[S]`, supervised tokens of every document.
        supervised: int64 `[n]`, those of every example.

    >>> documents_in(np.array([3, 1, 4, 2]), np.array([4, 6]))
    array([2, 2])
    """
    last = np.searchsorted(np.cumsum(answers), np.cumsum(supervised, dtype=np.int64))  # document of each example
    assert last[-1] == len(answers) - 1, "an example has whole documents, each with a prompt and a supervised answer"
    return np.diff(last, prepend=-1)


def documents_of(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens of documents whose supervised ones are their last, and of these answers, both int64 `[S]`.

    >>> documents_of(np.array([-100, 5, 6, -100, -100, 7]))
    (array([3, 3]), array([2, 1]))
    """
    supervised = labels != IGNORED
    ends = np.flatnonzero(supervised & ~np.append(supervised[1:], False)) + 1
    return np.diff(ends, prepend=0), np.diff(np.cumsum(supervised)[ends - 1], prepend=0)


def shared_with_previous(ids: np.ndarray, lengths: np.ndarray, answers: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Counts the tokens of each prompt that the document before it begins with, too, int64 `[S]`; 0 for an example's first.

    Args:
        ids: int64 `[T]`, documents end to end.
        lengths, answers: int64 `[S]`, tokens of each document and of its answer.
        sizes: int64 `[E]`, documents of each example.

    >>> shared_with_previous(np.array([5, 6, 5, 7, 5, 7, 8, 9]), np.array([2, 2, 4]), np.array([1, 1, 1]), np.array([3]))
    array([0, 1, 2])
    """
    most = np.minimum(lengths - answers, np.roll(lengths, 1))
    most[np.cumsum(sizes) - sizes] = 0
    starts, offsets = offsets_of(lengths)[:-1], offsets_of(most)
    before = np.roll(starts, 1)
    differ = np.flatnonzero(ids[_ranges(starts, starts + most)] != ids[_ranges(before, before + most)])
    first = np.append(differ, offsets[-1])[np.searchsorted(differ, offsets[:-1])]
    return np.minimum(first, offsets[1:]) - offsets[:-1]


class GroupCollator(PackCollator):
    """Turns the documents of `GroupExamples` into batches.

    Args:
        shared: lays out once what a document shares with the one before it, for flat layouts.
        last_only: supervises the last token of each document alone, for models that score a document there.
        options: as `PackCollator`.
    """

    def __init__(self, *, shared: bool = False, last_only: bool = False, **options: Any):
        # the first token of a document is a prompt's, without a label, or an answer's that goes on from one
        super().__init__(**options, first_labels=True)
        assert not (shared and self.layout != "flat"), "a padded row holds one document"
        self.shared, self.last_only = shared, last_only

    def collate(
        self,
        input_ids: np.ndarray,
        labels: np.ndarray,
        lengths: np.ndarray,
        example_ids: np.ndarray,
        supervised: np.ndarray | None = None,
        factors: np.ndarray | None = None,
    ) -> Batch:
        """Makes a batch from documents end to end; arguments as `collate_flat`. Where they end is read off the labels."""
        if not (labels != IGNORED).any():  # of padding only
            none = {"predictors": torch.zeros(0, dtype=torch.int64)}
            return super().collate(input_ids, labels, lengths, example_ids) | none
        lengths, answers = documents_of(labels)  # [S]
        sizes = self.sizes(answers, supervised)  # [E]
        offsets = offsets_of(lengths)
        if self.last_only:
            labels = np.full_like(labels, IGNORED)
            labels[offsets[1:] - 1] = 0
        prefixes = np.zeros_like(lengths)
        if self.shared:
            prefixes = shared_with_previous(input_ids, lengths, answers, sizes)
            kept = np.ones(len(input_ids), dtype=bool)
            kept[_ranges(offsets[:-1], offsets[:-1] + prefixes)] = False
            input_ids, labels, lengths = input_ids[kept], labels[kept], lengths - prefixes
        of_example = None if supervised is None else np.repeat(supervised, sizes)
        batch = super().collate(input_ids, labels, lengths, np.repeat(example_ids, sizes), of_example)
        if not self.shared:
            return batch | {"predictors": batch["supervised_index"] - 1}
        batch["position_ids"] += torch.from_numpy(np.repeat(prefixes, lengths))
        shared = SharedPrefixes(lengths.tolist(), prefixes.tolist())
        batch |= {SHARED: shared, **shared.entries()}
        return batch | {"predictors": torch.from_numpy(_predictors(batch, lengths, prefixes))}

    def sizes(self, answers: np.ndarray, supervised: np.ndarray | None) -> np.ndarray:
        """Returns the documents of each example, int64 `[E]`; arguments as `documents_in`."""
        assert supervised is not None, "supervised tokens say which documents are of one example"
        return documents_in(answers, supervised)

    def names(self, count: int) -> list[str]:
        """Names the documents of an example."""
        return [f"answer {number + 1} of {count}" for number in range(count)]

    def titles(self, batch: Mapping[str, Any]) -> list[str]:
        """Says of every document of a batch what it is of its example."""
        if not len(batch["supervised_index"]):
            return super().titles(batch)
        counts = [len([*group]) for _, group in groupby(batch["example_ids"].tolist())]
        titles = [name for count in counts for name in self.names(count)]
        for number, prefix in enumerate(batch[SHARED].prefixes if SHARED in batch else ()):
            if prefix:
                titles[number] += f", goes on from the first {prefix:,} tokens of document {number - 1}"
        return titles


def _predictors(batch: Batch, lengths: np.ndarray, prefixes: np.ndarray) -> np.ndarray:
    """Returns the places of the tokens that predict the supervised ones of a row with shared prefixes, int64 `[N]`: the ones
    before them, and of an answer that begins its document, the last of the prefix."""
    index = batch["supervised_index"].numpy()
    offsets = offsets_of(lengths)
    document = np.searchsorted(offsets[1:], index, side="right")
    last = batch["cu_seq_lens_k"].numpy()[document] + prefixes[document] - 1
    return np.where(index == offsets[document], batch["key_index"].numpy()[last], index - 1)


def _ranges(starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Returns the numbers of several ranges, end to end.

    >>> _ranges(np.array([1, 7]), np.array([3, 8]))
    array([1, 2, 7])
    """
    lengths = stops - starts
    return np.arange(lengths.sum()) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
