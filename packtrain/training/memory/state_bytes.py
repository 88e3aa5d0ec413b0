"""Bytes of model states that this rank holds, counted on its tensors, whichever engine holds them.

Views of one storage count once (ZeRO-1/2 keep all parameters in one flat buffer, padded to the world size), and a
sharded parameter counts as what is here. Kinds:

    parameters           what forward and backward compute with, frozen ones included
    master weights       the float32 copies that DeepSpeed's optimizer steps (of trained parameters)
    gradients            in whatever form they exist at the moment of counting
    optimizer states     Adam's two moments
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

# Where DeepSpeed's optimizers (0.16 to 0.19) keep what no torch optimizer has.
MASTER_WEIGHTS = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups", "fp32_groups_flat")
GRADIENTS = ("averaged_gradients", "all_grad_tensors", "grad_partitions_flat_buffer")


def state_bytes(model: nn.Module, optimizer: Any) -> dict[str, int]:
    """Counts the bytes per kind on this rank.

    Args:
        model: the unwrapped model.
        optimizer: what `accelerator.prepare` returned, or a torch optimizer.
    """
    chain = list(_unwrapped(optimizer))
    base = chain[-1]
    parameters = list(model.parameters())
    held = [tensor for parameter in parameters for tensor in _shards(parameter)]
    master = [t for wrapper in chain for name in MASTER_WEIGHTS for t in _tensors(getattr(wrapper, name, None))]
    stepped = [p for group in base.param_groups for p in group["params"]]
    gradients = [p.grad for p in (*parameters, *master, *stepped) if p.grad is not None]
    gradients += [t for wrapper in chain for name in GRADIENTS for t in _tensors(getattr(wrapper, name, None))]
    states = [t for state in base.state.values() for t in _tensors(list(state.values())) if t.dim()]

    master += stepped  # where there is no copy these are the parameters, which count once
    counted: set[int] = set()  # storages, so that a view of something counted before doesn't count again
    kinds = {"parameters": held, "gradients": gradients, "master weights": master, "optimizer states": states}
    return {kind: _new_bytes(tensors, counted) for kind, tensors in kinds.items()}


def _unwrapped(optimizer: Any) -> Iterator[Any]:
    """Yields accelerate's wrapper, DeepSpeed's optimizer, torch's: each holds the next as `.optimizer`."""
    while optimizer is not None:
        yield optimizer
        optimizer = getattr(optimizer, "optimizer", None)


def _shards(parameter: Any) -> Iterator[torch.Tensor]:
    """Yields what this rank holds of a parameter: its shard, and under ZeRO-3 the whole where it is gathered."""
    if hasattr(parameter, "ds_tensor"):
        yield parameter.ds_tensor
    yield parameter.to_local() if hasattr(parameter, "to_local") else parameter.data


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yields every tensor in nested lists, tuples and mappings."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _new_bytes(tensors: Iterable[torch.Tensor], counted: set[int]) -> int:
    """Counts the bytes of the storages of `tensors` that aren't in `counted` yet; adds them."""
    total = 0
    for tensor in tensors:
        storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
        if storage.data_ptr() not in counted and storage.nbytes():
            counted.add(storage.data_ptr())
            total += storage.nbytes()
    return total
