"""The `objective:` section of a recipe -> what a run needs for it: examples, collator, loss, and a model made ready.

chosen = choose_objective(**recipe.objective.model_dump(), tokenizer=tokenizer, train=train, held_out=None, seed=42)
plan = make_plan(chosen.train.lengths, equal_lengths=canvas == "batch_max", ...)
prepared = chosen.prepare(model, tokenizer)                            # prepared.note says what became of new tokens
lora = prepared.lora | lora
PackTrainer(model, ..., train_examples=chosen.train, collator=chosen.collator(layout=..., pad_token_id=...),
            objective=chosen.objective)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from packtrain.data.examples import Examples
from packtrain.data.tails import Canvas, TailedExamples
from packtrain.data.views import ViewedExamples
from packtrain.errors import PacktrainError
from packtrain.modeling.tail_tokens import TailTokens, find_tail_tokens, make_rows, trained_rows
from packtrain.objectives import block_diffusion
from packtrain.objectives.causal import CAUSAL_LM
from packtrain.objectives.diffusion import make_bidirectional, masked_diffusion
from packtrain.objectives.noise import Masking, NoisingCollator
from packtrain.objectives.objective import Objective
from packtrain.packing.collator import PackCollator

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Prepared(NamedTuple):
    """`peft.LoraConfig` fields with which new tokens learn under LoRA, and which rows new tokens got, in words."""

    lora: dict[str, object]
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """An objective and what it makes of data and model.

    Attributes:
        objective: the loss.
        train, held_out: the examples as the plan and the collator see them.
        collator: makes the collator from the layout's arguments (`layout`, `pad_token_id`, `padded_to`, `max_length`).
        prepare: `(model, tokenizer) -> Prepared`: changes the loaded model in place.
        tokens: eos, pads and mask; None for the causal objective.
    """

    objective: Objective
    train: Examples | TailedExamples | ViewedExamples
    held_out: Examples | TailedExamples | ViewedExamples | None
    collator: Callable[..., PackCollator]
    prepare: Callable[[PreTrainedModel, PreTrainedTokenizerBase], Prepared]
    tokens: TailTokens | None = None

    @property
    def new_tokens(self) -> tuple[int, ...]:
        """Ids for which `prepare` makes rows."""
        return () if self.tokens is None else self.tokens.fresh


def choose_objective(
    *,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    train: Examples,
    held_out: Examples | None,
    seed: int,
    loss_weighting: str = "token",
    weight: str = "1/p",
    norm: str = "sequence",
    shift: bool = False,
    tail: str = "none",
    pad_count: int = 7,
    pad_tokens: Sequence[str] | None = None,
    mask_token: str | None = None,
    canvas: str | None = None,
    canvas_size: int | None = None,
    block_size: int = 32,
) -> Chosen:
    """Choose by `name`; the keys of the other objectives are not looked at. The tokenizer may gain tokens.

    Args:
        name: `causal_lm`, `masked_diffusion` or `block_diffusion`.
        train, held_out: the recipe's examples.
        seed: of masks, random tails and sampled canvases.
        loss_weighting: of `causal_lm`, see `packtrain.packing.collator`.
        weight, norm, shift: of `masked_diffusion`, see `packtrain.objectives.noise`.
        tail, pad_count, pad_tokens, mask_token: see `packtrain.modeling.tail_tokens`.
        canvas, canvas_size: see `packtrain.data.tails`.
        block_size: of `block_diffusion`.

    Raises:
        PacktrainError: settings that don't go together, or examples that don't fit them.
    """
    if name == "causal_lm":
        collator = partial(PackCollator, loss_weighting=loss_weighting)
        return Chosen(
            objective=CAUSAL_LM,
            train=train,
            held_out=held_out,
            collator=collator,
            prepare=lambda model, tokenizer: Prepared({}),
        )
    kind = tail if name == "masked_diffusion" else "none"
    tokens = find_tail_tokens(tokenizer, kind=kind, count=pad_count, reserved=pad_tokens, mask_token=mask_token)
    if name == "block_diffusion":
        return _blocks(tokens, train, held_out, block_size=block_size, seed=seed)
    if name != "masked_diffusion":
        raise PacktrainError("is no objective", key="objective.name", value=name)
    room = None if canvas is None else Canvas(policy=canvas, size=canvas_size)
    masking = Masking(mask_token_id=tokens.mask_token_id, weight=weight, norm=norm, shift=shift)

    def prepare(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Prepared:
        note = make_rows(model, tokenizer, tokens.fresh) if tokens.fresh else None
        make_bidirectional(model)
        return Prepared(trained_rows(model, tokens.fresh), note)

    return Chosen(
        objective=masked_diffusion(masking),
        train=TailedExamples(train, tokens.tail, room, seed=seed),
        held_out=None if held_out is None else TailedExamples(held_out, tokens.tail, room, seed=seed),
        collator=partial(NoisingCollator, masking, tokens.tail, seed=seed),
        prepare=prepare,
        tokens=tokens,
    )


def _blocks(tokens: TailTokens, train: Examples, held_out: Examples | None, *, block_size: int, seed: int) -> Chosen:
    views = partial(ViewedExamples, fill_token_id=tokens.mask_token_id, block_size=block_size)

    def collator(*, layout: str, **_: object) -> block_diffusion.BlockCollator:
        return block_diffusion.BlockCollator(tokens.mask_token_id, block_size=block_size, seed=seed, layout=layout)

    def prepare(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Prepared:
        note = make_rows(model, tokenizer, tokens.fresh) if tokens.fresh else None
        model.set_attn_implementation(block_diffusion.register(block_size))
        return Prepared(trained_rows(model, tokens.fresh), note)

    return Chosen(
        objective=block_diffusion.BLOCK_DIFFUSION,
        train=views(train),
        held_out=None if held_out is None else views(held_out),
        collator=collator,
        prepare=prepare,
        tokens=tokens,
    )
