"""How hard tokens are to predict: their nll and their EL2N.

EL2N is the L2 norm of the error of a prediction, softmax(logits) - onehot(target), between 0 and sqrt(2) (Paul,
Ganguli and Dziugaite 2021, Deep Learning on a Data Diet, https://arxiv.org/abs/2107.07075). Over a whole vocabulary it
is a sum that fits next to the logits of one chunk of positions:

    EL2N^2 = (1 - p_target)^2 + sum of p_j^2 over all other tokens j

and 1 - p_target is the sum of the other p_j, so that nothing cancels where a model is sure.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from packtrain.objectives.causal import supervised_index
from packtrain.objectives.logits import map_logits


def token_difficulty(
    model: nn.Module, batch: Mapping[str, Tensor], *, head: nn.Module | None = None
) -> tuple[Tensor, Tensor]:
    """Returns nll and EL2N of every supervised token that a causal model predicts, float32 `[N]` each, in reading order.

    Args:
        model, head: see `packtrain.objectives.logits.logits_at`.
        batch: padded or flat, as for `causal_lm_losses`.
    """
    index = supervised_index(batch)
    targets = batch["labels"].flatten()[index]
    nll, el2n = map_logits(model, batch, index - 1, targets, difficulty, head=head).unbind(1)
    return nll, el2n


def difficulty(logits: Tensor, targets: Tensor) -> Tensor:
    """Computes nll and EL2N, `[N, 2]`, of logits `[N, V]`, which are overwritten, and targets int64 `[N]`.

    >>> logits = torch.tensor([[2.0, 2.0, -50.0]])
    >>> [round(value, 4) for value in difficulty(logits, torch.tensor([0]))[0].tolist()]  # p = (1/2, 1/2, 0)
    [0.6931, 0.7071]
    """
    target = targets.unsqueeze(1)
    logits.sub_(logits.amax(dim=1, keepdim=True))
    of_target = logits.gather(1, target)
    others = logits.exp_().scatter_(1, target, 0.0)
    wrong = others.sum(dim=1, keepdim=True)
    total = wrong + of_target.exp()
    el2n = (wrong.square() + others.square_().sum(dim=1, keepdim=True)).sqrt() / total
    return torch.cat([total.log() - of_target, el2n], dim=1)
