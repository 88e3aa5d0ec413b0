"""What a forward pass keeps: the formula and the count against saved-tensor hooks on real tensors."""

from __future__ import annotations

import inspect
import json
import logging
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from packtrain.modeling.audit.models import tiny_model
from packtrain.training.memory.activations import (
    COUNTING,
    activation_formula,
    count_activations,
    read_activations,
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
        given = {"position_ids": positions} if "position_ids" in inspect.signature(backbone.forward).parameters else {}
        output = backbone(input_ids=ids, **given, use_cache=False)
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
    assert formula.kinds[0][1].token == 24 * hidden + 8 * ffn + 4 * heads
    assert formula.residual == 2 * hidden


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["plain", "autocast"])
@pytest.mark.parametrize("family", CONFIGS)
def test_the_count_without_memory_is_what_is_kept(family, autocast, lora):
    register_counting_attention()
    config = AutoConfig.for_model(**CONFIGS[family])
    counted = count_activations(lambda: build(config, attention=COUNTING, lora=lora), autocast=autocast)
    measured = per_token(build(config, lora=lora), autocast=autocast)
    assert counted.basis == "measured"
    # An adapted model's first layer keeps a norm less than the others, which is a good part of three.
    assert counted.bytes(1000, checkpointing=False) == pytest.approx(1000 * measured, rel=0.06 if lora else 0.02)
    assert counted.bytes(1000, checkpointing=False) >= 0.999 * 1000 * measured


SLOW = [pytest.mark.slow, pytest.mark.ci]  # token by token
ARCHITECTURES = {
    "qwen3_next": (3, 1), "lfm2": (1, 1), "falcon_h1": (2,), "mamba2": (2,), "bamba": (1, 1), "granitemoehybrid": (1, 1),
    "minimax": (1, 1), "olmo_hybrid": (3, 1), "mixtral": (2,), "bloom": (2,), "gptj": (2,),
}  # fmt: skip
EAGER = ("gptj", "bloom", "mamba", "mamba2", "rwkv")  # the others have SDPA


def grows(kept) -> float:
    """Whole chunks: of 64 tokens in delta rules, 256 in MiniMax."""
    return kept(512) - kept(256)


@pytest.mark.parametrize(
    "architecture", [*ARCHITECTURES, *(pytest.param(name, marks=SLOW) for name in ("mamba", "recurrent_gemma", "rwkv"))]
)
def test_one_layer_of_every_kind_is_what_all_layers_keep(architecture):
    """Of hybrids, state-space models, experts, and attention that keeps its scores, on real tensors."""
    register_counting_attention()
    config = tiny_model(architecture).config
    if architecture == "gptj":
        config.n_positions = 512
    if architecture == "recurrent_gemma":
        config.attention_window_size = 2048  # sdpa keeps the mask of a window within the row
    attention = "eager" if architecture == "gptj" else COUNTING  # it looks attention up among its own
    counted = count_activations(lambda: build(config, attention=attention), autocast=None)
    real = build(config, attention="eager" if architecture in EAGER else "sdpa")
    if architecture in ARCHITECTURES:
        assert tuple(count for count, _ in counted.kinds) == ARCHITECTURES[architecture]
    measured = grows(lambda tokens: kept_on_real_tensors(real, tokens))
    assert grows(lambda n: counted.bytes(n, n * n, checkpointing=False)) == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("architecture", ["qwen3_next", "bamba"])
def test_the_first_layers_do_not_stand_for_a_hybrid(architecture):
    """Control: with the first kind of layer alone, as if all were of it, the count is far off."""
    register_counting_attention()
    config = tiny_model(architecture).config
    counted = count_activations(lambda: build(config, attention=COUNTING), autocast=None)
    first = replace(counted, kinds=((sum(count for count, _ in counted.kinds), counted.kinds[0][1]),))
    assert first.bytes(1000, checkpointing=False) > 1.2 * counted.bytes(1000, checkpointing=False)


def test_attention_that_keeps_its_scores_grows_with_pairs():
    """bloom keeps its probabilities, `[heads, T, T]`; llama, by a fused kernel, does not."""
    register_counting_attention()
    config = tiny_model("bloom").config
    bloom = count_activations(lambda: build(config, attention=COUNTING), autocast=None)
    assert [kept.pair for _, kept in bloom.kinds] == [4 * config.n_head]
    one, many = (bloom.bytes(1024, pairs, checkpointing=False) for pairs in (1024**2, 16 * 64**2))
    assert one - many == 2 * 4 * config.n_head * (1024**2 - 16 * 64**2)
    llama = AutoConfig.for_model(**CONFIGS["llama"])
    (kind,) = count_activations(lambda: build(llama, attention=COUNTING), autocast=None).kinds
    assert kind[1].pair == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_the_count_agrees_with_the_formula_for_llama(dtype):
    """Within a tenth, in every part, with and without checkpointing."""
    register_counting_attention()
    config = AutoConfig.for_model(**CONFIGS["llama"])
    formula = activation_formula(config, itemsize=dtype.itemsize)
    counted = count_activations(lambda: build(config, dtype=dtype, attention=COUNTING), autocast=None)
    assert counted.residual == formula.residual
    for checkpointing in (False, True):
        kept = counted.bytes(1000, checkpointing=checkpointing)
        assert kept == pytest.approx(formula.bytes(1000, checkpointing=checkpointing), rel=0.1)
    assert read_activations(json.loads(json.dumps(asdict(counted)))) == counted


def test_a_count_that_fails_prints_nothing(caplog):
    """Shapes that depend on the data: torch would log a traceback for every one of them."""
    register_counting_attention()

    def depends_on_data():
        model = build(AutoConfig.for_model(**CONFIGS["llama"]), attention=COUNTING)
        model.model.layers[0].register_forward_hook(lambda layer, args, output: output[output.nonzero()[0, 0]])
        return model

    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.addHandler(caplog.handler)
    try:
        with pytest.raises(RuntimeError):
            count_activations(depends_on_data, autocast=None)
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
    ((layers, layer),) = counted.kinds
    between = layers * counted.residual + counted.outside.token
    assert kept == pytest.approx(between, rel=0.1)
    assert counted.bytes(1, checkpointing=True) == pytest.approx(between + layer.token, abs=1)
    assert counted.bytes(1, checkpointing=False) > 2 * between  # control: without, much more is kept


def test_a_wider_network_keeps_more():
    """Control: the count depends on the model."""
    register_counting_attention()
    narrow, wide = (
        count_activations(
            partial(build, AutoConfig.for_model(**CONFIGS["llama"] | {"intermediate_size": size}), attention=COUNTING),
            autocast=None,
        )
        for size in (176, 352)
    )
    assert wide.kinds[0][1].token - narrow.kinds[0][1].token == 4 * 4 * 176
