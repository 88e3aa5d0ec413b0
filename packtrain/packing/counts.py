"""What packing makes of a histogram alone: packs, bound and gap in memory O(longest), whatever the number of examples.

    counts = histogram(load_lengths("lengths.npy"))
    for report in pack_counts(counts, max_tokens=8192):
        print(report.strategy, report.packs, f"{report.gap:.2%} above the bound")

No example is assigned to a pack here, so a billion lengths cost one pass over the file and no more memory than a thousand.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from packtrain.errors import PlanError
from packtrain.packing.bounds import lower_bound
from packtrain.packing.histogram import best_fit_decreasing, first_fit_decreasing
from packtrain.packing.optimal import near_optimal


@dataclass(frozen=True, kw_only=True)
class CountsReport:
    """One strategy's packs of one epoch.

    Attributes:
        strategy: its name.
        packs: of `max_tokens` tokens.
        bound: a proved lower bound on the packs of any strategy.
        filled: real tokens / (packs x max_tokens).
    """

    strategy: str
    packs: int
    bound: int
    filled: float

    @property
    def gap(self) -> float:
        """How far the packs are above the bound, as a share of it."""
        return self.packs / self.bound - 1 if self.bound else 0.0


def pack_counts(counts: np.ndarray, max_tokens: int, max_documents: int | None = None) -> list[CountsReport]:
    """Best-fit decreasing, first-fit decreasing and the optimal packing of `counts`, int64 `[longest + 1]`.

    Raises:
        PlanError: no capacity, no documents, or one that doesn't fit.

        >>> [(report.strategy, report.packs, report.bound) for report in pack_counts(np.bincount([6, 4, 5, 5]), 10)]
        [('bfd', 2, 2), ('ffd', 2, 2), ('optimal', 2, 2)]
    """
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int | np.integer) or max_tokens < 1:
        raise PlanError("must be a positive integer", key="max_tokens", value=max_tokens)
    present = np.flatnonzero(counts)
    if not len(present):
        raise PlanError("there are no examples to plan")
    if present[-1] > max_tokens:
        raise PlanError(
            f"the longest example has {present[-1]} tokens", key="max_tokens", value=max_tokens, fix="raise max_tokens"
        )
    tokens = int((counts * np.arange(len(counts))).sum())
    optimal, proved = near_optimal(counts, max_tokens, max_documents)
    bound = max(lower_bound(counts, max_tokens, max_documents), proved)
    packings = {
        "bfd": best_fit_decreasing(counts, max_tokens, max_documents),
        "ffd": first_fit_decreasing(counts, max_tokens, max_documents),
        "optimal": optimal,
    }
    return [
        CountsReport(strategy=name, packs=len(packs), bound=bound, filled=tokens / (len(packs) * max_tokens))
        for name, packs in packings.items()
    ]
