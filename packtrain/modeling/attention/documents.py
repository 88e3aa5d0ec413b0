"""Which documents a call tells of: offsets or positions, and where they are known without reading a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packtrain.errors import ModelError
from packtrain.modeling.attention.kernels import Documents
from packtrain.packing.bounds import KEY as BOUNDS
from packtrain.packing.bounds import Bounds

NAME = "packtrain_varlen"


def documents_in(kwargs: Mapping) -> Documents | None:
    """Returns the documents that the arguments of a call tell of by `cu_seq_lens_q`; None where it is missing.

    Nothing is read from the device where the batch brings `document_bounds`.
    """
    offsets, known = kwargs.get("cu_seq_lens_q"), kwargs.get(BOUNDS)
    if offsets is None:
        return None
    return documents_of(offsets, lambda _: _known(known, offsets) or bounds_from(offsets))


def _known(bounds: Any, offsets: Tensor) -> tuple[int, ...]:
    """Returns the bounds on the host if they are those of the offsets, which are compared where that waits for nothing."""
    if not isinstance(bounds, Bounds) or bounds.offsets.shape != offsets.shape:
        return ()
    on_device = offsets.device.type != "cpu"
    return bounds.documents if on_device or bounds.offsets is offsets or torch.equal(bounds.offsets, offsets) else ()


def documents_of(source: Tensor, read: Callable[[Tensor], tuple[int, ...]]) -> Documents:
    """Returns the documents that `source` tells of, read to the host once per batch rather than once per layer.

    All layers get the same tensor object, so what was read stays on it, for as long as nobody writes to it.
    """
    version = None if source.is_inference() else source._version
    known = getattr(source, "_packtrain_documents", None)
    if known is None or known[0] != version or version is None:
        offsets = source if source.dim() == 1 and source.dtype == torch.int32 else None
        known = (version, Documents(bounds=read(source), device=source.device, offsets=offsets))
        setattr(source, "_packtrain_documents", known)  # noqa: B010 (no attribute of tensors)
    return known[1]


def check_fit(bounds: tuple[int, ...], length: int) -> None:
    """Refuses offsets that don't fit the row: the kernels read whatever memory they point at."""
    if bounds[0] != 0 or bounds[-1] != length or any(a >= b for a, b in pairwise(bounds)):
        shown = f"documents end at {bounds[-1]} of {length} tokens"
        fix = "use a padded layout for virtual tokens (prompt tuning)"
        raise refusal(f"cu_seq_lens that do not fit the row ({shown})", fix)


def check_keys(documents: Documents, kwargs: Mapping) -> None:
    """Refuses keys that lie in other documents than the queries. Bounds on the host are those of both."""
    offsets = kwargs.get("cu_seq_lens_k")
    if offsets is None or kwargs.get(BOUNDS) is not None:
        return
    if documents_of(offsets, bounds_from_cu_seq_lens).bounds != documents.bounds:
        raise refusal("cu_seq_lens_k that differs from cu_seq_lens_q")


def bounds_from_cu_seq_lens(cu_seq_lens: Tensor) -> tuple[int, ...]:
    """Turns `[0, 3, 3, 5]` into `(0, 3, 5)`: an empty document has no tokens to attend with."""
    return tuple(dict.fromkeys(cu_seq_lens.tolist()))


def bounds_from_positions(position_ids: Tensor) -> tuple[int, ...]:
    """Turns `[[0, 1, 2, 0, 1]]` into `(0, 3, 5)`: a document begins with a row and wherever positions don't go up
    by one, which is the rule of transformers' `find_packed_sequence_indices`."""
    rows, length = position_ids.shape
    begins = F.pad(position_ids.diff(dim=1) != 1, (1, 0), value=True)  # [B, T]
    return (*begins.flatten().nonzero().flatten().tolist(), rows * length)


def bounds_from(source: Tensor) -> tuple[int, ...]:
    """Returns the bounds that a tensor tells of: offsets `[S + 1]`, or positions `[B, T]`."""
    return bounds_from_cu_seq_lens(source) if source.dim() == 1 else bounds_from_positions(source)


def refusal(what: str, fix: str = "use sdpa or eager, and check it with `packtrain audit`") -> ModelError:
    return ModelError(f"{NAME} does not support {what}", key="model.attn_implementation", fix=fix)
