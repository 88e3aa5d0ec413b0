"""Block diffusion: autoregressive over blocks, diffusion within them (Fast-dLLM v2, Wu et al., arXiv:2509.26328)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from packtrain.objectives.objective import Objective, Prepared, Task, keeps_documents_whole
from packtrain.recipe.fields import Positive, Text
from packtrain.recipe.sections import Settings, Verdicts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from packtrain.data.examples import Examples
    from packtrain.packing.collator import PackCollator
    from packtrain.packing.strategies import Strategy


def _whole_blocks(settings: Settings, strategy: Strategy) -> Verdicts:
    if settings["batching.shapes"] is not None:
        yield (
            "batching.shapes",
            "pads with documents of any length, and `block_diffusion` needs whole blocks",
            "leave it out",
        )


class BlockDiffusion(Objective):
    """Restores masked blocks from the text before them."""

    completions_only: ClassVar[bool] = True
    keeps_examples: ClassVar[bool] = False
    brings_attention: ClassVar[bool] = True
    rules = (keeps_documents_whole, _whole_blocks)

    name: Literal["block_diffusion"] = "block_diffusion"
    mask_token: Text | None = None
    """The mask. Default: the tokenizer's own, or a new token."""
    block_size: Positive = 32
    """Tokens of a block."""

    def task(
        self,
        tokenizer: PreTrainedTokenizerBase,
        train: Examples,
        held_out: Examples | None,
        *,
        seed: int,
        layout: Literal["flat", "padded"] = "flat",
    ) -> Task:
        from packtrain.objectives.block_diffusion.blocks import (
            BLOCK_DIFFUSION,
            BlockCollator,
            ViewedExamples,
            register,
        )
        from packtrain.objectives.tail_tokens import find_tail_tokens, make_rows, trained_rows

        tokens = find_tail_tokens(tokenizer, kind="none", mask_token=self.mask_token)
        views = partial(ViewedExamples, fill_token_id=tokens.mask_token_id, block_size=self.block_size)

        def make_collator(*, layout: str, **_: object) -> PackCollator:
            return BlockCollator(tokens.mask_token_id, block_size=self.block_size, seed=seed, layout=layout)

        def prepare(model: PreTrainedModel) -> Prepared:
            note = make_rows(model, tokenizer, tokens.fresh) if tokens.fresh else None
            model.set_attn_implementation(register(self.block_size))
            return Prepared(trained_rows(model, tokens.fresh), note)

        return Task(
            tokenizer=tokenizer,
            train=views(train),
            held_out=None if held_out is None else views(held_out),
            loss=BLOCK_DIFFUSION,
            make_collator=make_collator,
            prepare=prepare,
            new_tokens=tokens.fresh,
            tokens=tokens,
        )
