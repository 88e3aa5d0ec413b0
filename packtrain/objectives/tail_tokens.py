"""Tokens for tails and masks: reserved ones of the vocabulary, or new ones with new rows.

    tokens = find_tail_tokens(tokenizer, kind="rainbow", count=7)      # before the data are read
    note = make_rows(model, tokenizer, tokens.fresh)                   # once the model is loaded
    lora |= trained_rows(model, tokens.fresh)                          # with LoRA: these rows train, in and out

A tail token is read and predicted, so both its input and its output row must learn. Under LoRA embeddings are frozen;
peft's `trainable_token_indices` trains single rows, of the embedding and, where that is a separate matrix, of the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from packtrain.errors import ModelError
from packtrain.objectives.masked_diffusion.tails import Kind, Tail

PAD_NAME, MASK_NAME = "<|tail_{}|>", "<|mask|>"
COUNTS = {"none": 0, "eos": 0, "single": 1, "void": 1}


@dataclass(frozen=True, kw_only=True)
class TailTokens:
    """The tokens that a tokenizer offers to a diffusion model.

    Attributes:
        tail: kind and token ids.
        mask_token_id: the mask.
        fresh: ids, ascending, whose rows no training has seen: pads, and a mask that had to be added.
    """

    tail: Tail
    mask_token_id: int
    fresh: tuple[int, ...]


def find_tail_tokens(
    tokenizer: PreTrainedTokenizerBase,
    *,
    kind: Kind,
    count: int = 7,
    reserved: Sequence[str] | None = None,
    mask_token: str | None = None,
) -> TailTokens:
    """Finds the eos, pads and mask of a tokenizer; adds to it what it lacks.

    Args:
        kind, count: of the tail; the count matters to `rainbow` and `random` only.
        reserved: unused tokens of the vocabulary to take for pads; None adds new ones.
        mask_token: the model's mask; None takes the tokenizer's own, or adds one.

    Raises:
        ModelError: no eos, or a named token that the tokenizer doesn't have.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no eos token to end answers with", key="model.tokenizer_name_or_path")
    count, size = COUNTS.get(kind, count), len(tokenizer)
    if reserved is None:
        names = [PAD_NAME.format(i) for i in range(count)]
        _add(tokenizer, names)
    else:
        names = list(reserved[:count])
        if len(names) < count:
            raise ModelError(
                f"a tail of kind {kind!r} needs {count} pad tokens", key="objective.pad_tokens", value=list(reserved)
            )
    pads = tuple(_id(tokenizer, name, "objective.pad_tokens") for name in names)
    mask, _ = find_mask_token(tokenizer, mask_token)
    if mask in (*pads, tokenizer.eos_token_id):
        named = mask_token or tokenizer.convert_ids_to_tokens(mask)
        raise ModelError("is also an end or a pad of the tail", key="objective.mask_token", value=named)
    tail = Tail(kind=kind, eos_token_id=tokenizer.eos_token_id, pad_token_ids=pads)
    return TailTokens(tail=tail, mask_token_id=mask, fresh=tuple(sorted({*pads, *([mask] if mask >= size else [])})))


def find_mask_token(tokenizer: PreTrainedTokenizerBase, mask_token: str | None = None) -> tuple[int, tuple[int, ...]]:
    """Returns the id of the mask, which is added where the tokenizer has none, and the ids that were added for it.

    Args:
        mask_token: the model's mask; None takes the tokenizer's own, or adds one.

    Raises:
        ModelError: a named token that the tokenizer doesn't have.
    """
    size = len(tokenizer)
    if mask_token is None:
        mask_token = tokenizer.mask_token or MASK_NAME
        _add(tokenizer, [mask_token])
    mask = _id(tokenizer, mask_token, "objective.mask_token")
    return mask, (mask,) if mask >= size else ()


def make_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, fresh: Sequence[int]) -> str:
    """Gives `fresh` tokens rows of the model: existing spare ones, or the embedding is enlarged. Says which.

    A fresh row begins as the mean of all rows and a hundredth of their spread, so that pads differ from the start
    and none is likelier than text (the idea of transformers' `resize_token_embeddings(mean_resizing=True)`).

    Raises:
        ModelError: ZeRO-3 has sharded the embedding, so that its rows are not here to be counted, averaged or set.
    """
    weight = model.get_input_embeddings().weight
    if hasattr(weight, "ds_id"):  # DeepSpeed's mark of a partitioned parameter
        what = f"{len(fresh)} new tokens need embeddings that start as the mean of all, and ZeRO-3 has sharded the embedding"
        fix = "use ZeRO-2, or a mask_token that the tokenizer has and a tail without its own pads (none, eos)"
        raise ModelError(what, key="objective.name", fix=fix)
    rows = weight.shape[0]
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        note = f"{len(fresh)}, for which the embedding grew from {rows:,} to {len(tokenizer):,} rows"
    else:
        note = f"{len(fresh)}, in rows that the embedding already had"
    head = model.get_output_embeddings()
    layers = [model.get_input_embeddings()] + ([head] if head is not None and not is_tied(model) else [])
    note += ", which the head shares" if is_tied(model) else ", and the head has its own matrix"
    if fresh:
        for layer in layers:
            _start_rows(layer, rows, list(fresh))
    return note


def trained_rows(model: PreTrainedModel, fresh: Sequence[int]) -> dict[str, object]:
    """Returns the `peft.LoraConfig` fields with which `fresh` rows train; {} without any."""
    if not fresh:
        return {}
    names = {id(module): name for name, module in model.named_modules()}
    layers = [names[id(model.get_input_embeddings())]]
    if not is_tied(model):
        layers.append(names[id(model.get_output_embeddings())])
    return {"trainable_token_indices": {layer: list(fresh) for layer in layers}}


def is_tied(model: PreTrainedModel) -> bool:
    """Returns whether input and output embeddings are one matrix."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _add(tokenizer: PreTrainedTokenizerBase, names: list[str]) -> None:
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)


def _id(tokenizer: PreTrainedTokenizerBase, name: str, key: str) -> int:
    token_id = tokenizer.get_vocab().get(name)
    if token_id is None:
        fix = "name a token of the vocabulary, or leave it out to add new ones"
        raise ModelError("is not a token of the tokenizer", key=key, value=name, fix=fix)
    return token_id


@torch.no_grad()
def _start_rows(layer: Any, known: int, fresh: list[int]) -> None:
    """Sets rows `fresh` of an embedding or a head from the first `known` rows that are not among them."""
    weight = layer.weight
    kept = torch.ones(known, dtype=torch.bool, device=weight.device)
    kept[[i for i in fresh if i < known]] = False
    old = weight[:known][kept].float()
    noise = torch.randn(len(fresh), weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.device)
    weight[fresh] = (old.mean(dim=0) + 0.01 * old.std(dim=0) * noise).to(weight.dtype)
    bias = getattr(layer, "bias", None)
    if bias is not None:
        bias[fresh] = bias[:known][kept].mean()
