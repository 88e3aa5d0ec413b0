"""What objectives that learn from answers have in common: their rules, and the shared prefix. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from packtrain.data.formats import Kind
from packtrain.objectives.objective import Objective, keeps_documents_whole
from packtrain.recipe.fields import Flag
from packtrain.recipe.sections import Settings, Verdicts

if TYPE_CHECKING:
    from packtrain.packing.strategies import Strategy

_ATTENTION = ("auto", "packtrain_varlen")


def _documents_are_whole(settings: Settings, strategy: Strategy) -> Verdicts:
    if settings["data.overflow"] in ("truncate", "split"):
        fix = "drop long rows (`overflow: drop`), or raise `data.max_length`, which counts all documents of a row"
        yield "data.overflow", "cuts documents, and the answers to a prompt are needed whole", fix
    if settings["batching.shapes"] is not None:
        what = "pads with single documents, and this objective takes the answers to a prompt together"
        yield "batching.shapes", what, "leave it out"
    if strategy.padded_to == "max_length":
        what = "pads every row to `data.max_length`, which is that of all documents of an example"
        yield "batching.strategy", what, "choose pad_longest, or a flat strategy such as balanced"


def _answers_are_whole(settings: Settings, strategy: Strategy) -> Verdicts:
    if settings["data.completion_only_loss"] is False:
        yield (
            "data.completion_only_loss",
            "has no effect: answers are learnt from, and not their prompt",
            "leave it out",
        )
    if settings["data.assistant_only_loss"]:
        what = "has no effect: whole answers are learnt from"
        yield "data.assistant_only_loss", what, "leave it out"


def _prefix_is_shared(settings: Settings, strategy: Strategy) -> Verdicts:
    if not settings["objective.shared_prefix"]:
        return
    key = "objective.shared_prefix"
    if strategy.layout != "flat":
        fix = "choose a flat strategy, such as balanced, or leave it out"
        yield key, "needs a flat layout: a padded row holds one document with its prompt", fix
    if settings["model.attn_implementation"] not in _ATTENTION:
        what = "needs `packtrain_varlen`, which knows of prompts that documents share"
        yield "model.attn_implementation", what, "leave it auto"
    if settings.get("training.torch_compile"):
        yield key, "cannot be compiled", "leave out `training.torch_compile`, or this"


class AnswersObjective(Objective):
    """Learns from the answers of a row: as many documents to an example."""

    completions_only: ClassVar[bool] = True
    keeps_examples: ClassVar[bool] = False
    rules = (keeps_documents_whole, _documents_are_whole, _answers_are_whole, _prefix_is_shared)

    shared_prefix: Flag = False
    """Computes once what the prompts of a row's answers share; the same losses. For flat strategies."""


class PairObjective(AnswersObjective):
    """Learns from pairs of answers to one prompt."""

    row_kind: ClassVar[Kind] = "pair"
