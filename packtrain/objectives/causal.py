"""Causal language modelling: the loss of a step, whatever its layout.

    loss = sum(loss_weights * nll) / sum over the step, all micro-batches and ranks, of loss_weights

Token weighting (all weights 1) and example weighting (1 / supervised tokens of the example) are the same
code. Position t predicts token t+1, so t is scored where `labels[t+1] != -100`; the first label of every document is
-100, so nothing is predicted across a border.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from packtrain.data.formats import IGNORED
from packtrain.objectives.objective import Loss, Objective, Task, TokenLosses

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from packtrain.data.examples import Examples


class CausalLM(Objective):
    """Predicts the next token."""

    weighs_tokens: ClassVar[bool] = True
    predicts_next: ClassVar[bool] = True
    streams: ClassVar[bool] = True
    weighing: ClassVar[tuple[str, ...]] = ("loss_weighting",)

    name: Literal["causal_lm"] = "causal_lm"
    loss_weighting: Literal["token", "example"] = "token"
    """What is weighted equally: every supervised token, or every example."""

    def unlike_sft(self) -> tuple[str, Any] | None:
        return None if self.loss_weighting == "token" else ("objective.loss_weighting", self.loss_weighting)

    def task(
        self,
        tokenizer: PreTrainedTokenizerBase,
        train: Examples,
        held_out: Examples | None,
        *,
        seed: int,
        layout: Literal["flat", "padded"] = "flat",
    ) -> Task:
        from packtrain.packing.collator import PackCollator

        return Task(
            tokenizer=tokenizer,
            train=train,
            held_out=held_out,
            loss=CAUSAL_LM,
            make_collator=partial(PackCollator, loss_weighting=self.loss_weighting),
        )


def causal_lm_losses(
    model: torch.nn.Module, batch: Mapping[str, torch.Tensor], *, head: torch.nn.Module | None = None
) -> TokenLosses:
    """Runs `model` on a padded or flat batch and scores every supervised token.

    Args:
        model, head: see `logits_at`.
        batch: `labels` int64 `[B, T]` unshifted, -100 ignored; `loss_weights` float32 `[B, T]`; the model's inputs; and
            `supervised_index` int64 `[N]`, see `supervised_index`; and `predictors` int64 `[N]` where the position that
            predicts a token may be another than the one before it.

    Raises:
        ModelError: the model has no output embeddings, or does not call them in its forward.
    """
    from packtrain.objectives.logits import token_losses

    index = supervised_index(batch)  # [N], of the targets; position column predicts column + 1
    return token_losses(model, batch, index, batch.get("predictors", index - 1), head=head)


def supervised_index(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Returns the flat positions of the targets, int64 `[N]`: the collator's, else found in the labels, which waits for the
    device. The first token of a row has none before it, and is never one."""
    if "supervised_index" in batch:
        return batch["supervised_index"]
    labels = batch["labels"]
    row, column = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    return row * labels.shape[1] + column + 1


def sum_of_weights(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Returns the micro-batch's share of the denominator, a float64 scalar."""
    import torch

    return batch["loss_weights"].sum(dtype=torch.float64)


def output_embeddings(model: torch.nn.Module) -> torch.nn.Module:
    """Returns the module that maps hidden states to logits. Raises ModelError when the model names none."""
    from packtrain.objectives.logits import output_head

    return output_head(model)


CAUSAL_LM = Loss(losses=causal_lm_losses, denominator=sum_of_weights, head=output_embeddings)
