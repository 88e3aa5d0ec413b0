"""Tiny random models of the families that tests run on; float32, vocabulary of 64, a few thousand weights."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 64

_DECODER = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
CONFIGS: dict[str, dict] = {
    "llama": dict(model_type="llama", **_DECODER),
    "qwen3": dict(model_type="qwen3", **_DECODER),
    # softcapped logits and scores, windows shorter than the documents
    "gemma2": dict(model_type="gemma2", **_DECODER, sliding_window=8, query_pre_attn_scalar=8),
    "gpt2": dict(
        model_type="gpt2",
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
}


def tiny_model(family: str, *, attn_implementation: str | None = None, seed: int = 0, **changes) -> PreTrainedModel:
    """A random model of `family` in eval mode, the same for the same seed; `None` is transformers' own choice."""
    config = AutoConfig.for_model(**CONFIGS[family] | changes)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation).eval()


def random_documents(lengths: list[int], *, prompt: int = 2, seed: int = 0) -> list[dict[str, list[int]]]:
    """Documents of these lengths; the first `prompt` tokens of each are not supervised."""
    generator = torch.Generator().manual_seed(seed)
    documents = []
    for length in lengths:
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        documents.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return documents
