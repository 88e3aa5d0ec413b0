"""Masked language modelling: restore tokens from the text on both sides of them (BERT, Devlin et al., arXiv:1810.04805).

    row        {"text": "the plot is thin"}
    batch      <s> the MASK is thin </s>      labels  -  -  plot  -  -  -        (- is -100)

A share of the tokens is chosen; of these 80% become the mask, 10% a token drawn at random, and 10% stay as they are, as in
transformers' `DataCollatorForLanguageModeling`. Special tokens are never chosen, nor is the first token of a row. Choices
are drawn by seed, epoch and example, where batches are made, so they are the same in every layout and on every number of
ranks, and others in every epoch. Of a document with so few tokens that none would be chosen, one is.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from packtrain.objectives.causal import output_embeddings, sum_of_weights, supervised_index
from packtrain.objectives.objective import Loss, Objective, Prepared, Task, TokenLosses
from packtrain.recipe.fields import Number, Text

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from packtrain.data.examples import Examples

Share = Annotated[Number, Field(gt=0, lt=1), "a number above 0 and below 1"]


class MaskedLM(Objective):
    """Restores masked tokens."""

    auto_class: ClassVar[str] = "AutoModelForMaskedLM"
    keeps_examples: ClassVar[bool] = True

    name: Literal["masked_lm"] = "masked_lm"
    mask_token: Text | None = None
    """The mask. Default: the tokenizer's own, or a new token."""
    mlm_probability: Share = 0.15
    """Share of the tokens that are chosen to be restored."""

    def task(
        self,
        tokenizer: PreTrainedTokenizerBase,
        train: Examples,
        held_out: Examples | None,
        *,
        seed: int,
        layout: Literal["flat", "padded"] = "flat",
    ) -> Task:
        from packtrain.objectives.masking import MaskingCollator
        from packtrain.objectives.tail_tokens import find_mask_token, make_rows, trained_rows

        mask, fresh = find_mask_token(tokenizer, self.mask_token)

        def prepare(model: PreTrainedModel) -> Prepared:
            note = make_rows(model, tokenizer, fresh) if fresh else None
            return Prepared(trained_rows(model, fresh) | {"task_type": None}, note)

        return Task(
            tokenizer=tokenizer,
            train=train,
            held_out=held_out,
            loss=MASKED_LM,
            make_collator=partial(
                MaskingCollator,
                mask_token_id=mask,
                vocabulary=len(tokenizer),
                special_ids=tuple(tokenizer.all_special_ids),
                share=self.mlm_probability,
                seed=seed,
            ),
            prepare=prepare,
            new_tokens=fresh,
        )


def masked_lm_losses(
    model: torch.nn.Module, batch: Mapping[str, torch.Tensor], *, head: torch.nn.Module | None = None
) -> TokenLosses:
    """Scores every chosen token of a padded or flat batch at its own position.

    Args:
        model, head: see `packtrain.objectives.logits.logits_at`; the model attends both ways.
        batch: `labels` int64 `[B, T]`, -100 where a token was not chosen; `loss_weights` float32 `[B, T]`; the model's
            inputs; and `supervised_index`.
    """
    from packtrain.objectives.logits import token_losses

    index = supervised_index(batch)
    return token_losses(model, batch, index, index, head=head)


MASKED_LM = Loss(losses=masked_lm_losses, denominator=sum_of_weights, head=output_embeddings)
