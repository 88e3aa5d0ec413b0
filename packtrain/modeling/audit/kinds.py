"""The kinds of layers that a model or a config has: what one layer shows of an architecture, another may not.

Two layers are of one kind where they are built of the same modules with the same switches: attention or a mixer, a window
or none, rotary positions or none, experts or an MLP, keys of its own or of an earlier layer.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
_INDICES = re.compile(r"layers$|layer_ids$|layer_indices$|_idxs$")  # names of lists of layers by their number
_COMPUTED = ("layers_block_type", "layers_num_experts")  # properties with an entry for every layer
_NUMBER = re.compile(r"idx|index|layer_id|layer_num")  # names of attributes that number a layer


def kind_of(layer: nn.Module) -> Hashable:
    """Returns what a layer is built of: the names and classes of its modules, and their switches."""
    return frozenset(
        (re.sub(r"\b\d+\b", "#", name), type(module).__name__, *_switches(module))
        for name, module in layer.named_modules()
    )


def _switches(module: nn.Module) -> list[tuple[str, object]]:
    found = []
    for name, value in vars(module).items():
        if name.startswith("_") or name == "training" or _NUMBER.search(name):
            continue
        if value is None or isinstance(value, (bool, str)):
            found.append((name, value))
        elif isinstance(value, int):  # a window or none, rotary positions (1) or none (0)
            found.append((name, bool(value)))
    return sorted(found, key=str)


def kinds_in(config: PreTrainedConfig) -> list[tuple]:
    """Returns what a config says of each layer, in the order of layers: its entries in lists with one for every layer, and
    whether lists of layer numbers have it."""
    layers = count_layers(config)
    columns: list[Sequence[Any]] = []
    properties = {name: getattr(config, name, None) for name in _COMPUTED if name not in vars(config)}
    fields: dict[str, Any] = vars(config) | properties
    for name, value in fields.items():
        if is_per_layer(name, value, layers):
            columns.append(list(map(str, value)))
        elif is_of_indices(name, value, layers):
            columns.append([number in value for number in range(layers)])
    return list(zip(*columns, strict=True)) if columns else [()] * layers


def count_layers(config: PreTrainedConfig) -> int:
    counts = (vars(config).get(name) for name in LAYER_COUNTS)
    return next((count for count in counts if isinstance(count, int)), 0)


def is_per_layer(name: str, value: Any, layers: int) -> bool:
    """Returns whether a field has one entry for every layer."""
    return (
        isinstance(value, (list, tuple))
        and len(value) == layers
        and layers > 1
        and not _is_numbers(name, value, layers)
    )


def is_of_indices(name: str, value: Any, layers: int) -> bool:
    """Returns whether a field lists layers by their number."""
    return isinstance(value, (list, tuple)) and 0 < len(value) < layers and _is_numbers(name, value, layers)


def _is_numbers(name: str, value: Any, layers: int) -> bool:
    whole = all(isinstance(entry, int) and not isinstance(entry, bool) and 0 <= entry < layers for entry in value)
    return whole and bool(_INDICES.search(name)) and len(set(value)) == len(value)


def shortest_prefix(kinds: Sequence[Hashable]) -> int:
    """Returns how many of the first layers have every kind.

    >>> shortest_prefix(["sliding", "sliding", "full", "sliding"])
    3
    """
    return max((kinds.index(kind) + 1 for kind in set(kinds)), default=0)
