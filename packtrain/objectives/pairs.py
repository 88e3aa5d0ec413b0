"""Pairs of answers to one prompt: examples of two documents that are planned, balanced, weighted and resumed as one.

    row         {"prompt": "2+2?", "chosen": "4", "rejected": "five"}
    example     [2+2? 4 </s>] [2+2? five </s>]                  two documents, of which the answers are supervised

    flat        2+2? 4 </s> 2+2? five </s> ...                  documents end to end
    padded      two rows, each as wide as the longest document of the micro-batch
    shared      2+2? 4 </s> five </s> ...                       the prompt once; see `modeling.attention.prefixes`

What a plan counts as the tokens of an example is what its documents take in the layout: all of them in a flat row, twice
the longer one in padded rows, the prompt once where it is shared.

Batches have the keys of `packtrain.packing.collator`, with an entry of `example_ids` for every document, and `pairs`:

    of          int64 [P, 2]    the documents of each pair, chosen first
    document    int64 [N]       the document of each supervised position, in the order of `supervised_index`
    predictor   int64 [N]       the flat position whose logits predict it
    last        int64 [P]       the last supervised position of each chosen document
    tokens      float32 [S]     supervised tokens of each document
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from packtrain.data.examples import Examples
from packtrain.data.formats import IGNORED
from packtrain.data.report import DataReport
from packtrain.modeling.attention.prefixes import KEY as SHARED
from packtrain.modeling.attention.prefixes import SharedPrefixes
from packtrain.objectives.examples import DerivedExamples
from packtrain.objectives.objective import TokenLosses
from packtrain.packing.collator import Batch, PackCollator
from packtrain.packing.packs import offsets_of

_AT_ONCE = 4096  # examples whose masks are read at once


class PairExamples(DerivedExamples):
    """Pairs as a plan and a collator see them.

    Args:
        examples: of a format of pairs: two documents end to end, each a prompt and a supervised answer.
        layout: "flat" or "padded".
        shared: the prompt is laid out once.

    Attributes:
        prompt, chosen, rejected: int64 `[n]`, tokens of the prompt and of either answer.
        reference: float32 `[n, 2]`, log-probabilities of both answers under the reference model; None until computed.
    """

    def __init__(self, examples: Examples, *, layout: Literal["flat", "padded"] = "flat", shared: bool = False):
        self.examples, self.layout, self.shared = examples, layout, shared
        both = np.asarray(examples.lengths, dtype=np.int64), np.asarray(examples.supervised, dtype=np.int64)
        self.prompt = (both[0] - both[1]) // 2
        self.chosen = _first_answers(examples)
        self.rejected = both[1] - self.chosen
        self.supervised = examples.supervised
        self.lengths = self.lengths_in(layout)
        self.fingerprint = f"{examples.fingerprint} pairs"
        self.reference: np.ndarray | None = None

    def lengths_in(self, layout: str) -> np.ndarray:
        """Returns the tokens that each pair takes in a layout, int64 `[n]`."""
        if layout == "padded":
            return 2 * (self.prompt + np.maximum(self.chosen, self.rejected))
        return self.prompt * (1 if self.shared else 2) + self.chosen + self.rejected

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return int((self.prompt + np.maximum(self.chosen, self.rejected)).max())

    @property
    def report(self) -> DataReport:
        """The examples' own report, and what the prompts are of them."""
        prompts, tokens = int(self.prompt.sum()), int(self.examples.lengths.sum(dtype=np.int64))
        note = (
            f"pairs: {len(self):,}, each of two documents; the prompts are {2 * prompts / tokens:.1%} of their tokens"
        )
        if self.shared:
            note += f", and laid out once: {tokens:,} tokens become {tokens - prompts:,}"
        if self.layout == "padded":
            note += "; a plan counts two rows as wide as the longer one"
        return replace(self.examples.report, notes=(*self.examples.report.notes, note))

    def gather(
        self, example_ids: Sequence[int] | np.ndarray, starts: np.ndarray | None = None, stops: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the documents of pairs end to end, as `Examples.gather`, both with their prompt; always whole ones."""
        return self.examples.gather(example_ids)

    def extras(self, example_ids: np.ndarray) -> dict[str, torch.Tensor]:
        """Returns `reference_logps` float32 `[P, 2]`, where they are known."""
        return {} if self.reference is None else {"reference_logps": torch.from_numpy(self.reference[example_ids])}


def _first_answers(examples: Examples) -> np.ndarray:
    """Counts the supervised tokens of the first document of each example, int64 `[n]`."""
    counts = []
    for start in range(0, len(examples), _AT_ONCE):
        ids = np.arange(start, min(start + _AT_ONCE, len(examples)))
        _, labels = examples.gather(ids)
        ends = document_ends(labels)
        assert len(ends) == 2 * len(ids), "a pair has two documents, each with a prompt and a supervised answer"
        supervised = np.cumsum(labels != IGNORED)[ends - 1]  # up to the end of each document
        counts.append(np.diff(supervised, prepend=0)[::2])
    return np.concatenate(counts).astype(np.int64)


def document_ends(labels: np.ndarray) -> np.ndarray:
    """Returns where documents end whose supervised tokens are their last, int64 `[S]`.

    >>> document_ends(np.array([-100, 5, 6, -100, -100, 7]))
    array([3, 6])
    """
    supervised = labels != IGNORED
    return np.flatnonzero(supervised & ~np.append(supervised[1:], False)) + 1


class PairCollator(PackCollator):
    """Turns the documents of `PairExamples` into batches.

    Args:
        shared: lays a prompt out once, for flat layouts.
        last_only: supervises the last token of each document alone, for models that score a document there.
        options: as `PackCollator`.
    """

    def __init__(self, *, shared: bool = False, last_only: bool = False, **options: Any):
        super().__init__(**options)
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
        """Makes a batch from pairs end to end; arguments as `collate_flat`. Where documents end is read off the labels."""
        ends = document_ends(labels)
        if not len(ends):  # of padding only
            return super().collate(input_ids, labels, lengths, example_ids) | {"pairs": _nothing()}
        lengths = np.diff(ends, prepend=0)
        starts = ends - lengths
        answers = np.add.reduceat((labels != IGNORED).astype(np.int64), starts)  # [S]
        prompts = (lengths - answers)[::2]  # [P], the same in both documents
        answers_only = np.full_like(labels, IGNORED)
        if self.last_only:
            answers_only[ends - 1] = 0
        else:
            answers_only = labels
        shared: np.ndarray | None = None
        if self.shared:
            kept = np.ones(len(input_ids), dtype=bool)
            kept[_ranges(starts[1::2], starts[1::2] + prompts)] = False  # the second prompt
            input_ids, answers_only = input_ids[kept], answers_only[kept]
            lengths = np.where(np.arange(len(lengths)) % 2, answers, lengths)
            shared = prompts
        batch = super().collate(input_ids, answers_only, lengths, np.repeat(example_ids, 2))
        if shared is not None:
            _continue_prompts(batch, answers_only, lengths, shared)
        return batch | {"pairs": self._pairs(batch, lengths, shared)}

    def _pairs(self, batch: Batch, lengths: np.ndarray, shared: np.ndarray | None) -> dict[str, torch.Tensor]:
        index = batch["supervised_index"].numpy()
        if self.layout == "flat":
            document = np.searchsorted(np.cumsum(lengths), index, side="right")
        else:
            document = index // batch["input_ids"].shape[1]
        tokens = np.bincount(document, minlength=len(lengths))
        predictor = index - 1
        if shared is not None:  # the first token of a rejected answer is predicted by the last of the prompt
            offsets = offsets_of(lengths)[:-1]
            first = index == offsets[document]
            prompt_ends = np.repeat(offsets[::2] + shared, 2)[document] - 1
            predictor = np.where(first & (document % 2 == 1), prompt_ends, predictor)
        last = index[np.cumsum(tokens) - 1][::2]
        arrays = {
            "of": np.arange(len(lengths)).reshape(-1, 2),
            "document": document,
            "predictor": predictor,
            "last": last,
            "tokens": tokens.astype(np.float32),
        }
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}

    def titles(self, batch: Mapping[str, Any]) -> list[str]:
        """Says of every document of a batch what it is of its pair."""
        if not len(batch["pairs"]["of"]):
            return super().titles(batch)
        names = ["chosen", "rejected"] * (len(batch["example_ids"]) // 2)
        if SHARED in batch:
            for pair, prompt in enumerate(batch[SHARED].prompts):
                names[2 * pair] += f", after a prompt of {prompt:,} tokens that both share"
                names[2 * pair + 1] += f", goes on from the prompt of document {2 * pair}"
        return names


def _continue_prompts(batch: Batch, labels: np.ndarray, lengths: np.ndarray, prompts: np.ndarray) -> None:
    """Makes the second document of each pair go on from the prompt of the first, in place.

    Args:
        labels: int64 `[T]`, of a flat batch with the prompts once.
        lengths: int64 `[2 P]`, tokens of the first document with the prompt, of the second without, and so on.
        prompts: int64 `[P]`.
    """
    offsets = offsets_of(lengths)  # [2 P + 1]
    seconds = _ranges(offsets[1:-1:2], offsets[2::2])
    batch["position_ids"][0, seconds] += torch.from_numpy(np.repeat(prompts, lengths[1::2]))
    batch["labels"] = torch.from_numpy(labels.copy())[None]
    batch["loss_weights"] = (batch["labels"] != IGNORED).float()
    batch["supervised_index"] = torch.from_numpy(np.flatnonzero(labels != IGNORED))
    shared = SharedPrefixes(lengths.reshape(-1, 2).tolist(), prompts.tolist())
    batch |= {SHARED: shared, **shared.entries()}


def _ranges(starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Returns the numbers of several ranges, end to end.

    >>> _ranges(np.array([1, 7]), np.array([3, 8]))
    array([1, 2, 7])
    """
    lengths = stops - starts
    return np.arange(lengths.sum()) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)


def _nothing() -> dict[str, torch.Tensor]:
    none = torch.zeros(0, dtype=torch.int64)
    return {"of": none.view(0, 2), "document": none, "predictor": none, "last": none, "tokens": torch.zeros(1)}


@dataclass(frozen=True, kw_only=True)
class PairLosses(TokenLosses):
    """The losses of the pairs of a micro-batch, P of them: `nll`, `weights` and `index` `[P]` are of pairs.

    scores: float `[P, 2]`, what the loss compares of chosen and rejected, without gradient.
    """

    scores: torch.Tensor


def count_pairs(batch: Mapping[str, Any]) -> torch.Tensor:
    """Returns the micro-batch's share of the denominator, a float64 scalar on the host or where the batch is."""
    of = batch["pairs"]["of"]
    return torch.tensor(float(len(of)), dtype=torch.float64, device=of.device)


def sums_over_pairs(figures: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns `{name: [sum over pairs, pairs]}`, float64, of figures `[P]`."""
    return {
        name: torch.stack([values.detach().double().sum(), values.new_full((), len(values), dtype=torch.float64)])
        for name, values in figures.items()
    }
