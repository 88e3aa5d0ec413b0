"""Several answers to one prompt: examples of as many documents that are planned, balanced, weighted and resumed as one.

    row         {"prompt": "2+2?", "completions": ["4", "four", "It is 4."]}
    example     [2+2? 4 </s>] [2+2? four </s>] [2+2? It is 4. </s>]      documents, of which the answers are supervised

    flat        2+2? 4 </s> 2+2? four </s> ...                  documents end to end
    padded      a row for each, as wide as the longest document of the micro-batch
    shared      2+2? 4 </s> four </s> It is 4. </s> ...         the prompt once; see `modeling.attention.prefixes`

What a plan counts as the tokens of an example is what its documents take in the layout: all of them in a flat row, the
longest one as often as there are documents in padded rows, the prompt once where it is shared.

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
    """Answers to one prompt as a plan and a collator see them.

    Args:
        examples: documents end to end, each the same prompt and a supervised answer.
        layout: "flat" or "padded".
        shared: the prompt is laid out once.

    Attributes:
        sizes: int64 `[n]`, documents of each example.
        prompt: int64 `[n]`, tokens of the prompt.
        answers: int64 `[sum of sizes]`, tokens of every answer.
        longest_answer: int64 `[n]`.
    """

    def __init__(self, examples: Examples, *, layout: Literal["flat", "padded"] = "flat", shared: bool = False):
        self.examples, self.layout, self.shared = examples, layout, shared
        self.supervised = examples.supervised
        self.sizes, self.answers = _answers_of(examples)
        total, answered = (np.asarray(of, dtype=np.int64) for of in (examples.lengths, examples.supervised))
        self.prompt = (total - answered) // self.sizes
        self.longest_answer = np.maximum.reduceat(self.answers, np.cumsum(self.sizes) - self.sizes)
        self.lengths = self.lengths_in(layout)
        self.fingerprint = f"{examples.fingerprint} groups"

    def lengths_in(self, layout: str) -> np.ndarray:
        """Returns the tokens that each example takes in a layout, int64 `[n]`."""
        if layout == "padded":
            return self.sizes * (self.prompt + self.longest_answer)
        return self.prompt * (1 if self.shared else self.sizes) + self.supervised

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return int((self.prompt + self.longest_answer).max())

    @property
    def report(self) -> DataReport:
        """The examples' own report, and what the prompts are of them."""
        tokens = int(self.examples.lengths.sum(dtype=np.int64))
        prompts, once = int((self.prompt * self.sizes).sum()), int(self.prompt.sum())
        note = f"{self._counted()}; the prompts are {prompts / tokens:.1%} of their tokens"
        if self.shared:
            note += f", and laid out once: {tokens:,} tokens become {tokens - prompts + once:,}"
        if self.layout == "padded":
            note += "; a plan counts rows as wide as the longest one of an example"
        return replace(self.examples.report, notes=(*self.examples.report.notes, note))

    def _counted(self) -> str:
        few, many = int(self.sizes.min()), int(self.sizes.max())
        each = f"{few}" if few == many else f"{few} to {many}"
        return f"answers: {len(self.answers):,} to {len(self):,} prompts, {each} to each"

    def gather(
        self, example_ids: Sequence[int] | np.ndarray, starts: np.ndarray | None = None, stops: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the documents end to end, as `Examples.gather`, all with their prompt; always whole ones."""
        return self.examples.gather(example_ids)


def _answers_of(examples: Examples) -> tuple[np.ndarray, np.ndarray]:
    """Counts the documents of each example, int64 `[n]`, and the tokens of every answer, int64 `[documents]`."""
    sizes, answers = [], []
    for start in range(0, len(examples), _AT_ONCE):
        ids = np.arange(start, min(start + _AT_ONCE, len(examples)))
        _, labels = examples.gather(ids)
        found = np.diff(np.cumsum(labels != IGNORED)[document_ends(labels) - 1], prepend=0)
        sizes.append(documents_in(found, examples.supervised[ids]))
        answers.append(found)
    return np.concatenate(sizes), np.concatenate(answers).astype(np.int64)


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


def document_ends(labels: np.ndarray) -> np.ndarray:
    """Returns where documents end whose supervised tokens are their last, int64 `[S]`.

    >>> document_ends(np.array([-100, 5, 6, -100, -100, 7]))
    array([3, 6])
    """
    supervised = labels != IGNORED
    return np.flatnonzero(supervised & ~np.append(supervised[1:], False)) + 1


class GroupCollator(PackCollator):
    """Turns the documents of `GroupExamples` into batches.

    Args:
        shared: lays a prompt out once, for flat layouts.
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
        ends = document_ends(labels)
        if not len(ends):  # of padding only
            none = {"predictors": torch.zeros(0, dtype=torch.int64)}
            return super().collate(input_ids, labels, lengths, example_ids) | none
        lengths = np.diff(ends, prepend=0)  # [S]
        starts = ends - lengths
        answers = np.add.reduceat((labels != IGNORED).astype(np.int64), starts)  # [S]
        sizes = self.sizes(answers, supervised)  # [E]
        first = np.repeat(np.cumsum(sizes) - sizes, sizes)  # [S], the first document of its example
        follows = np.arange(len(ends)) != first
        prompts = (lengths - answers)[first]
        if self.last_only:
            labels = np.full_like(labels, IGNORED)
            labels[ends - 1] = 0
        if self.shared:
            kept = np.ones(len(input_ids), dtype=bool)
            kept[_ranges(starts[follows], (starts + prompts)[follows])] = False  # the prompt once more
            input_ids, labels = input_ids[kept], labels[kept]
            lengths = np.where(follows, answers, lengths)
        of_example = None if supervised is None else np.repeat(supervised, sizes)
        batch = super().collate(input_ids, labels, lengths, np.repeat(example_ids, sizes), of_example)
        predictors = batch["supervised_index"].numpy() - 1
        if self.shared:
            offsets = offsets_of(lengths)
            begin = offsets[:-1][follows]
            tokens = _ranges(begin, offsets[1:][follows])
            batch["position_ids"][0, tokens] += torch.from_numpy(np.repeat(prompts[follows], lengths[follows]))
            # the first token of an answer that goes on from a prompt is predicted by the prompt's last
            prompt_ends = (offsets[first] + prompts)[follows] - 1
            at, here = np.searchsorted(begin, predictors + 1), predictors + 1
            starting = (at < len(begin)) & (np.append(begin, -1)[at] == here)
            predictors[starting] = prompt_ends[at[starting]]
            groups = np.split(lengths, np.cumsum(sizes)[:-1])
            shared = SharedPrefixes([group.tolist() for group in groups], prompts[~follows].tolist())
            batch |= {SHARED: shared, **shared.entries()}
        return batch | {"predictors": torch.from_numpy(predictors)}

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
        if SHARED in batch:
            firsts = (np.cumsum(counts) - counts).tolist()
            for first, count, prompt in zip(firsts, counts, batch[SHARED].prompts, strict=True):
                if count > 1:
                    titles[first] += (
                        f", after a prompt of {prompt:,} tokens that {'both' if count == 2 else 'all'} share"
                    )
                for number in range(first + 1, first + count):
                    titles[number] += f", goes on from the prompt of document {first}"
        return titles


def _ranges(starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Returns the numbers of several ranges, end to end.

    >>> _ranges(np.array([1, 7]), np.array([3, 8]))
    array([1, 2, 7])
    """
    lengths = stops - starts
    return np.arange(lengths.sum()) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
