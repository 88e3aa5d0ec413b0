"""Runs a model on tensors without values, to count what its layers cost and keep; what `cost` and the plan of memory share.

One layer of every kind is run and counts as often as there are layers of its kind. A count takes seconds, and is kept in
the cache of tokenised data, by what was counted and the versions of packages. Imports no torch at its top.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from packtrain.data.store import cache_root
from packtrain.errors import PacktrainError

logger = logging.getLogger(__name__)

_CHUNKS = ("chunk_size", "mamba_chunk_size", "block_size")


def whole_chunks(config: Any, least: int) -> int:
    """Returns the tokens of a pass: at least `least`, and at least as many as one chunk of a chunked scan."""
    chunks = [size for name in _CHUNKS if isinstance(size := getattr(config, name, None), int)]
    return max([least, *chunks])


def inputs_of(model: Any, rows: int, length: int) -> dict[str, Any]:
    """Returns the inputs of a model for rows without padding, int64 `[rows, length]`."""
    import torch

    ids = torch.zeros(rows, length, dtype=torch.long)
    if "attention_mask" in inspect.signature(model.forward).parameters:  # else positions are read
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    return {"input_ids": ids, "use_cache": False}


def stack_of(model: Any) -> tuple[Any, str, Any] | None:
    """Returns the list of a model's layers, and its parent and name there: the outermost list with the most parameters."""
    found: list[tuple[Any, str, Any]] = []
    inside: set[Any] = set()
    for parent in model.modules():
        for name, stack in parent.named_children():
            if type(stack).__name__ == "ModuleList" and parent not in inside:
                found.append((parent, name, stack))
                inside.update(stack.modules())

    def size(stack: Any) -> int:
        return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in stack.parameters())

    return max(found, key=lambda entry: size(entry[2]), default=None)


@contextmanager
def one_of_each(model: Any) -> Iterator[dict[Any, int]]:
    """Leaves a model one layer of every kind while open; yields how often each counts.

    Layers that use what others computed are left as they are, and count once each.
    """
    from packtrain.modeling.audit.kinds import kind_of

    found = stack_of(model)
    if found is None:
        yield {}
        return
    parent, name, stack = found
    if getattr(model.config.get_text_config(), "num_kv_shared_layers", 0):
        yield dict.fromkeys(stack, 1)
        return
    kinds: dict[Any, Any] = {}
    counts: dict[Any, int] = {}
    for layer in stack:
        first = kinds.setdefault(kind_of(layer), layer)
        counts[first] = counts.get(first, 0) + 1
    try:
        setattr(parent, name, type(stack)(counts))
        yield counts
    finally:
        setattr(parent, name, stack)


# ---------------------------------------------------------------------------------------------------- the cache


def cache_path(folder: str, told: Any) -> Path:
    """Returns the file for the count of what `told` describes, which is written as JSON."""
    versions = []
    for package in ("torch", "transformers", "packtrain"):
        try:
            versions.append(version(package))
        except PackageNotFoundError:
            versions.append("")
    text = json.dumps([told, versions], sort_keys=True, default=str)
    return cache_root() / folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def keep_count(path: Path, count: Mapping[str, Any]) -> None:
    """Writes a count to its file; a cache that can't be written is left alone."""
    own = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        own.write_text(json.dumps(count), encoding="utf-8")
        own.replace(path)
    except (OSError, PacktrainError):
        logger.debug("the count was not kept in %s", path)
