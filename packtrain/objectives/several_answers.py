"""Supervised fine-tuning on several answers: an example of as many documents, and what their prompts share once.

    row        {"prompt": "2+2?", "completions": ["4", "four", "It is 4."]}         answers to one prompt
    row        {"messages": [user, assistant, user, assistant]}                     turns, after all that was said before

The loss is that of `causal_lm` on the rows written out, an answer with its prompt in each, in every layout. What is planned,
balanced, weighted and resumed is a row with all its answers, so an update has `examples_per_step` rows.

A turn's prompt is what the model will be prompted with. Many templates render earlier turns otherwise than the last, such
as without their reasoning; a conversation as one document (`causal_lm` on `messages`) would never teach that.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from packtrain.data.formats import Kind
from packtrain.objectives.answers_objective import AnswersObjective
from packtrain.objectives.causal import CAUSAL_LM
from packtrain.objectives.objective import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from packtrain.data.examples import Examples


class SeveralAnswers(AnswersObjective):
    """Predicts the next token of several answers to one prompt, or of every turn of a conversation."""

    predicts_next: ClassVar[bool] = True
    row_kind: ClassVar[Kind] = "answers"
    weighing: ClassVar[tuple[str, ...]] = ("loss_weighting",)

    name: Literal["several_answers"] = "several_answers"
    loss_weighting: Literal["token", "example"] = "token"
    """What is weighted equally: every supervised token, or every row with all its answers."""

    def task(
        self,
        tokenizer: PreTrainedTokenizerBase,
        train: Examples,
        held_out: Examples | None,
        *,
        seed: int,
        layout: Literal["flat", "padded"] = "flat",
    ) -> Task:
        from packtrain.objectives.groups import GroupCollator, GroupExamples
        from packtrain.objectives.shared_prefix import check_shared_prefix

        groups = partial(GroupExamples, layout=layout, shared=self.shared_prefix)

        return Task(
            tokenizer=tokenizer,
            train=groups(train),
            held_out=None if held_out is None else groups(held_out),
            loss=CAUSAL_LM,
            make_collator=partial(GroupCollator, shared=self.shared_prefix, loss_weighting=self.loss_weighting),
            begin=check_shared_prefix,
        )
