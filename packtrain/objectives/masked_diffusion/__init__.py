"""Masked diffusion: restore masked answers (LLaDA, Nie et al., arXiv:2502.09992), with a tail behind each.

The modules of this folder:

    tails       what stands behind an answer, and how much room it gets
    noise       masks, drawn where batches are made
    loss        the weighted cross-entropy of masked tokens
    sampling    from masks to an answer
    generation  a model's own answers
    answers     `packtrain sample`, `packtrain evaluate`
    evaluation  what `evaluate` measures, and pictures, which draws it
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from packtrain.objectives.objective import Objective, Prepared, Task, keeps_documents_whole
from packtrain.recipe.fields import Flag, Positive, Text
from packtrain.recipe.sections import Settings, Verdicts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from packtrain.data.examples import Examples
    from packtrain.packing.strategies import Strategy


def _tail_has_a_canvas(settings: Settings, strategy: Strategy) -> Verdicts:
    tail, canvas, size = (settings[f"objective.{leaf}"] for leaf in ("tail", "canvas", "canvas_size"))
    if (tail == "none") != (canvas is None):
        fix = "choose `batch_max`, `fixed`, `multiple_of` or `sampled` for every tail but `none`"
        yield "objective.canvas", f"does not go with the tail `{tail}`", fix
    elif (size is None) != (canvas in (None, "batch_max")):
        yield (
            "objective.canvas_size",
            f"does not go with the canvas `{canvas}`",
            "give a number of tokens for every canvas but `batch_max`, and none for that one",
        )
    if settings["data.overflow"] in ("truncate", "split"):
        fix = "drop long rows (`overflow: drop`), or raise `data.max_length`"
        yield "data.overflow", "cuts answers, and a truncated answer has no end to learn", fix


def _remote_code_sees_no_padding(settings: Settings, strategy: Strategy) -> Verdicts:
    if not settings["model.trust_remote_code"]:
        return
    if settings["objective.canvas"] != "batch_max" or strategy.padded_to != "longest":
        what = "lays out padding or several documents in a row, which models like LLaDA and Dream cannot separate"
        fix = "use `objective.canvas: batch_max` with a strategy that pads to the longest document, such as group_by_length"
        yield "batching.strategy", what, fix


class MaskedDiffusion(Objective):
    """Restores masked answers."""

    completions_only: ClassVar[bool] = True
    keeps_examples: ClassVar[bool] = False
    answers: ClassVar[bool] = True
    weighing: ClassVar[tuple[str, ...]] = ("weight", "norm")
    rules = (keeps_documents_whole, _tail_has_a_canvas, _remote_code_sees_no_padding)

    name: Literal["masked_diffusion"] = "masked_diffusion"
    weight: Literal["1/p", "none"] = "1/p"
    """Weight of a masked token's loss; p is the share that is masked (LLaDA: 1/p)."""
    norm: Literal["sequence", "token"] = "sequence"
    """What a mean is taken over: the canvas of each document, or all tokens (LLaDA: sequence)."""
    shift: Flag = False
    """Logits predict the next token (Dream)."""
    mask_token: Text | None = None
    """The mask. Default: the tokenizer's own, or a new token."""
    tail: Literal["none", "eos", "single", "rainbow", "random", "void"] = "none"
    """Supervised padding that belongs to an answer."""
    pad_count: Positive = 7
    """Padding tokens of rainbow and random tails."""
    pad_tokens: list[Text] | None = None
    """Reserved tokens of the vocabulary for the tail. Default: new tokens."""
    canvas: Literal["batch_max", "fixed", "multiple_of", "sampled"] | None = None
    """Room for answer, end and tail."""
    canvas_size: Positive | None = None
    """Tokens of the canvas; for all but batch_max."""

    @property
    def equal_lengths(self) -> bool:
        return self.canvas == "batch_max"

    def task(
        self,
        tokenizer: PreTrainedTokenizerBase,
        train: Examples,
        held_out: Examples | None,
        *,
        seed: int,
        layout: Literal["flat", "padded"] = "flat",
    ) -> Task:
        from packtrain.objectives.masked_diffusion.loss import make_bidirectional, masked_diffusion
        from packtrain.objectives.masked_diffusion.noise import Masking, NoisingCollator
        from packtrain.objectives.masked_diffusion.tails import Canvas, TailedExamples
        from packtrain.objectives.tail_tokens import find_tail_tokens, make_rows, trained_rows

        tokens = find_tail_tokens(
            tokenizer, kind=self.tail, count=self.pad_count, reserved=self.pad_tokens, mask_token=self.mask_token
        )
        canvas = None if self.canvas is None else Canvas(policy=self.canvas, size=self.canvas_size)
        tailed = partial(TailedExamples, tail=tokens.tail, canvas=canvas, seed=seed)
        masking = Masking(mask_token_id=tokens.mask_token_id, weight=self.weight, norm=self.norm, shift=self.shift)

        def prepare(model: PreTrainedModel) -> Prepared:
            note = make_rows(model, tokenizer, tokens.fresh) if tokens.fresh else None
            make_bidirectional(model)
            return Prepared(trained_rows(model, tokens.fresh), note)

        return Task(
            tokenizer=tokenizer,
            train=tailed(train),
            held_out=None if held_out is None else tailed(held_out),
            loss=masked_diffusion(masking),
            make_collator=partial(NoisingCollator, masking, tokens.tail, seed=seed),
            prepare=prepare,
            new_tokens=tokens.fresh,
            tokens=tokens,
        )
