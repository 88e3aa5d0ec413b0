"""Causal language modelling: the loss of a step, whatever its layout.

    loss = sum(loss_weights * nll) / sum over the step, all micro-batches and ranks, of loss_weights

Token weighting (all weights 1) and example weighting (1 / supervised tokens of the example) are the same
code. Position t predicts token t+1, so t is scored where `labels[t+1] != -100`; the first label of every document is
-100, so nothing is predicted across a border.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from packtrain.data.formats import IGNORED
from packtrain.objectives.logits import logits_at
from packtrain.objectives.objective import Objective, TokenLosses


def causal_lm_losses(
    model: nn.Module, batch: Mapping[str, torch.Tensor], *, head: nn.Module | None = None
) -> TokenLosses:
    """Run `model` on a padded or flat batch and score every supervised token.

    Args:
        model, head: see `logits_at`.
        batch: `labels` int64 `[B, T]` unshifted, -100 ignored; `loss_weights` float32 `[B, T]`; and the model's inputs.

    Raises:
        ModelError: the model has no output embeddings, or does not call them in its forward.
    """
    labels, weights = batch["labels"], batch["loss_weights"]
    row, column = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)  # [N]; position column predicts column + 1
    index = row * labels.shape[1] + column + 1  # [N], of the targets
    logits = logits_at(model, batch, index - 1, head=head)  # [N, V]
    return TokenLosses(
        nll=F.cross_entropy(logits.float(), labels.flatten()[index], reduction="none"),
        weights=weights.flatten()[index],
        index=index,
    )


def sum_of_weights(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """float64 scalar: the micro-batch's share of the denominator."""
    return batch["loss_weights"].sum(dtype=torch.float64)


CAUSAL_LM = Objective(losses=causal_lm_losses, denominator=sum_of_weights)
