"""What a document costs an architecture that the formula of `packtrain.packing.cost` does not describe.

State-space models, linear attention, convolutions, sparse attention and experts of all shapes: the FLOPs of a forward pass
are counted on the model itself, without its weights, for two lengths. Through two points goes one `linear * length +
quadratic * length**2`. Attention that is looked up by name counts as of a kernel that skips what is masked, within a sliding
window as linear; everything else counts as transformers computes it without kernels.

A count is kept in the cache of tokenised data (`counting`). Imports no torch at its top.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from typing import Any

from packtrain.errors import PlanError
from packtrain.modeling.counting import cache_path, inputs_of, keep_count, one_of_each, whole_chunks
from packtrain.packing.cost import Cost, config_at_hand
from packtrain.recipe.sections import ModelSection

logger = logging.getLogger(__name__)

# Transformers that the formula is known to describe, so that planning them needs no torch. Any other is counted.
PLAIN = frozenset(
    "gemma gemma2 gemma3_text gpt2 llama mistral mixtral olmo olmo2 opt phi3 qwen2 qwen2_moe qwen3 qwen3_moe smollm3".split()
)
_ATTENTION = "packtrain_flops"
_LENGTH = 32  # tokens of the shorter pass


def cost_of(config: Any) -> Cost:
    """Returns the cost model of a transformers config: by formula for a plain transformer, else counted, and the cost of
    tokens alone where neither can be had."""
    text = config.get_text_config()
    return _cost(str(text.model_type), text.to_dict(), lambda: text)


def find_cost(section: ModelSection) -> Cost | None:
    """Returns the cost model of a recipe's architecture, or None (tokens count) where its config isn't at hand."""
    fields = config_at_hand(section)
    kind = str(fields.get("model_type"))
    if not fields:
        return None
    if kind == "None":
        return _by_formula(fields)

    def config() -> Any:
        from transformers import CONFIG_MAPPING

        return CONFIG_MAPPING[kind].from_dict(dict(fields)).get_text_config()

    return _cost(kind, fields, config)


def _cost(kind: str, fields: Mapping[str, Any], config: Any) -> Cost:
    if kind in PLAIN:
        return _by_formula(fields) or Cost()
    path = cache_path("costs", fields)
    try:
        return Cost(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, PlanError):
        pass
    try:
        counted = count_cost(config())
    except Exception as error:  # a model may raise anything on tensors without values
        logger.debug("the FLOPs of %s were not counted: %s", kind, error)
        counted = _by_formula(fields) or Cost()
    keep_count(path, {"linear": counted.linear, "quadratic": counted.quadratic})
    return counted


def _by_formula(fields: Mapping[str, Any]) -> Cost | None:
    try:
        return Cost.of_config(fields)
    except (PlanError, TypeError):  # fields of another architecture's shape
        return None


def count_cost(config: Any) -> Cost:
    """Counts the FLOPs of one forward pass of a config's layers, at two lengths, without memory for its weights.

    One layer of every kind is run, and counts as often as there are layers of its kind.

    Raises:
        Exception: whatever the model raises on tensors without values.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():  # tensors without memory, which models take for tracing and don't read
        return _counted(config, _build(config))


def _counted(config: Any, model: Any) -> Cost:
    shorter = whole_chunks(config, _LENGTH)
    with one_of_each(model) as layers:
        passes = [_count(model, layers, inputs_of(model, 2, length)) for length in (shorter, 2 * shorter)]
    (linear, quadratic, first), (*_, second) = passes
    curved = max(0.0, (second - 2 * first) / (2 * shorter**2))
    return Cost(linear=linear + first / shorter - curved * shorter, quadratic=quadratic + curved)


def _build(config: Any) -> Any:
    """Builds the layers of a config, with the attention that counts itself where the model takes it."""
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModel

    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, lambda *args, **kwargs: None)
    tries = (
        {"attn_implementation": _ATTENTION, "experts_implementation": "batched_mm"},
        {"attn_implementation": _ATTENTION},
    )
    for settings in tries:
        try:
            return AutoModel.from_config(copy.deepcopy(config), **settings).eval()
        except Exception as error:  # its own attention or experts only
            logger.debug("%s: %s", config.model_type, error)
    return AutoModel.from_config(copy.deepcopy(config)).eval()


_calls: list[tuple[float, int | None]] = []  # of the attention that counts: FLOPs of a pair of tokens, and the window


def _attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
    window = kwargs.get("sliding_window") or getattr(module, "sliding_window", None)
    _calls.append((2.0 * query.shape[1] * (query.shape[-1] + value.shape[-1]), window))
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


def _count(model: Any, layers: dict[Any, int], inputs: dict[str, Any]) -> tuple[float, float, float]:
    """Runs a model on two rows; returns what registered attention costs per token and per pair of tokens, and the other
    FLOPs of one row."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    linear, quadratic, flops = 0.0, 0.0, 0.0
    counter = FlopCounterMode(display=False)
    begun: list[tuple[int, int]] = []

    def before(layer: Any, args: Any) -> None:
        begun.append((counter.get_total_flops(), len(_calls)))

    def after(layer: Any, args: Any, output: Any) -> None:
        nonlocal flops
        at, call = begun.pop()
        flops += (layers[layer] - 1) * (counter.get_total_flops() - at)
        _calls.extend((layers[layer] - 1) * _calls[call:])

    _calls.clear()
    handles = [layer.register_forward_pre_hook(before) for layer in layers]
    handles += [layer.register_forward_hook(after) for layer in layers]
    try:
        with counter, torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    for pair, window in _calls:
        linear, quadratic = (linear + pair * window, quadratic) if window else (linear, quadratic + pair / 2)
    return linear, quadratic, (flops + counter.get_total_flops()) / len(inputs["input_ids"])
