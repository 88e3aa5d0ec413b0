"""Positions of packed documents begin where the model itself begins."""

from __future__ import annotations

import pytest
import torch

from packtrain.modeling.audit.models import tiny_model
from packtrain.modeling.positions import position_start


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
        ("esm", {"pad_token_id": 1}, 2),
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
