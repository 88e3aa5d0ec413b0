"""Pairs of answers to one prompt: examples of two documents that are planned, balanced, weighted and resumed as one.

    row         {"prompt": "2+2?", "chosen": "4", "rejected": "five"}
    example     [2+2? 4 </s>] [2+2? five </s>]                  two documents, of which the answers are supervised

They are laid out as the answers of any example are, see `groups`.

Batches have the keys of those, and `pairs`:

    of          int64 [P, 2]    the documents of each pair, chosen first
    document    int64 [N]       the document of each supervised position, in the order of `supervised_index`
    last        int64 [P]       the last supervised position of each chosen document
    tokens      float32 [S]     supervised tokens of each document
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from packtrain.data.examples import Examples
from packtrain.objectives.groups import GroupCollator, GroupExamples
from packtrain.objectives.objective import TokenLosses
from packtrain.packing.collator import Batch


class PairExamples(GroupExamples):
    """Pairs as a plan and a collator see them; arguments as `GroupExamples`.

    Attributes:
        prompt, chosen, rejected: int64 `[n]`, tokens of the prompt and of either answer.
        reference: float32 `[n, 2]`, log-probabilities of both answers under the reference model; None until computed.
    """

    def __init__(self, examples: Examples, *, layout: Literal["flat", "padded"] = "flat", shared: bool = False):
        super().__init__(examples, layout=layout, shared=shared)
        assert (self.sizes == 2).all(), "a pair has two documents"
        self.chosen, self.rejected = self.answers.reshape(-1, 2).T
        self.prompt = self.documents[::2] - self.chosen
        self.fingerprint = f"{examples.fingerprint} pairs"
        self.reference: np.ndarray | None = None

    def _counted(self) -> str:
        return f"pairs: {len(self):,}, each of two documents"

    def extras(self, example_ids: np.ndarray) -> dict[str, torch.Tensor]:
        """Returns `reference_logps` float32 `[P, 2]`, where they are known."""
        return {} if self.reference is None else {"reference_logps": torch.from_numpy(self.reference[example_ids])}


class PairCollator(GroupCollator):
    """Turns the documents of `PairExamples` into batches; arguments as `GroupCollator`."""

    def collate(self, *args: Any, **options: Any) -> Batch:
        """Makes a batch from pairs end to end; arguments as `GroupCollator.collate`."""
        batch = super().collate(*args, **options)
        index = batch["supervised_index"].numpy()
        if not len(index):  # of padding only
            return batch | {"pairs": _no_pairs()}
        count = len(batch["example_ids"])
        if self.layout == "flat":
            document = np.searchsorted(batch["cu_seq_lens_q"].numpy()[1:], index, side="right")
        else:
            document = index // batch["input_ids"].shape[1]
        tokens = np.bincount(document, minlength=count)
        arrays = {
            "of": np.arange(count).reshape(-1, 2),
            "document": document,
            "last": index[np.cumsum(tokens) - 1][::2],
            "tokens": tokens.astype(np.float32),
        }
        return batch | {
            "pairs": {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        }

    def sizes(self, answers: np.ndarray, supervised: np.ndarray | None) -> np.ndarray:
        return np.full(len(answers) // 2, 2)

    def names(self, count: int) -> list[str]:
        return ["chosen", "rejected"]


def _no_pairs() -> dict[str, torch.Tensor]:
    none = torch.zeros(0, dtype=torch.int64)
    return {"of": none.view(0, 2), "document": none, "last": none, "tokens": torch.zeros(1)}


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
