"""Bytes of activations that a forward pass keeps for the backward pass.

By formula, from the config alone; for a Llama-like layer in bfloat16 it is (24 + 8f) * hidden_size bytes per token
(f = intermediate_size / hidden_size), term by term:

    two norms        2 * (4 + 2 + 2) h    the float32 copy of the input, the normalised input, the output
    attention        2 * (2q + 2k)        q, k, v and the output (k: grouped heads make it smaller), 4 bytes per head
    gated MLP        4 * 2m               gate, its activation, up, their product

By count, on the recipe's own model: one and two of its layers run on fake tensors (shapes without memory), and
`torch.autograd.graph.saved_tensors_hooks` tells what autograd would keep. That is right for LoRA, autocast, norms and
activations of any architecture whose shapes don't depend on its data (a mixture of experts gets the formula).

Either way attention counts as a fused kernel (varlen, sdpa): nothing of size T x T is kept. With gradient
checkpointing a layer keeps its input, and one layer at a time all of this.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

COUNTING = "packtrain_count"
# Tokens of the counted passes: what doesn't grow with them (autocast's copies of weights) cancels out.
TOKENS = (64, 128, 256)
# How much more per token a row twice as long may keep: tiny state-space models' scans 1.02, tiny T x T scores 1.4.
LINEAR = 1.05
LAYER_NORM = {"gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "phi", "falcon", "stablelm", "starcoder2"}
UNGATED_TENSORS = {"gpt2": 5, "gpt_neo": 5, "gptj": 5}  # kept by gelu_new, which is plain Python; 2 otherwise
QK_NORM = {"qwen3", "qwen3_moe", "gemma3", "gemma3_text"}
NORMS_PER_LAYER = {"gemma2": 4, "gemma3": 4, "gemma3_text": 4, "gptj": 1, "phi": 1, "falcon": 1}


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes per token: of one `layer`, of its input (`residual`), and of everything outside the layers (`outside`)."""

    layer: float
    residual: float
    outside: float
    layers: int
    basis: str  # "measured" or "estimated"

    def bytes(self, tokens: int, *, checkpointing: bool) -> int:
        """Returns the bytes that a micro-batch of `tokens` keeps."""
        layers = self.layers * self.residual + self.layer if checkpointing else self.layers * self.layer
        return round(tokens * (layers + self.outside))


def activation_formula(config: Mapping[str, Any] | Any, *, itemsize: int = 2) -> Activations:
    """Computes activations from the config, for full fine-tuning in one dtype.

    Args:
        config: a transformers config or its mapping.
        itemsize: bytes of an element of the computation: 2 (bfloat16, float16) or 4 (float32).
    """
    config = getattr(config, "get_text_config", lambda: config)()
    get = config.get if isinstance(config, Mapping) else lambda name: getattr(config, name, None)

    def first(*names: str, default: Any = None) -> Any:
        return next((value for name in names if (value := get(name)) is not None), default)

    kind, b = first("model_type"), itemsize
    h, layers = first("hidden_size", "n_embd", "d_model"), first("num_hidden_layers", "n_layer", "num_layers")
    heads = first("num_attention_heads", "n_head", "num_heads")
    head_dim = first("head_dim", default=h // heads)
    q, k = heads * head_dim, first("num_key_value_heads", default=heads) * head_dim
    experts = first("num_experts_per_tok", "num_experts_per_token", default=1)
    m = first("moe_intermediate_size", default=None) if experts > 1 else None
    m = experts * (m or first("intermediate_size", "n_inner", "ffn_dim", default=4 * h))

    norm_keeps = b if kind in LAYER_NORM else 4 + b  # transformers' RMSNorms compute in float32, step by step
    norms = NORMS_PER_LAYER.get(kind, 2) * (norm_keeps + b) * h + (kind in QK_NORM) * norm_keeps * (q + k)
    attention = b * (2 * q + 2 * k) + 4 * heads
    mlp = b * m * (UNGATED_TENSORS.get(kind, 2) if kind in LAYER_NORM else 4)
    return Activations(
        layer=norms + attention + mlp,
        residual=b * h,
        outside=norm_keeps * h,  # the last norm; its output goes to the head at supervised positions only
        layers=layers,
        basis="estimated",
    )


def count_activations(build: Callable[[Any], nn.Module], config: Any, *, autocast: torch.dtype | None) -> Activations:
    """Counts what autograd keeps on fake tensors.

    Args:
        build: makes the model of a config, adapter included, with `register_counting_attention()`; called under
            `torch.device("meta")` for a model of one layer, and of two.
        config: the recipe's transformers config.
        autocast: dtype of mixed precision by autocast, None without.

    Raises:
        RuntimeError: the model's shapes depend on its data.
        ValueError: it has as many layers whatever its config says, or keeps more per token the longer the row; and
            whatever else a model may raise.
    """
    import torch

    from packtrain.modeling.audit.settings import base

    per_token: dict[int, list[float]] = {}  # of a model of so many layers, between each two numbers of tokens
    for layers in (1, 2):
        shallow = copy.deepcopy(config)
        text = shallow.get_text_config()
        text.num_hidden_layers = layers
        if len(getattr(text, "layer_types", None) or ()) > layers:  # of Mamba and its kin it follows by itself
            text.layer_types = text.layer_types[:layers]
        with torch.device("meta"):
            model = build(shallow)
        model = base(model)
        backbone = getattr(model, model.base_model_prefix).train()
        kept = [_kept_bytes(backbone, tokens, autocast) for tokens in TOKENS]
        per_token[layers] = [(b - a) / (n - m) for (a, b), (m, n) in zip(pairwise(kept), pairwise(TOKENS), strict=True)]
    shorter, layer = (two - one for one, two in zip(per_token[1], per_token[2], strict=True))
    if layer <= 0:
        raise ValueError("num_hidden_layers is not the number of its layers")
    if layer > LINEAR * shorter:
        raise ValueError("a token keeps more in a longer row, as when the model's own attention keeps all scores")
    embedding = backbone.get_input_embeddings().weight
    return Activations(
        layer=layer,
        residual=embedding.shape[1] * embedding.element_size(),
        outside=per_token[1][-1] - layer,
        layers=config.get_text_config().num_hidden_layers,
        basis="measured",
    )


def _kept_bytes(backbone: nn.Module, tokens: int, autocast: torch.dtype | None) -> int:
    """Counts the bytes of the distinct storages that a forward pass keeps, parameters and inputs left out."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    kept: dict[int, torch.Tensor] = {}  # holding on to them keeps a storage's address its own

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FakeTensorMode():  # CPU tensors without memory: autocast works on them, as it doesn't on meta tensors
        own = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", requires_grad=tensor.requires_grad)
            for name, tensor in (*backbone.named_parameters(), *backbone.named_buffers())
        }
        inputs = {
            "input_ids": torch.zeros(1, tokens, dtype=torch.long),
            "position_ids": torch.arange(tokens)[None],
        }
        context = torch.autocast("cpu", dtype=autocast) if autocast is not None else nullcontext()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), context, _without_its_log():
            torch.func.functional_call(backbone, own, kwargs={**inputs, "use_cache": False})
    for tensor in (*own.values(), *inputs.values()):
        kept.pop(tensor.untyped_storage()._cdata, None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@contextmanager
def _without_its_log() -> Iterator[None]:
    """Keeps torch from printing, while open, where a fake tensor has no shape: what follows from it is said elsewhere."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def register_counting_attention() -> str:
    """Registers an attention that computes nothing and keeps what a fused kernel keeps: q, k, v, output, log-sum-exp."""
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query, key, value):  # [B, heads, T, head_dim], key and value with their own heads
            output = torch.empty_like(query.transpose(1, 2))
            log_sum_exp = query.new_empty(query.shape[:3], dtype=torch.float32)
            ctx.save_for_backward(query, key, value, output, log_sum_exp)
            return output

        @staticmethod
        def backward(ctx, gradient):
            raise AssertionError("there is only a forward pass")

    def attention(module, query, key, value, attention_mask, **kwargs):
        if torch.is_autocast_enabled("cpu"):  # as kernels do, which take no float32
            query, key, value = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (query, key, value))
        return Fused.apply(query, key, value), None

    AttentionInterface.register(COUNTING, attention)
    AttentionMaskInterface.register(COUNTING, lambda *args, **kwargs: None)
    return COUNTING
