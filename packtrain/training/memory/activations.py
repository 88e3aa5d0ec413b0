"""Bytes of activations that a forward pass keeps for the backward pass.

By formula, from the config alone; for a Llama-like layer in bfloat16 it is (24 + 8f) * hidden_size bytes per token
(f = intermediate_size / hidden_size), term by term:

    two norms        2 * (4 + 2 + 2) h    the float32 copy of the input, the normalised input, the output
    attention        2 * (2q + 2k)        q, k, v and the output (k: grouped heads make it smaller), 4 bytes per head
    gated MLP        4 * 2m               gate, its activation, up, their product

By count, on the recipe's own model: one layer of every kind runs on fake tensors (shapes without memory), and
`torch.autograd.graph.saved_tensors_hooks` tells what autograd would keep. That is right for LoRA, autocast, norms, experts
and mixers of any architecture whose shapes don't depend on its data. Mixers count as transformers computes them without
kernels. What is kept at three lengths gives bytes per token and bytes per pair of tokens of a document; the third unknown,
what is kept whatever the length (autocast's copies of weights), is counted elsewhere.

Either way attention that is looked up by name counts as a fused kernel (varlen, sdpa): nothing of size T x T is kept. A
model's own attention (bloom, mpt) keeps what it keeps. With gradient checkpointing a layer keeps its input, and one layer
at a time all of this.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from packtrain.modeling.counting import inputs_of, one_of_each, whole_chunks

if TYPE_CHECKING:
    import torch
    from torch import nn

COUNTING = "packtrain_count"
# Bytes per pair of tokens that count as none: this part of what the tokens of the shortest pass keep.
LINEAR = 0.002
LENGTH = 64  # tokens of the shortest of three passes; delta rules compute in chunks of 64, whatever their config says
LAYER_NORM = {"gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "phi", "falcon", "stablelm", "starcoder2"}
UNGATED_TENSORS = {"gpt2": 5, "gpt_neo": 5, "gptj": 5}  # kept by gelu_new, which is plain Python; 2 otherwise
QK_NORM = {"qwen3", "qwen3_moe", "gemma3", "gemma3_text"}
NORMS_PER_LAYER = {"gemma2": 4, "gemma3": 4, "gemma3_text": 4, "gptj": 1, "phi": 1, "falcon": 1}


@dataclass(frozen=True)
class Kept:
    """Bytes that are kept per token, and per pair of tokens of one document (attention that keeps its scores)."""

    token: float
    pair: float = 0.0

    def bytes(self, tokens: int, pairs: int) -> float:
        return self.token * tokens + self.pair * pairs


@dataclass(frozen=True, kw_only=True)
class Activations:
    """What a forward pass keeps for the backward pass.

    Attributes:
        kinds: of every kind of layer how many there are, and what one of them keeps.
        residual: bytes per token of a layer's input.
        outside: what is kept outside the layers.
        basis: "measured" or "estimated".
    """

    kinds: tuple[tuple[int, Kept], ...]
    residual: float
    outside: Kept
    basis: str

    def bytes(self, tokens: int, pairs: int = 0, *, checkpointing: bool) -> int:
        """Returns the bytes that a micro-batch keeps.

        Args:
            tokens: with padding.
            pairs: the sum over its documents (rows, where it is padded) of their length squared.
            checkpointing: whether layers keep their input alone, and are computed again one at a time.
        """
        each = [(count, kept.bytes(tokens, pairs)) for count, kept in self.kinds]
        layers = sum(count * size for count, size in each)
        if checkpointing:
            number = sum(count for count, _ in each)
            layers = number * self.residual * tokens + max((size for _, size in each), default=0.0)
        return round(layers + self.outside.bytes(tokens, pairs))


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
        kinds=((layers, Kept(norms + attention + mlp)),),
        residual=b * h,
        outside=Kept(norm_keeps * h),  # the last norm; its output goes to the head at supervised positions only
        basis="estimated",
    )


def count_activations(build: Callable[[], nn.Module], *, autocast: torch.dtype | None) -> Activations:
    """Counts what autograd keeps on fake tensors.

    Args:
        build: makes the recipe's model, adapter included, with `register_counting_attention()`; called under
            `torch.device("meta")`.
        autocast: dtype of mixed precision by autocast, None without.

    Raises:
        RuntimeError: the model's shapes depend on its data; and whatever else a model may raise.
    """
    import torch

    from packtrain.modeling.audit.settings import base

    with torch.device("meta"):
        model = base(build())
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = COUNTING
    backbone = getattr(model, model.base_model_prefix).train()
    length = whole_chunks(model.config.get_text_config(), LENGTH)
    with one_of_each(backbone) as counts:
        passes = [_kept_bytes(backbone, counts, times * length, autocast) for times in (1, 2, 3)]
    kept = {where: _through([sizes[where] for sizes, _ in passes], length) for where in (*counts, None)}
    return Activations(
        kinds=tuple((count, kept[layer]) for layer, count in counts.items()),
        residual=passes[0][1] / length,
        outside=kept[None],
        basis="measured",
    )


def read_activations(fields: Mapping[str, Any]) -> Activations:
    """Reads what `dataclasses.asdict` makes of activations."""
    kinds = tuple((count, Kept(**kept)) for count, kept in fields["kinds"])
    outside = Kept(**fields["outside"])
    return Activations(kinds=kinds, residual=fields["residual"], outside=outside, basis=fields["basis"])


def _through(sizes: list[int], length: int) -> Kept:
    """Puts a parabola through what is kept of one, two and three times `length` tokens."""
    one, two, three = sizes
    pair = (three - 2 * two + one) / (2 * length**2)
    if pair * length <= LINEAR * (two - one) / length:  # scans between chunks, and sizes that are rounded up
        return Kept(max(0.0, (three - one) / (2 * length)))
    return Kept(max(0.0, (two - one) / length - 3 * length * pair), pair)


def _kept_bytes(
    backbone: nn.Module, counts: Mapping[Any, int], tokens: int, autocast: torch.dtype | None
) -> tuple[dict[Any, int], int]:
    """Returns the bytes of the distinct storages that a forward pass keeps, per layer of `counts` and (None) outside them,
    parameters and inputs left out; and those of the largest input of a layer."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._pytree import tree_leaves

    kept: dict[int, tuple[Any, torch.Tensor]] = {}  # holding on to tensors keeps a storage's address its own
    shared: set[int] = set()  # what layers are given next to their input, and which all of them keep
    inside: list[Any] = [None]
    largest = 0

    def storage(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(storage(tensor), (inside[-1], tensor))
        return tensor

    def before(layer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal largest
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        hidden = kwargs.get("hidden_states", given[0])
        shared.update(storage(tensor) for tensor in given if storage(tensor) != storage(hidden))
        if (
            hidden.is_floating_point() and not hidden.requires_grad
        ):  # the first layer of an adapted model; later ones' has
            hidden.requires_grad_()
        largest = max(largest, hidden.numel() * hidden.element_size())
        inside.append(layer)

    def after(layer: Any, args: tuple, output: Any) -> None:
        inside.pop()

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in counts]
    handles += [layer.register_forward_hook(after) for layer in counts]
    try:
        with FakeTensorMode(), _without_its_log():  # CPU tensors without memory: autocast works on them, not on meta
            own = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", requires_grad=tensor.requires_grad)
                for name, tensor in (*backbone.named_parameters(), *backbone.named_buffers())
            }
            inputs = inputs_of(backbone, 1, tokens)
            mixed = torch.autocast("cpu", dtype=autocast) if autocast is not None else nullcontext()
            hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
            with hooks, mixed, _fused_sdpa():
                output = torch.func.functional_call(backbone, own, kwargs=inputs)
    finally:
        for handle in handles:
            handle.remove()
    for tensor in (*own.values(), *inputs.values()):
        if isinstance(tensor, torch.Tensor):
            kept.pop(storage(tensor), None)
    del output
    sizes: dict[Any, int] = dict.fromkeys((*counts, None), 0)
    for address, (layer, tensor) in kept.items():
        sizes[None if address in shared else layer] += tensor.untyped_storage().nbytes()
    return sizes, largest


@contextmanager
def _without_its_log() -> Iterator[None]:
    """Keeps torch from printing, while open, where a fake tensor has no shape: what follows from it is said elsewhere."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _fused(query: Any, key: Any, value: Any) -> Any:
    """Returns the output of attention, `[B, T, heads, head_dim]`, without values; keeps what a fused kernel keeps.

    Args:
        query, key, value: `[B, heads, T, head_dim]`, key and value with their own heads.
    """
    import torch

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query, key, value):
            output = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
            log_sum_exp = query.new_empty(query.shape[:3], dtype=torch.float32)
            ctx.save_for_backward(query, key, value, output, log_sum_exp)
            return output

        @staticmethod
        def backward(ctx, gradient):
            raise AssertionError("there is only a forward pass")

    if torch.is_autocast_enabled("cpu"):  # as kernels do, which take no float32
        query, key, value = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (query, key, value))
    return Fused.apply(query, key, value)


def _fused_sdpa() -> Any:
    """Returns a context in which torch's SDPA counts as fused; of tensors without values torch takes its plain form."""
    import torch
    from torch.overrides import TorchFunctionMode

    class FusedSDPA(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.nn.functional.scaled_dot_product_attention:
                given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
                return _fused(given["query"], given["key"], given["value"]).transpose(1, 2)
            return func(*args, **(kwargs or {}))

    return FusedSDPA()


def register_counting_attention() -> str:
    """Registers stand-ins for attention and experts, which compute nothing and keep what fused kernels keep: q, k, v, output
    and log-sum-exp; the tokens of every expert."""
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    class Grouped(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx, tokens, weight, width
        ):  # [tokens of all experts, in], [experts, in, out] or [experts, out, in]
            ctx.save_for_backward(tokens, weight)
            return tokens.new_empty(len(tokens), width)

        @staticmethod
        def backward(ctx, gradient):
            raise AssertionError("there is only a forward pass")

    def attention(module, query, key, value, attention_mask, **kwargs):
        return _fused(query, key, value), None

    def experts(self, hidden_states, top_k_index, top_k_weights):  # transformers' grouped_mm, step by step
        def linear(tokens, weight):
            return Grouped.apply(tokens.to(weight.dtype), weight, weight.shape[2 if self.is_transposed else 1])

        chosen = top_k_index.shape[-1]
        order = top_k_index.reshape(-1).argsort()
        tokens = hidden_states[order // chosen]
        up = linear(tokens, self.gate_up_proj if self.has_gate else self.up_proj)
        down = linear(self._apply_gate(up) if self.has_gate else self.act_fn(up), self.down_proj)
        down = self.post_expert_norm(down) if self.has_post_expert_norm else down
        weighted = (down * top_k_weights.reshape(-1)[order].unsqueeze(-1))[order.argsort()]
        return weighted.view(*hidden_states.shape[:-1], chosen, -1).sum(dim=-2).to(hidden_states.dtype)

    AttentionInterface.register(COUNTING, attention)
    AttentionMaskInterface.register(COUNTING, lambda *args, **kwargs: None)
    ALL_EXPERTS_FUNCTIONS.register(COUNTING, experts)
    return COUNTING
