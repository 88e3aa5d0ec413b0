"""DDP looks for parameters without a gradient only in models that may leave some out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, BertForTokenClassification

from packtrain.training.unused_parameters import uses_every_parameter
from tests.tiny import CONFIGS, tiny_model


class Experts(nn.Module):
    """A mixture of experts that are modules: a token goes through one of two."""

    def __init__(self, size: int):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(size, size) for _ in range(2))

    def forward(self, hidden):  # [B, T, D]
        chosen = (hidden.sum(dim=-1) > 0).long()  # [B, T]
        out = torch.zeros_like(hidden)
        for number in chosen.unique().tolist():
            out[chosen == number] = self.experts[number](hidden[chosen == number])
        return out


@pytest.mark.parametrize("family", CONFIGS)
def test_a_dense_model_uses_all_its_parameters(family):
    model = tiny_model(family)
    assert uses_every_parameter(model) and not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_adapter_counts_only_what_it_trains():
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules="all-linear"))
    assert uses_every_parameter(model.train()) and model.training
    unused = nn.Linear(2, 2)
    model.add_module("unused", unused)
    assert not uses_every_parameter(model)
    unused.requires_grad_(False)
    assert uses_every_parameter(model)


def test_experts_that_are_modules_may_be_left_out():
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp = Experts(model.config.hidden_size)
    assert not uses_every_parameter(model)


def test_a_pooler_that_no_loss_sees_is_found():
    small: dict[str, Any] = dict(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = BertForTokenClassification(BertConfig(**small))
    assert uses_every_parameter(model)
    pooled = AutoModelForSequenceClassification.from_config(BertConfig(**small))
    assert uses_every_parameter(pooled)
    pooled.bert.pooler, pooled.forgotten = nn.Identity(), pooled.bert.pooler
    assert not uses_every_parameter(pooled)


def test_weights_elsewhere_can_not_be_asked():
    with torch.device("meta"):
        model = tiny_model("llama")
    assert not uses_every_parameter(model)
