"""A router loss is refused, as no objective here has it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from packtrain.errors import ModelError
from packtrain.modeling.audit.audit import tiny_model
from packtrain.modeling.loading import load_config, load_model, refuse_router_loss
from packtrain.objectives.causal import causal_lm_losses
from packtrain.recipe.sections import ModelSection
from tests.objectives.test_causal import padded_batch
from tests.tiny import random_documents

EXPERTS = {
    "model_type": "mixtral",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 2,
}


def load(**changes):
    section = ModelSection(config=EXPERTS | changes)
    return load_model(section, load_config(section), attn_implementation="sdpa")


def test_a_model_that_adds_a_router_loss_is_not_loaded():
    with pytest.raises(ModelError, match="model.config.output_router_logits") as refused:
        load(output_router_logits=True)
    assert "False" in refused.value.fix
    load(output_router_logits=True, router_aux_loss_coef=0.0)
    load(output_router_logits=False, router_aux_loss_coef=0.5)


def test_the_loss_without_it_is_the_models_own():
    """And with it is not: what is refused is something that would be missing."""
    batch = padded_batch(random_documents([5, 17, 9]))
    model = tiny_model("mixtral", vocab_size=64)
    own = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
    ours = causal_lm_losses(model, batch).weighted_sum() / batch["loss_weights"].sum()
    torch.testing.assert_close(ours, model(**own).loss, rtol=1e-5, atol=0)
    model.config.output_router_logits = True
    assert model(**own).loss > ours + model.router_aux_loss_coef


@pytest.mark.parametrize("model_type", ["qwen3_moe", "jetmoe", "gpt_oss", "dbrx"])
def test_every_family_that_has_one(model_type):
    refuse_router_loss(AutoConfig.for_model(model_type))
    with pytest.raises(ModelError):
        refuse_router_loss(AutoConfig.for_model(model_type, output_router_logits=True))


def test_the_text_part_of_a_larger_model():
    config = AutoConfig.for_model("qwen3_vl_moe")
    refuse_router_loss(config)
    config.text_config.output_router_logits = True
    with pytest.raises(ModelError):
        refuse_router_loss(config)
