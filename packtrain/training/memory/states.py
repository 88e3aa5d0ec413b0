"""Bytes of parameters, gradients and optimizer states that a rank holds, by engine.

ZeRO's formulas for Adam in mixed precision (Rajbhandari et al. 2020, arXiv:1910.02054, section 3 and table 1), per
trained parameter on N ranks: DDP 16, ZeRO-1 4 + 12/N, ZeRO-2 2 + 14/N, ZeRO-3 16/N. Frozen parameters (LoRA) have no
gradients and no optimizer states: 2, or 2/N under ZeRO-3. Here they are spelt out by kind and to the byte, with
DeepSpeed's padding and with what its step holds for a moment, as `tests/launch` finds them in its tensors.

Without DeepSpeed nobody keeps float32 master weights: the weights are what the recipe's `dtype` says, the
optimizer states have their dtype, and autocast (`bf16: true` on float32 weights) adds a half-precision copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

EXACT, MEASURED, ESTIMATED = "exact", "measured", "estimated"
DEVICE, HOST, NVME = "device", "host", "nvme"
ENGINES = ("ddp", "zero1", "zero2", "zero3", "zero3_offload_cpu", "zero3_offload_nvme", "fsdp2")
BUCKET_ELEMENTS = 50_000_000  # reduce_bucket_size of launch/deepspeed/zero1.json and zero2.json
NVME_PARAMETERS, NVME_OPTIMIZER = (5, 100_000_000), 4  # DeepSpeed's defaults: buffers (of elements)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a plan: bytes of one rank, where they are (`device`, `host`, `nvme`), and how they are known."""

    what: str
    bytes: int
    where: str = DEVICE
    basis: str = EXACT
    transient: bool = False  # there for a moment of the optimizer's step, when activations are gone


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Elements of every parameter of a model, and bytes of an element as it is loaded.

    `layer` and `outside` are elements of one decoder layer, and of everything that is in no layer (embeddings, head).
    `quantised` of the frozen ones take `quantised_itemsize` bytes each, with the scales of their blocks.
    """

    trained: Sequence[int]
    frozen: Sequence[int]
    trained_itemsize: int
    frozen_itemsize: int
    layer: int
    outside: int
    hidden_size: int
    quantised: int = 0
    quantised_itemsize: float = 0.0

    def frozen_bytes(self, item: int, shards: int = 1) -> int:
        """Returns the bytes of the frozen parameters on a rank, whose elements have `item` bytes unless quantised."""
        if not self.quantised:
            return item * _sharded(self.frozen, shards)
        others = item * (sum(self.frozen) - self.quantised)
        return -(-(others + math.ceil(self.quantised_itemsize * self.quantised)) // shards)


def model_states(
    parameters: Parameters, engine: str, ranks: int, *, half: bool, accumulates: bool = True
) -> list[Line]:
    """Lists the lines of one rank, activations left out.

    Args:
        engine: one of `ENGINES`.
        ranks: data-parallel ranks.
        half: mixed precision in bfloat16 or float16.
        accumulates: updates have more than one micro-batch.
    """
    assert engine in ENGINES, engine
    if engine.startswith("zero"):
        return _deepspeed(parameters, engine, ranks, half, accumulates)
    return _torch(parameters, ranks if engine == "fsdp2" else 1, ranks, half)


def _torch(p: Parameters, shards: int, ranks: int, half: bool) -> list[Line]:
    """Lists DDP (`shards` 1) and FSDP2: weights, gradients and both moments in the dtype of the weights."""
    trained = _sharded(p.trained, shards) * p.trained_itemsize
    frozen = p.frozen_bytes(p.frozen_itemsize, shards)
    lines = [
        Line(what="parameters", bytes=trained + frozen),
        Line(what="gradients", bytes=trained),
        Line(what="optimizer states", bytes=2 * trained),
    ]
    computed = 2 if half else p.frozen_itemsize if p.frozen else p.trained_itemsize
    if shards > 1:  # the root unit stays gathered from forward to backward, and one layer while the next is fetched
        lines.append(Line(what="gathered layers", bytes=computed * (p.outside + 2 * p.layer), basis=ESTIMATED))
        return lines
    if half:
        cast = sum(p.trained) * (p.trained_itemsize > 2) + (sum(p.frozen) - p.quantised) * (p.frozen_itemsize > 2)
        lines.append(Line(what="autocast's copies", bytes=2 * cast, basis=ESTIMATED))
    if ranks > 1:
        lines.append(Line(what="DDP's buckets", bytes=trained, basis=ESTIMATED))
    return lines


def _deepspeed(p: Parameters, engine: str, n: int, half: bool, accumulates: bool) -> list[Line]:
    stage, item = int(engine[4]), 2 if half else 4
    offload = engine.partition("_offload_")[2]  # "", "cpu" or "nvme"
    where = {"": DEVICE, "cpu": HOST, "nvme": NVME}[offload]
    grads_at = HOST if offload else DEVICE
    adapter = p.trained_itemsize if stage == 3 and p.frozen else item  # ZeRO-3 doesn't cast adapters
    if stage == 3:
        shard = _sharded(p.trained, n)
        held = adapter * shard + p.frozen_bytes(item, n)
    else:
        flat = -(-sum(p.trained) // (2 * n)) * 2 * n  # one buffer, padded so that every shard begins at 4 bytes
        shard = flat // n
        held = item * flat + p.frozen_bytes(item)
    whole_gradients = stage == 1 and accumulates  # ZeRO-1 shards them only after the last micro-batch
    gradients = item * (sum(p.trained) if whole_gradients else shard)
    basis = ESTIMATED if where == NVME else EXACT  # what is below 1 MiB on a rank stays in memory
    lines = [
        Line(what="parameters", bytes=held, where=where, basis=basis),
        Line(what="gradients", bytes=gradients, where=grads_at),
        Line(what="master weights", bytes=4 * shard, where=where, basis=basis),
        Line(what="optimizer states", bytes=8 * shard, where=where, basis=basis),
    ]
    if stage == 3:
        small = 10 * p.hidden_size  # the persistence threshold that `auto` stands for
        trained, frozen = (sum(size for size in sizes if size <= small) for sizes in (p.trained, p.frozen))
        whole = adapter * trained + item * frozen if n > 1 else 0  # alone, the shard is the whole
        lines.append(Line(what="small parameters, kept whole", bytes=whole))
        working = max(2 * p.layer, p.outside)
        lines.append(Line(what="gathered layers", bytes=item * working, basis=ESTIMATED))
    bucket = p.hidden_size**2 if stage == 3 else min(BUCKET_ELEMENTS, sum(p.trained))
    lines.append(Line(what="buckets", bytes=2 * item * bucket, basis=ESTIMATED))  # two: overlap_comm
    if grads_at == HOST:
        lines.append(Line(what="gradients in float32", bytes=4 * shard, where=HOST))
    elif stage == 3 or half:  # the step's float32 gradients; ZeRO-1/2 let the others go as they convert them
        lines.append(Line(what="gradients in float32", bytes=4 * shard, transient=True))
    if offload == "nvme":
        count, elements = NVME_PARAMETERS
        buffers = item * count * elements + 4 * NVME_OPTIMIZER * max(p.trained, default=0)
        lines.append(Line(what="buffers for NVMe", bytes=buffers, where=HOST, basis=ESTIMATED))
    return lines


def _sharded(elements: Sequence[int], shards: int) -> int:
    """Counts the elements of one rank when every parameter is cut into `shards` equal pieces, the last one padded."""
    return sum(-(-count // shards) for count in elements)
