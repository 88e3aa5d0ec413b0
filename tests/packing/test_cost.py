"""The cost of a document, against weights counted by hand and by torch."""

from __future__ import annotations

import numpy as np
import pytest

from packtrain.errors import PlanError
from packtrain.packing.cost import Cost

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}


def test_llama_7b():
    """6.476e9 weights in the layers (6.74e9 with both embeddings); PaLM's 4 * layers * heads * head_dim per pair."""
    cost = Cost.of_config(LLAMA_7B, causal=False)
    assert cost.linear == 2 * 32 * (4 * 4096**2 + 3 * 4096 * 11008) == 12_952_010_752
    assert cost.quadratic == 4 * 32 * 4096
    assert Cost.of_config(LLAMA_7B).quadratic == cost.quadratic / 2
    assert cost(np.array([0, 10])).tolist() == [0.0, 10 * cost.linear + 100 * cost.quadratic]


@pytest.mark.parametrize(
    "config",
    [
        dict(model_type="llama", num_key_value_heads=2),
        dict(model_type="qwen3", num_key_value_heads=2, head_dim=32),
        dict(model_type="gpt2", n_embd=64, n_layer=3, n_head=4, n_inner=100),
        dict(model_type="qwen3_moe", moe_intermediate_size=24, num_experts=6, num_experts_per_tok=2, head_dim=16),
    ],
)
def test_linear_is_the_weights_of_the_real_model(config):
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = dict(hidden_size=64, intermediate_size=100, num_hidden_layers=3, num_attention_heads=4, vocab_size=50)
    made = AutoConfig.for_model(**(shape | config))
    weights = 0
    for name, weight in AutoModelForCausalLM.from_config(made).named_parameters():
        if (
            weight.ndim < 2
            or "embed" in name
            or "head" in name
            or "wte" in name
            or "wpe" in name
            or "gate.weight" in name
        ):
            continue
        weights += weight.numel() * (2 / 6 if "experts" in name else 1)
    assert Cost.of_config(made).linear == 2 * weights
    assert Cost.of_config(made.to_dict()) == Cost.of_config(made)


def test_sliding_windows_are_linear():
    full, mixed = (
        Cost.of_config(LLAMA_7B | {"sliding_window": 512, "layer_types": types * 16}, causal=False)
        for types in (["full_attention"] * 2, ["full_attention", "sliding_attention"])
    )
    assert mixed.quadratic == full.quadratic / 2
    assert mixed.linear - full.linear == 16 * 4 * 4096 * 512
    assert Cost.of_config(LLAMA_7B | {"sliding_window": 512}).quadratic == 0
    assert Cost.of_config(LLAMA_7B | {"sliding_window": 512, "use_sliding_window": False}) == Cost.of_config(LLAMA_7B)


def test_errors():
    with pytest.raises(PlanError, match="hidden size"):
        Cost.of_config({"hidden_size": 64})
    for wrong in ({"linear": 0}, {"linear": -1.0}, {"quadratic": float("nan")}):
        with pytest.raises(PlanError, match="linear > 0"):
            Cost(**wrong)
