"""One yardstick for every trainer: the held-out loss, summed over tokens and over examples and divided once.

How the held-out set was batched, and who trained the model, makes no difference to it.
"""

from __future__ import annotations

import torch
from transformers import TrainerCallback

from packtrain.experiments.comparison.results import HeldOut, RunWriter
from packtrain.objectives.objective import Objective
from packtrain.training.loader import PlanLoader
from packtrain.training.sums import document_of


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, loader: PlanLoader, objective: Objective, *, update: int) -> HeldOut:
    """Evaluate `model` on the batches of `loader`; dropout is off meanwhile. No token has a weight here."""
    device = next(model.parameters()).device
    sums = torch.zeros(4, dtype=torch.float64)  # nll, tokens, means of examples, examples
    was_training = model.training
    model.eval()
    for batch in loader:
        batch = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
        losses = objective.losses(model, batch)
        documents = document_of(batch).flatten()[losses.index]  # [N]
        nll = torch.bincount(documents, weights=losses.nll.double())  # [S]
        tokens = torch.bincount(documents)  # [S]
        scored = tokens > 0
        means = (nll[scored] / tokens[scored]).sum()
        sums += torch.stack([nll.sum(), tokens.sum().double(), means, scored.sum().double()]).cpu()
    model.train(was_training)
    nll, tokens, means, examples = sums.tolist()
    return HeldOut(update=update, loss=nll / tokens, loss_per_example=means / examples, tokens=int(tokens))


class EvaluateHeldOut(TrainerCallback):
    """Before the first update, every `every` updates, and after the last."""

    def __init__(self, *, loader: PlanLoader, objective: Objective, writer: RunWriter, every: int | None):
        self.loader, self.objective, self.writer, self.every = loader, objective, writer, every
        self.evaluated = -1

    def _evaluate(self, model: torch.nn.Module, update: int) -> None:
        if update != self.evaluated:
            self.writer.write(held_out_loss(model, self.loader, self.objective, update=update))
            self.evaluated = update

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._evaluate(model, 0)

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        if self.every and "loss" in (logs or {}) and state.global_step % self.every == 0:
            self._evaluate(model, state.global_step)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._evaluate(model, state.global_step)
