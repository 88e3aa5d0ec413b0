"""Documents of a flat batch don't see each other: each gets the logits and gradients it has when it is alone.

Every family on every attention implementation that runs on a CPU, beside the known ways of losing isolation,
which must show as leaks here or the proofs would prove nothing.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from packtrain.modeling.attention.varlen import NAME, register
from tests.tiny import CONFIGS as TINY

register()

LENGTHS = (9, 1, 17, 4, 12)
BOUNDS = (0, *accumulate(LENGTHS))

SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
DECODER = SMALL | dict(num_key_value_heads=2, max_position_embeddings=64)
ENCODER = SMALL | dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
HYBRID = dict(head_dim=8, sliding_window=5, layer_types=["sliding_attention", "full_attention"])
DECODERS: dict[str, dict] = TINY | {
    "mistral": DECODER | dict(model_type="mistral", sliding_window=5),
    "gemma3_text": DECODER | HYBRID | dict(model_type="gemma3_text"),
    "gpt_oss": DECODER | HYBRID | dict(model_type="gpt_oss", num_local_experts=4, num_experts_per_tok=2),
}
ENCODERS: dict[str, dict] = {
    "bert": ENCODER | dict(model_type="bert"),
    "roberta": ENCODER | dict(model_type="roberta", pad_token_id=1),
    "modernbert": SMALL
    | dict(model_type="modernbert", num_hidden_layers=3, local_attention=8, global_attn_every_n_layers=2)
    | dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2),
}


def build(name: str, implementation: str) -> PreTrainedModel:
    """A model whose documents would notice each other: weights are large enough for attention to matter."""
    config = AutoConfig.for_model(**(DECODERS | ENCODERS)[name])
    auto = AutoModelForMaskedLM if name in ENCODERS else AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1 or parameter_name.endswith("sinks"):
                parameter.normal_(std=0.15)
    return model.eval()


def flat_batch(name: str) -> dict[str, Tensor | int]:
    start = 2 if name == "roberta" else 0
    ids = torch.randint(3, 64, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(length) + start for length in LENGTHS])[None]
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    batch = {"input_ids": ids, "position_ids": positions}
    batch |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    batch |= {"max_length_q": max(LENGTHS), "max_length_k": max(LENGTHS)}
    return batch if name in ENCODERS else batch | {"use_cache": False}


def alone(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits `[1, T, V]` of every document by itself, through transformers' own defaults."""
    return torch.cat([model(input_ids=ids[:, a:b]).logits for a, b in pairwise(BOUNDS)], dim=1)


def largest_difference(model: PreTrainedModel, batch: dict) -> float:
    with torch.no_grad():
        return (model(**batch).logits - alone(model, batch["input_ids"])).abs().max().item()


def gradients(model: PreTrainedModel, logits: Tensor) -> Tensor:
    """Gradients of all weights for one and the same weighting of the logits, flattened."""
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    logits.backward(upstream)
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


# What transformers has for each family, on a CPU, that separates documents by itself:
# Gemma 2 and gpt-oss have no sdpa (softcap, sinks); gpt-oss builds its mask without position_ids, and
# encoders build theirs without them too, so that there only `packtrain_varlen` isolates.
ISOLATING = [
    *((name, implementation) for name in ("llama", "qwen3", "gpt2", "mistral", "gemma3_text")
      for implementation in (NAME, "sdpa", "eager")),
    ("gemma2", NAME),
    ("gemma2", "eager"),
    ("gpt_oss", NAME),
    *((name, NAME) for name in ENCODERS),
]  # fmt: skip


@pytest.mark.parametrize("name, implementation", ISOLATING)
@pytest.mark.parametrize("mode", ["eval", "train", "checkpointing", "reentrant"])
def test_logits_and_gradients_equal_those_of_documents_alone(name, implementation, mode):
    model, batch = build(name, implementation), flat_batch(name)
    model.train(mode != "eval")
    if mode in ("checkpointing", "reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": mode == "reentrant"})
    together, apart = model(**batch).logits, alone(model, batch["input_ids"])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)
    assert apart.std() > 0.1
    ours, theirs = (gradients(model, logits) for logits in (together, apart))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("name, implementation", ISOLATING)
def test_a_changed_neighbour_changes_nothing(name, implementation):
    """Bitwise, as no number of one document enters another's arithmetic. A mixture of experts multiplies all
    tokens of an expert at once, where the order of summation may shift in the last bit."""
    model, batch = build(name, implementation), flat_batch(name)
    changed = dict(batch, input_ids=batch["input_ids"].clone())
    changed["input_ids"][0, BOUNDS[2] : BOUNDS[3]] = 5
    with torch.no_grad():
        difference = (model(**batch).logits - model(**changed).logits).abs()[0].amax(dim=-1)  # [T]
    others = torch.cat([difference[: BOUNDS[2]], difference[BOUNDS[3] :]])
    assert others.max() <= (1e-5 if name == "gpt_oss" else 0)
    assert difference[BOUNDS[2] : BOUNDS[3]].max() > 0.1


@pytest.mark.slow  # compiles for half a minute a model; no backward pass on a CPU
@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.ci), "gemma2", "mistral"])
def test_flex_attention_forward(name):
    assert largest_difference(build(name, "flex_attention"), flat_batch(name)) < 1e-5


def test_positions_alone_are_enough_for_decoders():
    """As stock trainers pack: no cu_seq_lens at all."""
    for name in ("llama", "gemma2", "mistral", "gpt2"):
        batch = {key: flat_batch(name)[key] for key in ("input_ids", "position_ids", "use_cache")}
        assert largest_difference(build(name, NAME), batch) < 1e-5


def test_a_cache_or_a_mask_of_ones_does_not_break_packtrain_varlen():
    for name in ("llama", "gemma2", "mistral"):
        batch, model = flat_batch(name), build(name, NAME)
        ones = torch.ones_like(batch["input_ids"])
        assert largest_difference(model, batch | {"use_cache": True}) < 1e-5
        assert largest_difference(model, batch | {"attention_mask": ones}) < 1e-5


# --------------------------------------------------------------------------------------- negative controls


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_a_mask_of_ones_leaks(name, implementation):
    batch, model = flat_batch(name), build(name, implementation)
    assert largest_difference(model, batch | {"attention_mask": torch.ones_like(batch["input_ids"])}) > 0.01


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_a_cache_leaks(name, implementation):
    batch, model = flat_batch(name), build(name, implementation)
    assert largest_difference(model, batch | {"use_cache": True}) > 0.01
    assert largest_difference(model, {key: batch[key] for key in ("input_ids", "position_ids")}) > 0.01


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_leak_without_packtrain_varlen(name, implementation):
    assert largest_difference(build(name, implementation), flat_batch(name)) > 0.01


def test_gpt_oss_leaks_on_eager():
    assert largest_difference(build("gpt_oss", "eager"), flat_batch("gpt_oss")) > 0.01


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_positions_that_are_not_reset_differ(name):
    """Isolated by cu_seq_lens, yet not what the document is alone. (Rotary positions are relative, so a shift
    of a whole document is invisible to llama and its kin.)"""
    batch = flat_batch(name)
    batch["position_ids"] = torch.arange(sum(LENGTHS))[None]
    assert largest_difference(build(name, NAME), batch) > 0.01


def test_wrong_bounds_differ():
    batch = flat_batch("llama")
    batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = torch.tensor([0, 10, *BOUNDS[3:]], dtype=torch.int32)
    assert largest_difference(build("llama", NAME), batch) > 0.01
