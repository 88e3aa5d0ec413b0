"""A tiny random model of any architecture that transformers knows, to look at how it treats documents.

    tiny_model("qwen3")        # some thousand weights, built in milliseconds, nothing downloaded

The default configuration of the architecture is shrunk field by field: sizes by name, layer lists to the shortest
prefix that has every kind of layer, windows below the length of the audit's documents. The weights are drawn
larger than an initialisation would draw them, so that attention matters and a leak cannot hide below rounding.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING as CAUSAL
from transformers import MODEL_FOR_MASKED_LM_MAPPING as MASKED

from packtrain.errors import ModelError
from packtrain.modeling.audit.kinds import (
    LAYER_COUNTS,
    count_layers,
    is_of_indices,
    is_per_layer,
    kinds_in,
    shortest_prefix,
)
from packtrain.recipe.fields import did_you_mean

LAYERS = 2  # more only where the architecture has more kinds of layers
MORE_LAYERS = {"inkling2_text": 7, "modernbert": 4, "modernbert-decoder": 4}  # whose config does not list every kind
MOST_LAYERS = 8
WEIGHT_STD = 0.12
VOCABULARY = 128

# Names of configuration fields, and what they become. Fields that an architecture lacks are not set.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "emb_dim", "width"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_source_positions", "n_ctx"), 128),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_kv_heads", "heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "kv_channels", "rotary_dim", "d_kv", "global_head_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "swa_head_dim", "swa_v_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "attention_hidden_size"), 8),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size", "inner_size"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "feed_forward_size", "hidden_dim", "mlp_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("shared_intermediate_size", "mamba_intermediate_size", "intermediate_size_mlp"), 16),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"), 4
    ),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "experts_per_token", "num_experts_per_token"), 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_groups", "num_expert_group"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state", "d_state"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("sliding_window", "attention_window_size", "window_size"), 6),
    **dict.fromkeys(("local_attention",), 12),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("pad_token_id",), 0),
    **dict.fromkeys(("bos_token_id", "decoder_start_token_id", "cls_token_id"), 1),
    **dict.fromkeys(("eos_token_id", "sep_token_id"), 2),
    **dict.fromkeys(("mamba_expand", "expand"), 2),
    **dict.fromkeys(("index_topk", "index_block_size"), 4),  # fewer than tokens: sparse attention then selects
    **dict.fromkeys(("index_topk_blocks",), 2),
    **dict.fromkeys(("index_n_heads",), 4),
    **dict.fromkeys(("index_head_dim",), 8),
    **dict.fromkeys(("type_vocab_size",), 2),
}
DROPOUT = re.compile(r"drop|jitter")  # names of rates; two forward passes must be comparable

# What no rule over names can know: fields that default to None or depend on each other, kinds of layers that the default
# configuration does not have, and (`...`) fields that cannot be set.
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16}
SHARED_KEYS = {  # layers that use the keys and values of an earlier one of their kind
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_kv_shared_layers": 2,
}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "deberta-v2": {"conv_kernel_size": 3},
    "deepseek_v2": EXPERTS,
    "doge": {"is_moe": True},
    "dots1": EXPERTS,
    "dots3_note_vision_encoder": {"adapter_in_dim": 32},
    "dots3_note_audio_encoder": {"adapter_input_size": 32},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 0, "mask_token_id": 3, "position_embedding_type": "rotary"},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64},
    "funnel": {"num_hidden_layers": ..., "block_sizes": [1, 1, 1]},
    "gemma3n_text": {
        **SHARED_KEYS,
        "intermediate_size": 48,
        "activation_sparsity_pattern": [0.9, *[0.0] * 5],
    },
    "gemma4_text": {
        **SHARED_KEYS,
        "head_dim": 8,
        "sliding_window": 6,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "position_embedding_type": "rope"},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "luke": {"entity_vocab_size": 16, "entity_emb_size": 32},
    "mamba2": {"head_dim": 16},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "ministral": {"head_dim": 8},
    "neomme": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "perceiver": {"num_latents": 16, "d_latents": 32, "num_self_attends_per_block": 2, "num_self_attention_heads": 4},
    "prophetnet": {"num_hidden_layers": ..., "num_encoder_layers": 2, "num_decoder_layers": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32},
    "rwkv": {"attention_hidden_size": 32},
    "xlnet": {"max_position_embeddings": ...},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2,
    },
    "zamba2": {
        "use_mem_rope": True,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
    },
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_model(architecture: str, *, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """Makes a tiny random model in float32 on the CPU, in eval mode, with all dropout off.

    Args:
        architecture: a `model_type` of transformers ("llama", "bert", "gemma3_text").
        seed: of the weights; the global random state is left as it was.
        fields: configuration fields that override the shrunk ones.

    Raises:
        ModelError: an unknown architecture, or one that cannot be built from a shrunk configuration.
    """
    if architecture not in CONFIG_MAPPING:
        near = did_you_mean(architecture, CONFIG_MAPPING)
        fix = f"did you mean {near}?" if near else "name a model_type of transformers"
        raise ModelError("is not an architecture of transformers", value=architecture, fix=fix)
    try:
        config = CONFIG_MAPPING[architecture](**shrunk(CONFIG_MAPPING[architecture]()) | fields)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = model_class(config).from_config(config)
            enlarge(model)
    except Exception as error:  # whatever an architecture may raise: the audit of the others goes on
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        fix = "audit a checkpoint of it, or give a config"
        raise ModelError(
            f"a tiny model of this architecture cannot be built: {reason}", value=architecture, fix=fix
        ) from error
    return model.float().eval()


def model_class(config: PreTrainedConfig) -> Any:
    """Returns the class with the head that the model is trained with."""
    decoder, encoder = type(config) in CAUSAL, type(config) in MASKED and not config.is_encoder_decoder
    if encoder and (not decoder or getattr(config, "is_decoder", None) is False):
        return AutoModelForMaskedLM  # BERT and kin have both heads; as they come they are encoders
    return AutoModelForCausalLM if decoder else AutoModel


def shrunk(default: PreTrainedConfig) -> dict[str, Any]:
    """Returns the fields of the tiny configuration, from the architecture's default one (and those nested in it)."""
    layers = enough_layers(default)
    fields = {name: size for name, size in SIZES.items() if isinstance(read(default, name), int)}
    fields |= {name: 0.0 for name, value in vars(default).items() if DROPOUT.search(name) and value}
    fields |= {name: layers for name in LAYER_COUNTS if read(default, name) is not None}
    for name, value in vars(default).items():
        if is_per_layer(name, value, count_layers(default)):
            fields[name] = value[:layers]
        elif is_of_indices(name, value, count_layers(default)):
            fields[name] = [number for number in value if number < layers]
    if read(default, "kv_lora_rank") is not None and "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = fields["num_attention_heads"]  # latent attention has as many as heads
    fields = {name: value for name, value in fields.items() if name not in default.attribute_map}  # no aliases
    for name, nested in vars(default).items():
        if isinstance(nested, PreTrainedConfig):
            fields[name] = type(nested)(**shrunk(nested))
    fields |= EXCEPTIONS.get(default.model_type, {})
    return {name: value for name, value in fields.items() if value is not ... and settable(default, name)}


def read(config: PreTrainedConfig, name: str) -> Any:
    """Returns the value of a field or property, None where there is none. (Gemma 4 refuses to read what layers may vary.)"""
    return vars(config)[name] if name in vars(config) else getattr(config, name, None)


def settable(config: PreTrainedConfig, name: str) -> bool:
    """Returns whether a field is one, rather than a property computed from others."""
    found = getattr(type(config), config.attribute_map.get(name, name), None)
    return not isinstance(found, property) or found.fset is not None


def enough_layers(config: PreTrainedConfig) -> int:
    """Returns the length of the shortest prefix that has every kind of layer, at least `LAYERS`."""
    needed = max(LAYERS, MORE_LAYERS.get(config.model_type, 0), shortest_prefix(kinds_in(config)))
    return min(needed, MOST_LAYERS)


def enlarge(model: PreTrainedModel) -> None:
    """Redraws matrices and sinks; vectors (norms, decay rates, biases) keep what the architecture gave them."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 or name.endswith("sinks"):
                weight.normal_(std=WEIGHT_STD)
