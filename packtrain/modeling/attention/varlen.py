"""`packtrain_varlen`: packed attention for every transformers model that looks its attention up by name.

    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="packtrain_varlen")
    model(input_ids, position_ids=..., cu_seq_lens_q=..., cu_seq_lens_k=..., use_cache=False)

Two functions are registered through transformers' public interfaces, nothing is patched:

- `varlen_attention_forward` computes attention within each document of a flat batch (`[1, T]`). It learns the
  documents from `cu_seq_lens_q` or, where that is missing, from `position_ids` that restart, and from `shared_prefixes`
  which of them begin with the keys of another (see `packtrain.modeling.attention.prefixes`). All that a layer
  asks for is honoured (window, grouped heads, scaling, softcap, sinks, position bias, dropout, a mask) or
  refused with a `ModelError`. A batch that is not packed gets transformers' own sdpa attention.
- `varlen_mask` builds no mask where the attention function can do without one, and otherwise returns sdpa's.

Bounds of documents are read on the host, where packtrain's batches bring them (`document_bounds`); offsets of other
collators are read back from the device once per batch. Under `torch.compile` nothing is read while a graph is made: see
`packtrain.modeling.attention.traced`.

| batch | the mask function returns | the attention function does |
|---|---|---|
| flat, causal, with or without a window | None | documents, window from `sliding_window` |
| flat, a mask it can't name (chunked, custom) | sdpa's mask | documents, with its diagonal blocks |
| flat, bidirectional | sdpa's: None, or the window | documents, with its diagonal blocks |
| one plain row `[1, T]` | None (or sdpa's mask) | one document, which is what sdpa does |
| `[B, T]`, padded or packed, with a mask | sdpa's mask | sdpa |
| `[B, T]`, packed, no mask (encoders; a cache) | None, as sdpa | rows one after the other, documents |
| decoding with a cache | sdpa's mask | sdpa |

The name has no "flash" in it: transformers takes such names for flash-attn itself and treats masks its way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from packtrain.errors import ModelError
from packtrain.modeling.attention.documents import (
    NAME,
    bounds_from_positions,
    check_fit,
    check_keys,
    documents_in,
    documents_of,
    refusal,
)
from packtrain.modeling.attention.kernels import HALF, Documents, Pattern, attend, attend_dense, causal_mask
from packtrain.modeling.attention.mask import varlen_mask
from packtrain.modeling.attention.prefixes import KEY as SHARED
from packtrain.modeling.attention.prefixes import attend_shared
from packtrain.modeling.attention.traced import attend_traced
from packtrain.packing.bounds import KEY as BOUNDS
from packtrain.recipe.fields import did_you_mean


def register() -> str:
    """Makes `attn_implementation="packtrain_varlen"` known to transformers. Idempotent. Returns the name."""
    AttentionInterface.register(NAME, varlen_attention_forward)
    AttentionMaskInterface.register(NAME, varlen_mask)
    return NAME


def check_implementation(name: str, key: str = "model.attn_implementation") -> None:
    """Raises ModelError for a name that nobody registered; "org/name" is a kernel from the Hub."""
    register()
    known = ["auto", "eager", *AttentionInterface().valid_keys()]
    if name not in known and "/" not in name:
        near = did_you_mean(name, known)
        hint = f"did you mean {near}?" if near else f"choose one of {', '.join(known)}"
        raise ModelError("is not a known attention implementation", key=key, value=name, fix=hint)


def choose_implementation(requested: str, layout: str, device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Chooses the attention implementation to load a model with.

    Args:
        requested: the recipe's `attn_implementation`; "auto" picks `packtrain_varlen` for flat layouts and
            leaves padded ones to transformers (None: sdpa, or eager where a model has no sdpa).
        layout: "flat" or "padded".
        device, dtype: where and in what the model will run.

    Raises:
        ModelError: for a name nobody registered, or one that cannot train on this device or dtype.
    """
    assert layout in ("flat", "padded"), layout
    register()
    if requested == "auto":
        return NAME if layout == "flat" else None
    check_implementation(requested)
    device_type, key = torch.device(device).type, "model.attn_implementation"
    fix = "set it to auto"
    if requested.startswith("flash_attention") and (device_type != "cuda" or dtype not in HALF):
        what = f"needs CUDA and float16 or bfloat16, and this run is on {device_type} in {dtype}"
        raise ModelError(what, key=key, value=requested, fix=fix)
    if requested == "flex_attention" and device_type == "cpu":
        raise ModelError("has no backward pass on CPU", key=key, value=requested, fix=fix)
    return requested


# -------------------------------------------------------------------------------- the attention function


def varlen_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Computes attention for packed, padded and plain batches alike, as transformers calls it.

    Args:
        query: `[B, H, T, D]`; key: `[B, Hkv, K, D]`; value: `[B, Hkv, K, Dv]`; K is T where documents are packed.
        attention_mask: `[B, 1 or H, T, K]`, bool or additive, or None.
        s_aux: `[H]`, the logit of each head's attention sink.
        kwargs: of these it reads `cu_seq_lens_q`, `cu_seq_lens_k` (int32 `[S + 1]`), `document_bounds` (`Bounds`),
            `max_length_q`, `position_ids` and `sliding_window`.

    Returns:
        `[B, T, H, Dv]`, and None for the attention weights, which are never formed.

    Raises:
        ModelError: documents that don't fit the row, or a packed layer that asks for what can't be done here.
    """
    if kwargs.get("cache") is not None:
        raise refusal("continuous batching, which brings its own paged cache", "generate with sdpa")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    pattern = Pattern(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        causal=is_causal,
        mask=attention_mask,
        bias=position_bias,
        softcap=softcap,
        sinks=s_aux,
        dropout=dropout,
    )
    source = documents = None
    if torch.compiler.is_compiling():
        if kwargs.get(SHARED) is not None:
            raise refusal("a shared prefix under torch.compile", "leave `training.torch_compile` out")
        source = find_source(module, query, key, attention_mask, kwargs)
    else:
        documents = find_documents(module, query, key, attention_mask, kwargs)
    if source is not None or documents is not None:
        pattern = packed_pattern(module, query, documents, pattern, kwargs)
        rows = [end_to_end(states) for states in (query, key, value)]
        if source is not None:
            output = attend_traced(rows[0], rows[1], rows[2], source, kwargs, pattern)
        elif documents is not None and kwargs.get(SHARED) is not None:
            output = attend_shared(rows[0], rows[1], rows[2], documents, kwargs, pattern)
        else:
            assert documents is not None
            output = attend(rows[0], rows[1], rows[2], documents, pattern)  # [1, B * T, H, Dv]
        return output.view(query.shape[0], query.shape[2], *output.shape[2:]), None
    if softcap is None and s_aux is None:
        options: dict[str, Any] = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        options |= {"position_bias": position_bias, **kwargs}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return attend_unpacked(query, key, value, pattern), None


def end_to_end(states: Tensor) -> Tensor:
    """Reshapes `[B, H, T, D]` to `[1, H, B * T, D]`, one row after the other."""
    return states if states.shape[0] == 1 else states.transpose(0, 1).flatten(1, 2).unsqueeze(0)


def attend_unpacked(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern) -> Tensor:
    """Does what sdpa attention would do if it knew softcap and sinks: same shapes, same reading of a missing mask
    (causal for more than one query, over the first T keys, as an empty static cache is longer)."""
    q_length, mask = query.shape[2], pattern.mask
    if mask is None and pattern.causal and q_length > 1:
        key, value = key[:, :, :q_length], value[:, :, :q_length]
        mask = causal_mask(q_length, None, query.device)
    return attend_dense(query, key, value, mask, pattern).transpose(1, 2).contiguous()


def packed_pattern(
    module: nn.Module, query: Tensor, documents: Documents | None, pattern: Pattern, kwargs: Mapping
) -> Pattern:
    """Returns `pattern` with the layer's window; refuses what a packed layer may ask for and would not get."""
    if pattern.mask is not None:
        if pattern.mask.dim() != 4 or pattern.mask.shape[-2:] != (query.shape[2], query.shape[2]):
            raise refusal(f"a mask of shape {tuple(pattern.mask.shape)} for one row of documents")
        return pattern  # a mask already holds the window
    for name in ("indices", "block_indices", "sinks"):
        if kwargs.get(name) is not None:
            raise refusal(f"`{name}`, which {type(module).__name__} passes to its attention")
    if pattern.bias is not None and query.shape[0] > 1:
        raise refusal("a position bias for several rows of documents")
    if kwargs.get("output_attentions"):
        raise refusal("output_attentions, because attention weights are never formed", "leave output_attentions out")
    if "sliding_window" in kwargs:
        return replace(pattern, window=kwargs["sliding_window"])
    window = unsaid_window(module)
    if window is None:
        return pattern
    # in a graph, a number that is looked at must stay what it is, so it is looked at here only
    longest = kwargs.get("max_length_q", query.shape[2]) if documents is None else documents.longest
    if kwargs.get(SHARED) is not None:
        longest = kwargs[SHARED].longest
    if longest > window:
        what = f"the window of {window} that {type(module).__name__} does not pass to its attention"
        raise refusal(what, f"keep documents within {window} tokens, or use sdpa")
    return pattern


def unsaid_window(module: nn.Module) -> int | None:
    """Returns the window of the config, if it may concern this layer."""
    config = getattr(module, "config", None)
    layer_types, layer = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if layer_types and layer is not None and layer_types[layer] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


# ----------------------------------------------------------------------------------------- the documents


def find_documents(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: Mapping
) -> Documents | None:
    """Finds the documents of a row, or returns None for a batch that sdpa attention can take as it is.

    A plain row without mask is one document: that is sdpa's own reading, and keeps a window in force.
    """
    rows, length = query.shape[0], query.shape[2]
    documents = documents_in(kwargs)
    if documents is not None:
        if rows > 1 or not attends_itself(module, query, key):
            if len(documents.bounds) == 2:
                return None
            raise refuse_others(module, query, key)
        check_fit(documents.bounds, length)
        if kwargs.get(SHARED) is None:
            check_keys(documents, kwargs)
        return documents
    if not attends_itself(module, query, key) or mask is not None:
        return None
    positions, plain = kwargs.get("position_ids"), Documents(bounds=(0, length), device=query.device)
    if not torch.is_tensor(positions) or positions.shape != (rows, length):
        return plain if rows == 1 else None
    documents = documents_of(positions, bounds_from_positions)
    return documents if rows == 1 or len(documents.bounds) > rows + 1 else None


def find_source(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: Mapping) -> Tensor | None:
    """Finds the tensor that tells of the documents of a row, without reading it: `find_documents` for a graph.

    Returns:
        int32 `[S + 1]` offsets, on the host where the batch has them there; or `[B, T]` positions; or None.
    """
    rows, length = query.shape[0], query.shape[2]
    offsets = kwargs.get("cu_seq_lens_q")
    if offsets is not None:
        bounds = kwargs.get(BOUNDS)
        if rows > 1 or not attends_itself(module, query, key):
            if offsets.shape[0] == 2:
                return None
            raise refuse_others(module, query, key)
        return offsets if bounds is None else bounds.offsets
    if not attends_itself(module, query, key) or mask is not None:
        return None
    positions = kwargs.get("position_ids")
    if not torch.is_tensor(positions) or positions.shape != (rows, length):
        return torch.arange(0, length + 1, length, dtype=torch.int32) if rows == 1 else None
    return positions


def attends_itself(module: nn.Module, query: Tensor, key: Tensor) -> bool:
    return key.shape[2] == query.shape[2] and not getattr(module, "is_cross_attention", False)


def refuse_others(module: nn.Module, query: Tensor, key: Tensor) -> ModelError:
    shapes = f"queries {tuple(query.shape)} and keys {tuple(key.shape)}"
    return refusal(f"attention from documents to something else, as in {type(module).__name__}: {shapes}")
