"""What an objective is: token losses of a micro-batch, and what a step's sum of them is divided by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class TokenLosses:
    """The predictions of one micro-batch that are scored, N of them, in reading order.

    nll: float32 `[N]`, -log p(target).
    weights: float32 `[N]`, what each counts.
    index: int64 `[N]`, flat position of the target in `labels` (row-major over `[B, T]`).
    """

    nll: torch.Tensor
    weights: torch.Tensor
    index: torch.Tensor

    def weighted_sum(self) -> torch.Tensor:
        """Sum of `weights * nll`, a float32 scalar that carries gradients also when N is 0."""
        return (self.nll * self.weights).sum()


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A loss that is a sum over micro-batches divided by a sum over micro-batches, so that layout can't matter.

        loss of a step = sum of losses(model, batch).weighted_sum() / sum of denominator(batch)

    losses: `(model, batch, *, head) -> TokenLosses`.
    denominator: `batch -> float64 scalar`.
    sums: optional, `(TokenLosses, batch) -> {name: float64 [2]}`: figures of its own, each a numerator and a
        denominator to be summed over micro-batches and ranks; logged as `name` and, held out, as `eval_name`.
    """

    losses: Callable[..., TokenLosses]
    denominator: Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
    sums: Callable[[TokenLosses, Mapping[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None
