"""Where the documents of a flat batch begin and end, known on the host while the batch itself is on a device.

    batch["cu_seq_lens_q"]      int32 [S + 1], moved to the device with the other tensors: what kernels read
    batch["document_bounds"]    Bounds, the same numbers, which stay on the host: what Python reads

A trainer moves the tensors of a batch and leaves everything else as it is, so the numbers reach the attention without
being read back from the device, which would wait for all that the device still has to do.
"""

from __future__ import annotations

from torch import Tensor

KEY = "document_bounds"


class Bounds:
    """The offsets of the documents of one row, on the host.

    Not a dataclass and not a tuple: what moves batches to a device, or wraps models for engines, looks into those.

    Attributes:
        offsets: int32 `[S + 1]` on the CPU, from 0 to T; equal neighbours are empty documents. A tensor, because
            `torch.compile` takes a graph for any numbers in a tensor, and compiles anew for every tuple of them.
        documents: the offsets without empty documents: `[0, 3, 3, 5]` is `(0, 3, 5)`.
    """

    def __init__(self, offsets: Tensor):
        assert offsets.device.type == "cpu", f"bounds belong on the host, and these are on {offsets.device}"
        self.offsets = offsets
        self.documents = tuple(dict.fromkeys(offsets.tolist()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bounds) and self.documents == other.documents

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Bounds({self.documents})"
