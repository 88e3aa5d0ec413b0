"""The losses of pairs, by the names and formulas of TRL's `DPOTrainer`, whatever the layout.

    c, r    log-ratios of chosen and rejected: log p(answer | prompt) - log p_reference(answer | prompt), summed over tokens
    C, R    the same, divided by the tokens of the answer

    sigmoid       -log sigmoid(beta (c - r))                            DPO, arXiv:2305.18290
    sigmoid_norm  -log sigmoid(beta (C - R))
    hinge         max(0, 1 - beta (c - r))                              SLiC, arXiv:2305.10425
    ipo           (C - R - 1 / (2 beta))^2                              arXiv:2310.12036
    robust        sigmoid, less its expectation under flipped labels    arXiv:2403.00409
    exo_pair      KL of two distributions over the pair                 arXiv:2402.00856
    nca_pair      arXiv:2402.05369
    bco_pair      arXiv:2404.04656
    sppo_hard     arXiv:2405.00675
    apo_zero, apo_down                                                  arXiv:2408.06266

TRL's `aot` sorts the margins of a micro-batch, so it would depend on the layout; it is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from packtrain.errors import PacktrainError
from packtrain.objectives.logits import function_of_losses, output_head
from packtrain.objectives.objective import Loss
from packtrain.objectives.pairs import PairLosses, count_pairs, sums_over_pairs

Formula = Callable[[Tensor, Tensor, Tensor, float, float], Tensor]  # (c, r, tokens [P, 2], beta, smoothing) -> [P]


def _exo_pair(c: Tensor, r: Tensor, tokens: Tensor, beta: float, smoothing: float) -> Tensor:
    margin = beta * (c - r)
    epsilon = torch.tensor(smoothing, dtype=margin.dtype, device=margin.device)
    chosen = margin.sigmoid() * (logsigmoid(margin) - torch.log1p(-epsilon))
    return chosen + (-margin).sigmoid() * (logsigmoid(-margin) - epsilon.log())


def _robust(c: Tensor, r: Tensor, tokens: Tensor, beta: float, smoothing: float) -> Tensor:
    margin = beta * (c - r)
    return (smoothing * logsigmoid(-margin) - (1 - smoothing) * logsigmoid(margin)) / (1 - 2 * smoothing)


FORMULAS: dict[str, Formula] = {
    "sigmoid": lambda c, r, n, beta, _: -logsigmoid(beta * (c - r)),
    "sigmoid_norm": lambda c, r, n, beta, _: -logsigmoid(beta * (c / n[:, 0] - r / n[:, 1])),
    "hinge": lambda c, r, n, beta, _: torch.relu(1 - beta * (c - r)),
    "ipo": lambda c, r, n, beta, _: (c / n[:, 0] - r / n[:, 1] - 1 / (2 * beta)) ** 2,
    "exo_pair": _exo_pair,
    "nca_pair": lambda c, r, n, beta, _: (
        -logsigmoid(beta * c) - 0.5 * logsigmoid(-beta * c) - 0.5 * logsigmoid(-beta * r)
    ),
    "robust": _robust,
    "bco_pair": lambda c, r, n, beta, _: -logsigmoid(beta * c) - logsigmoid(-beta * r),
    "sppo_hard": lambda c, r, n, beta, _: (c - 0.5 / beta) ** 2 + (r + 0.5 / beta) ** 2,
    "apo_zero": lambda c, r, n, beta, _: 1 - torch.sigmoid(beta * c) + torch.sigmoid(beta * r),
    "apo_down": lambda c, r, n, beta, _: torch.sigmoid(beta * c) + 1 - torch.sigmoid(beta * (c - r)),
}


def preference_loss(loss_type: str, *, beta: float, label_smoothing: float = 0.0) -> Loss:
    """Makes the loss of one type, for batches of a `PairCollator` with `reference_logps`.

    Logged are TRL's `rewards/chosen` and `rewards/rejected`, beta times the log-ratios, `rewards/margins` and
    `rewards/accuracies` of them, and `logps/chosen` and `logps/rejected`, each a mean over pairs.
    """
    formula = FORMULAS[loss_type]

    def losses(model: nn.Module, batch: Mapping[str, Any], *, head: nn.Module | None = None) -> PairLosses:
        return preference_losses(
            model, batch, lambda c, r, tokens: formula(c, r, tokens, beta, label_smoothing), head=head
        )

    def sums(found: PairLosses, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        chosen, rejected = (beta * (found.scores - reference_of(batch))).unbind(dim=1)
        return sums_over_pairs({
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "rewards/margins": chosen - rejected,
            "logps/chosen": found.scores[:, 0],
            "logps/rejected": found.scores[:, 1],
        })  # fmt: skip

    return Loss(losses=losses, denominator=count_pairs, head=output_head, sums=sums)


def preference_losses(
    model: nn.Module,
    batch: Mapping[str, Any],
    formula: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    head: nn.Module | None = None,
) -> PairLosses:
    """Runs `model` on a batch of a `PairCollator` and scores every pair.

    Args:
        model, head: see `packtrain.objectives.logits.logits_at`.
        batch: with `pairs` and `reference_logps`.
        formula: log-ratios of chosen and of rejected `[P]`, and tokens of either `[P, 2]`, -> losses `[P]`.
    """
    of, tokens, reference = batch["pairs"]["of"], batch["pairs"]["tokens"], reference_of(batch)

    def function(nll: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        logps = sum_over_documents(-nll, batch)[of]  # [P, 2]
        ratios = logps - reference
        found = formula(ratios[:, 0], ratios[:, 1], tokens[of])
        return found.sum(), (found, logps.detach())

    index = batch["supervised_index"]
    targets = batch["labels"].flatten()[index]
    total, (found, logps) = function_of_losses(model, batch, batch["predictors"], targets, function, head=head)
    return PairLosses(
        nll=found.detach(),
        weights=torch.ones_like(found),
        index=batch["pairs"]["last"],
        total=total,
        scores=logps,
    )


def sum_over_documents(values: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Sums values of supervised tokens `[N]` over documents, `[S]`."""
    zeros = values.new_zeros(len(batch["pairs"]["tokens"]))
    return zeros.index_add(0, batch["pairs"]["document"], values)


def reference_of(batch: Mapping[str, Any]) -> Tensor:
    """Returns the log-probabilities of the reference model, float32 `[P, 2]`.

    Raises:
        PacktrainError: nobody has computed them.
    """
    found = batch.get("reference_logps")
    if found is None and len(batch["pairs"]["of"]):
        what, fix = "the log-probabilities of the reference model were not computed", "call `task.begin(trainer)` first"
        raise PacktrainError(what, key="reference_logps", fix=fix)
    return batch["pairs"]["tokens"].new_zeros(0, 2) if found is None else found
