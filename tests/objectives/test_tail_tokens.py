"""Tail tokens: reserved or new, and rows that train under LoRA."""

from __future__ import annotations

import pytest
import torch

from packtrain.errors import ModelError
from packtrain.modeling.attention.varlen import NAME, register
from packtrain.modeling.loading import add_lora
from packtrain.modeling.tokenizer import train_bpe
from packtrain.objectives.logits import output_head
from packtrain.objectives.masked_diffusion.loss import make_bidirectional, masked_diffusion
from packtrain.objectives.masked_diffusion.noise import Masking, NoisingCollator
from packtrain.objectives.tail_tokens import find_tail_tokens, is_tied, make_rows, trained_rows
from tests.tiny import tiny_model


@pytest.fixture
def tokenizer():
    return train_bpe(["one two three"], 270)


def test_new_tokens_get_new_ids(tokenizer):
    size = len(tokenizer)
    tokens = find_tail_tokens(tokenizer, kind="rainbow", count=3)
    assert tokens.tail.pad_token_ids == (size, size + 1, size + 2)
    assert tokens.mask_token_id == size + 3 and tokens.fresh == (size, size + 1, size + 2, size + 3)
    again = find_tail_tokens(tokenizer, kind="rainbow", count=3)
    assert again.tail == tokens.tail and len(tokenizer) == size + 4, "they are added once"
    assert tokenizer("<|tail_1|>")["input_ids"] == [size + 1]


def test_reserved_tokens_and_a_mask_the_model_knows(tokenizer):
    size = len(tokenizer)
    tokens = find_tail_tokens(
        tokenizer, kind="rainbow", count=2, reserved=["<|system|>", "<|user|>", "<|bos|>"], mask_token="<|pad|>"
    )
    assert tokens.tail.pad_token_ids == (3, 4) and tokens.mask_token_id == 0
    assert tokens.fresh == (3, 4) and len(tokenizer) == size


@pytest.mark.parametrize(
    "options",
    [
        dict(kind="rainbow", reserved=["<|user|>"], count=2),
        dict(kind="single", reserved=["<|nobody|>"]),
        dict(kind="void", reserved=[]),
        dict(kind="single", mask_token="<|nothing|>"),
        dict(kind="eos", mask_token="<|eos|>"),
    ],
)
def test_refusals(tokenizer, options):
    with pytest.raises(ModelError):
        find_tail_tokens(tokenizer, **options)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("vocab_size", [270, 300])
def test_rows_are_added_only_where_there_are_none(tokenizer, vocab_size, tied):
    model = tiny_model("llama", vocab_size=vocab_size, tie_word_embeddings=tied)
    before = model.get_input_embeddings().weight.detach().clone()
    size = len(tokenizer)
    tokens = find_tail_tokens(tokenizer, kind="rainbow", count=3)
    note = make_rows(model, tokenizer, tokens.fresh)
    weight = model.get_input_embeddings().weight
    assert len(weight) == max(vocab_size, len(tokenizer)) and ("grew" in note) == (len(tokenizer) > vocab_size)
    assert note.startswith(f"{len(tokens.fresh)}, ") and ("shares" in note) == tied
    assert torch.equal(weight[:size], before[:size])
    fresh = weight[list(tokens.fresh)]
    assert torch.pdist(fresh).min() > 0, "pads differ from the start"
    assert (fresh - weight[:size].mean(dim=0)).norm(dim=1).max() < 0.1 * weight[:size].norm(dim=1).mean()


def test_rows_of_a_sharded_embedding_are_refused(tokenizer):
    """ZeRO-3 leaves a weight of shape [0] and says in `ds_id` and `ds_shape` what it stands for."""
    model = tiny_model("llama", vocab_size=300)
    fresh = find_tail_tokens(tokenizer, kind="rainbow", count=3).fresh
    weight = model.get_input_embeddings().weight
    weight.ds_id, weight.ds_shape, weight.data = 0, weight.shape, torch.empty(0)
    with pytest.raises(ModelError, match="ZeRO-3") as refused:
        make_rows(model, tokenizer, fresh)
    assert "ZeRO-2" in refused.value.fix and model.config.vocab_size == 300


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [False, True])
def test_under_lora_both_rows_of_a_pad_train_and_others_do_not(tokenizer, family, tied):
    register()
    model = tiny_model(family, attn_implementation=NAME, vocab_size=270, tie_word_embeddings=tied)
    assert is_tied(model) == tied
    tokens = find_tail_tokens(tokenizer, kind="rainbow", count=3)
    make_rows(model, tokenizer, tokens.fresh)
    make_bidirectional(model)
    adapted = add_lora(model, {"r": 4, "target_modules": "all-linear"} | trained_rows(model, tokens.fresh))
    eos, pads = tokens.tail.eos_token_id, tokens.tail.pad_token_ids
    collator = NoisingCollator(Masking(mask_token_id=tokens.mask_token_id), tokens.tail, seed=1, layout="flat")
    ids = [10, 11, 12, 13, eos, *pads, *pads, *pads]
    batch = collator([{"input_ids": ids, "labels": [-100, -100, *ids[2:]], "example_id": 0}])
    probe = torch.tensor([[20, pads[0], 21, pads[1]]])
    before = adapted(probe).logits.detach().clone()
    rows = lambda: adapted.get_input_embeddings()(torch.arange(len(tokenizer))).detach().clone()  # noqa: E731
    inputs = rows()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    losses = masked_diffusion(collator.masking).losses(adapted, batch, head=output_head(model))
    losses.weighted_sum().backward()
    optimizer.step()
    moved = (rows() - inputs).abs().amax(dim=1) > 0
    assert moved[list(pads)].any() and not moved[[i for i in range(len(tokenizer)) if i not in tokens.fresh]].any()
    head = output_head(model)
    hidden = torch.eye(32)[None]
    columns = head(hidden).detach()[0].T  # [V, 32]: the head's rows as they act
    frozen = head.original_module.weight if hasattr(head, "original_module") else model.get_output_embeddings().weight
    changed = (columns - frozen.detach()).abs().amax(dim=1) > 1e-7
    assert changed[list(pads)].all() and not changed[: min(pads)].any()
    assert not torch.allclose(adapted(probe).logits, before)
