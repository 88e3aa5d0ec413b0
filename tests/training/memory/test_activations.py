"""What a forward pass keeps: the formula and the count against saved-tensor hooks on real tensors."""

from __future__ import annotations

import logging
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from packtrain.modeling.audit.models import tiny_model
from packtrain.training.memory.activations import (
    COUNTING,
    activation_formula,
    count_activations,
    register_counting_attention,
)

SIZES = dict(vocab_size=128, hidden_size=64, intermediate_size=176, num_attention_heads=4, num_hidden_layers=3)
CONFIGS = {
    "llama": dict(model_type="llama", **SIZES),
    "mistral": dict(model_type="mistral", **SIZES | dict(num_key_value_heads=2, sliding_window=None)),
    "qwen3": dict(model_type="qwen3", **SIZES | dict(num_key_value_heads=2, head_dim=16)),
    "gpt2": dict(
        model_type="gpt2", vocab_size=128, n_embd=64, n_head=4, n_layer=3, n_positions=256, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
}  # fmt: skip
TOKENS = 96


def build(config, *, dtype=torch.float32, attention="sdpa", lora=False):
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")) if lora else model


def kept_on_real_tensors(model, tokens, *, autocast=None, checkpointing=False) -> int:
    """Bytes of the distinct storages that the backbone keeps, from saved-tensor hooks on a real forward pass."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": True})  # keeps a layer's input where hooks see it
    backbone = getattr(base, base.base_model_prefix).train()
    ids, positions = torch.zeros(1, tokens, dtype=torch.long), torch.arange(tokens)[None]
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    context = torch.autocast("cpu", dtype=autocast) if autocast else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), context:
        output = backbone(input_ids=ids, position_ids=positions, use_cache=False)
    for tensor in (*backbone.parameters(), *backbone.buffers(), ids, positions):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def per_token(model, **how) -> float:
    """Free of what doesn't grow with tokens."""
    return (kept_on_real_tensors(model, 2 * TOKENS, **how) - kept_on_real_tensors(model, TOKENS, **how)) / TOKENS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("family", CONFIGS)
def test_the_formula_is_within_a_tenth_of_what_is_kept(family, dtype):
    config = AutoConfig.for_model(**CONFIGS[family])
    formula = activation_formula(config, itemsize=dtype.itemsize)
    measured = per_token(build(config, dtype=dtype))
    assert formula.bytes(1000, checkpointing=False) == pytest.approx(1000 * measured, rel=0.1)


def test_the_formula_is_the_published_one_for_llama():
    """(24 + 8f) h bytes per token and layer in bfloat16, and 4 bytes per head for the attention's log-sum-exp."""
    hidden, ffn, heads = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["num_attention_heads"]
    formula = activation_formula(CONFIGS["llama"])
    assert formula.layer == 24 * hidden + 8 * ffn + 4 * heads
    assert formula.residual == 2 * hidden


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["plain", "autocast"])
@pytest.mark.parametrize("family", CONFIGS)
def test_the_count_without_memory_is_what_is_kept(family, autocast, lora):
    register_counting_attention()
    config = AutoConfig.for_model(**CONFIGS[family])
    counted = count_activations(lambda c: build(c, attention=COUNTING, lora=lora), config, autocast=autocast)
    measured = per_token(build(config, lora=lora), autocast=autocast)
    assert counted.basis == "measured"
    assert counted.bytes(1000, checkpointing=False) == pytest.approx(1000 * measured, rel=0.02)


SLOW = [pytest.mark.slow, pytest.mark.ci]  # token by token


@pytest.mark.parametrize(("architecture", "attention"), [pytest.param("mamba", "eager", marks=SLOW), ("bamba", "sdpa")])
def test_layers_without_attention_are_counted_too(architecture, attention):
    """Their configs derive the kinds of their layers from the number of layers."""
    register_counting_attention()
    config = tiny_model(architecture).config
    counted = count_activations(lambda c: build(c, attention=COUNTING), config, autocast=None)
    measured = per_token(build(config, attention=attention))
    assert counted.bytes(1000, checkpointing=False) == pytest.approx(1000 * measured, rel=0.1)


def test_a_count_that_fails_prints_nothing(caplog):
    """Shapes that depend on the data: torch would log a traceback for every one of them."""
    register_counting_attention()
    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.addHandler(caplog.handler)
    try:
        with pytest.raises(RuntimeError):
            config = tiny_model("mixtral").config
            count_activations(lambda c: build(c, attention=COUNTING), config, autocast=None)
        assert not caplog.records
        log.error("as before")
        assert caplog.records
    finally:
        log.removeHandler(caplog.handler)


def test_checkpointed_layers_keep_their_input():
    """The hooks see what is kept between layers: with every layer checkpointed, the inputs and what is outside."""
    config = AutoConfig.for_model(**CONFIGS["llama"])
    kept = per_token(build(config), checkpointing=True)
    counted = activation_formula(config, itemsize=4)
    between = counted.layers * counted.residual + counted.outside
    assert kept == pytest.approx(between, rel=0.1)
    assert counted.bytes(1, checkpointing=True) == pytest.approx(between + counted.layer, abs=1)
    assert counted.bytes(1, checkpointing=False) > 2 * between  # control: without, much more is kept


def test_a_wider_network_keeps_more():
    """Control: the count depends on the model."""
    register_counting_attention()
    narrow, wide = (
        count_activations(
            lambda c: build(c, attention=COUNTING),
            AutoConfig.for_model(**CONFIGS["llama"] | {"intermediate_size": size}),
            autocast=None,
        )
        for size in (176, 352)
    )
    assert wide.layer - narrow.layer == 4 * 4 * 176
