"""Preference: direct preference optimisation (DPO, Rafailov et al., arXiv:2305.18290) and losses of its kind.

    loss = 1/pairs * sum over pairs of  f(log-ratio of chosen, log-ratio of rejected)

A log-ratio is the log-probability of an answer less that under the reference model, the one that training begins with.
That is computed once, before the first step, and kept in the cache (see `reference`); the losses are in `loss`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from packtrain.objectives.answers_objective import PairObjective
from packtrain.objectives.objective import Task
from packtrain.recipe.fields import Number, Weight
from packtrain.recipe.sections import Settings, Verdicts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from packtrain.data.examples import Examples
    from packtrain.packing.strategies import Strategy

LossType = Literal[
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard",
    "apo_zero", "apo_down",
]  # fmt: skip
Smoothing = Annotated[Number, Field(ge=0, lt=0.5), "a number from 0 to below 0.5"]


def _smoothing_has_an_effect(settings: Settings, strategy: Strategy) -> Verdicts:
    kind, smoothing = settings["objective.loss_type"], settings["objective.label_smoothing"]
    key = "objective.label_smoothing"
    if smoothing and kind not in ("robust", "exo_pair"):
        yield key, f"has no effect on the loss `{kind}`", "leave it out, or choose `loss_type: robust`"
    if not smoothing and kind == "exo_pair":
        yield key, "must be above 0 for the loss `exo_pair`, which takes its logarithm", "set it, for example to 1e-3"


class Preference(PairObjective):
    """Prefers one of two answers, next to a frozen reference (DPO)."""

    predicts_next: ClassVar[bool] = True
    rules = (*PairObjective.rules, _smoothing_has_an_effect)

    name: Literal["preference"] = "preference"
    loss_type: LossType = "sigmoid"
    """What is done with the margin of a pair, by the names of TRL; sigmoid is DPO's own."""
    beta: Weight = 0.1
    """How strongly the model is kept to the reference."""
    label_smoothing: Smoothing = 0.0
    """Share of pairs that may be the wrong way round, for robust and exo_pair."""

    def task(
        self,
        tokenizer: PreTrainedTokenizerBase,
        train: Examples,
        held_out: Examples | None,
        *,
        seed: int,
        layout: Literal["flat", "padded"] = "flat",
    ) -> Task:
        from packtrain.objectives.pairs import PairCollator, PairExamples
        from packtrain.objectives.preference.loss import preference_loss
        from packtrain.objectives.preference.reference import begin

        pairs = partial(PairExamples, layout=layout, shared=self.shared_prefix)
        return Task(
            tokenizer=tokenizer,
            train=pairs(train),
            held_out=None if held_out is None else pairs(held_out),
            loss=preference_loss(self.loss_type, beta=self.beta, label_smoothing=self.label_smoothing),
            make_collator=partial(PairCollator, shared=self.shared_prefix),
            begin=begin,
        )
