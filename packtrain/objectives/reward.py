"""Reward models: one number for a text, larger for the answer that people prefer (Bradley and Terry).

    loss = 1/pairs * sum over pairs of  -log sigmoid(reward of chosen - reward of rejected)

as TRL's `RewardTrainer` has it. The reward is read off the last token of each document, as transformers' classifiers with
one label do, in every layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from packtrain.objectives.answers_objective import PairObjective
from packtrain.objectives.objective import Loss, Prepared, Task
from packtrain.recipe.fields import Number

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from packtrain.data.examples import Examples
    from packtrain.objectives.pairs import PairLosses


class Reward(PairObjective):
    """Learns a reward from pairs of answers."""

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    new_weights: ClassVar[tuple[str, ...]] = ("score.",)

    name: Literal["reward"] = "reward"
    center_rewards_coefficient: Annotated[Number, Field(ge=0), "a number from 0 on"] = 0.0
    """Weight of the squared sum of both rewards, which keeps them around 0 (Eisenstein et al., arXiv:2312.09244)."""

    def logits(self, config: PreTrainedConfig) -> int:
        return 1

    def task(
        self,
        tokenizer: PreTrainedTokenizerBase,
        train: Examples,
        held_out: Examples | None,
        *,
        seed: int,
        layout: Literal["flat", "padded"] = "flat",
    ) -> Task:
        from packtrain.objectives.pairs import PairCollator, PairExamples, count_pairs, sums_over_pairs
        from packtrain.objectives.sequence_classification import classification_head
        from packtrain.objectives.shared_prefix import check_shared_prefix

        pairs = partial(PairExamples, layout=layout, shared=self.shared_prefix)

        def prepare(model: PreTrainedModel) -> Prepared:
            # by which transformers finds the last token of a padded row
            model.config.pad_token_id = tokenizer.pad_token_id
            return Prepared({"task_type": "SEQ_CLS"})

        def sums(found: PairLosses, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
            chosen, rejected = found.scores.unbind(dim=1)
            figures = {"accuracy": (chosen > rejected).float(), "margin": chosen - rejected}
            return sums_over_pairs(figures | {"mean_reward": found.scores.mean(dim=1)})

        return Task(
            tokenizer=tokenizer,
            train=pairs(train),
            held_out=None if held_out is None else pairs(held_out),
            loss=Loss(
                losses=partial(reward_losses, center=self.center_rewards_coefficient),
                denominator=count_pairs,
                head=classification_head,
                sums=sums,
            ),
            make_collator=partial(PairCollator, shared=self.shared_prefix, last_only=True),
            prepare=prepare,
            begin=check_shared_prefix,
            config_fields={"num_labels": 1},
        )


def reward_losses(
    model: torch.nn.Module,
    batch: Mapping[str, Any],
    *,
    head: torch.nn.Module | None = None,
    center: float = 0.0,
) -> PairLosses:
    """Scores every pair of a batch of a `PairCollator` that supervises last tokens.

    Args:
        model: a classifier of transformers with one label, whose head reads every token, bare or wrapped.
        head: see `packtrain.objectives.sequence_classification.classification_head`; by default that of `model`.
        center: weight of the squared sum of both rewards.
    """
    import torch
    from torch.nn.functional import logsigmoid

    from packtrain.objectives.logits import head_outputs_at
    from packtrain.objectives.pairs import PairLosses
    from packtrain.objectives.sequence_classification import classification_head

    index = batch["supervised_index"]  # [2 P]: chosen, rejected, chosen ...
    rewards = head_outputs_at(model, batch, index, head=head or classification_head(model)).float().view(-1, 2)
    chosen, rejected = rewards.unbind(dim=1)
    losses = -logsigmoid(chosen - rejected)
    if center:
        losses = losses + center * (chosen + rejected) ** 2
    return PairLosses(
        nll=losses, weights=torch.ones_like(losses), index=batch["pairs"]["last"], scores=rewards.detach()
    )
