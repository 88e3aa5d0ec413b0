"""Positions of packed documents begin where the model itself begins."""

from __future__ import annotations

import pytest
import torch

from packtrain.errors import ModelError
from packtrain.modeling.audit.models import tiny_model
from packtrain.modeling.positions import check_positions, position_start


@pytest.mark.parametrize(
    ("architecture", "fields", "start"),
    [
        ("llama", {}, 0),
        ("gpt2", {}, 0),
        ("mamba", {}, 0),
        ("bert", {}, 0),
        ("opt", {}, 0),  # shifts positions by itself
        ("roberta", {"pad_token_id": 0}, 1),
        ("roberta", {"pad_token_id": 1}, 2),
        ("xlm-roberta", {"pad_token_id": 5}, 6),
        ("mpnet", {"pad_token_id": 1}, 2),
        ("esm", {"pad_token_id": 1, "position_embedding_type": "absolute"}, 2),
        ("nystromformer", {}, 2),  # without a padding row
        ("yoso", {}, 2),
    ],
)
def test_positions_from_the_start_change_nothing_and_others_do(architecture, fields, start):
    model = tiny_model(architecture, **fields)
    assert position_start(model) == start
    document = torch.arange(10, 19)[None]
    if architecture == "mamba":  # has no positions to tell
        return
    with torch.no_grad():
        alone = model(input_ids=document)[0]
        told = model(input_ids=document, position_ids=torch.arange(9)[None] + start)[0]
        torch.testing.assert_close(told, alone)
        if architecture in (
            "bert",
            "gpt2",
            "roberta",
            "xlm-roberta",
            "mpnet",
            "esm",
        ):  # control, for absolute positions
            shifted = model(input_ids=document, position_ids=torch.arange(9)[None] + start + 1)[0]
            assert (shifted - alone).abs().max() > 1e-3


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "bert", "roberta"])
def test_a_document_beyond_the_learnt_positions_is_refused(architecture):
    """The longest that is let through runs, and one token more does not."""
    model = tiny_model(architecture)
    most = next(longest for longest in range(model.config.max_position_embeddings, 0, -1) if fits(model, longest))
    ids = torch.full((1, most), 5)
    model(input_ids=ids, attention_mask=torch.ones_like(ids))
    with pytest.raises(ModelError, match=f"and the model {most:,} positions"):
        check_positions(model, most + 1)
    with pytest.raises((IndexError, RuntimeError)):
        ids = torch.full((1, most + 1), 5)
        model(input_ids=ids, attention_mask=torch.ones_like(ids))


def fits(model, longest: int) -> bool:
    try:
        return check_positions(model, longest) is None
    except ModelError:
        return False


def test_a_document_beyond_rotary_positions_is_said():
    model = tiny_model("llama")
    most = model.config.max_position_embeddings
    assert check_positions(model, most) is None
    assert f"made for {most:,} positions" in check_positions(model, most + 1)
