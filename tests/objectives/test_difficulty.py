"""Nll and EL2N of tokens are those of a literal softmax in float64, in chunks too; and their logits never exist whole."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import one_hot

from packtrain.objectives import chunks
from packtrain.objectives.difficulty import difficulty, token_difficulty
from tests.objectives.test_chunks import MODELS, ROWS, WHOLE, Largest, add_to_logits, batch_of
from tests.tiny import VOCABULARY, tiny_model


def literal(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of logits `[N, V]`, as the paper writes it."""
    p = logits.double().softmax(-1)
    return -p.gather(1, targets[:, None])[:, 0].log(), (p - one_hot(targets, p.shape[-1])).norm(dim=1)


def expected(model, batch) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    supervised = batch["labels"][:, 1:] != -100
    return literal(logits[:, :-1][supervised], batch["labels"][:, 1:][supervised])


@pytest.mark.parametrize("size", [WHOLE, 4 * VOCABULARY * ROWS], ids=["whole", "chunks"])
@pytest.mark.parametrize("name", ["llama", "bias", "softcap", "scaled up", "adapter on the head"])
def test_they_are_those_of_a_literal_softmax(monkeypatch, name, size):
    """Control: with the next token as the target they are others."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", size)
    model, batch = MODELS[name](), batch_of(5, 17, 9, 30)
    for found, exact in zip(token_difficulty(model, batch), expected(model, batch), strict=True):
        assert not found.requires_grad
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
    batch["labels"] = torch.where(batch["labels"] == -100, -100, (batch["labels"] + 1) % VOCABULARY)
    assert (token_difficulty(model, batch)[0] - found).abs().max() > 1e-2


def test_what_is_no_scale_or_cap_is_computed_from_whole_logits(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 4 * VOCABULARY * ROWS)
    model, batch = add_to_logits(tiny_model("llama")), batch_of(30, 12)
    for found, exact in zip(token_difficulty(model, batch), expected(model, batch), strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


def test_logits_never_exist_at_once(monkeypatch):
    model, batch = tiny_model("llama"), batch_of(*[60] * 8)
    count = int((batch["labels"] != -100).sum())
    with Largest() as whole:
        token_difficulty(model, batch)
    assert whole.elements == count * VOCABULARY  # control
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 4 * VOCABULARY * ROWS)
    token_difficulty(model, batch)  # looks at the head
    with Largest() as chunked:
        token_difficulty(model, batch)
    assert chunked.elements < count * VOCABULARY


@pytest.mark.parametrize("margin", [0.0, 15.0, 40.0, 200.0])
def test_sure_predictions_keep_their_digits(margin):
    """Right or wrong by any margin. 1 - p in float32 would be 0 at a margin of 17."""
    logits = torch.zeros(2, 5)
    logits[:, 2] = margin
    targets = torch.tensor([2, 0])
    found = difficulty(logits.clone(), targets).double()
    nll, el2n = literal(logits, targets)
    other = math.exp(-margin) / (1 + 4 * math.exp(-margin))  # p of each of the other four
    el2n[0] = math.sqrt(16 + 4) * other  # where float64 loses digits too
    torch.testing.assert_close(found[:, 1], el2n, rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(found[:, 0], nll, rtol=1e-6, atol=1e-6)
    if 17 < margin < 80:
        assert found[0, 1] > 0 and 1 - logits.softmax(-1)[0, 2] == 0  # control
