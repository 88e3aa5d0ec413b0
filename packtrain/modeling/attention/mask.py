"""The mask function of `packtrain_varlen`: no mask where the attention function can do without one.

What may be left out is told by which code a mask function of transformers runs, never by a guess.

Before it calls a mask function, transformers reads from the device whether `position_ids` are packed
(`find_packed_sequence_indices`), once per kind of mask in a forward pass. That is the one host read left to a flat batch:
only a batch without positions, with a mask made beforehand, or with a cache is spared it, and each of these is another
batch to a model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import masking_utils


def varlen_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs,
) -> Tensor | None:
    """Makes the mask for `varlen_attention_forward`: None for one row whose mask says no more than causality, window
    and documents (all of which the attention function gets by other ways), else what sdpa would get.

    Never None on account of a guess: a mask function that is not made of transformers' own causal, window
    and document pieces goes to sdpa's mask builder, and so does anything with padding or several rows.
    """
    one_row = batch_size == 1 and attention_mask is None and q_length == kv_length
    if one_row and isinstance(q_offset, int) and q_offset == kv_offset == 0:
        pieces = mask_pieces(mask_function)
        # Without documents, a caller that forbids the skip wants to see a mask (to join it with another).
        if pieces <= CAUSAL | DOCUMENTS and (allow_is_causal_skip or pieces & DOCUMENTS):
            return None
    return masking_utils.sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )


def mask_pieces(mask_function: Any) -> frozenset:
    """Returns the code objects of the elementary functions that a mask function of transformers is put together from.

    `create_causal_mask` hands over nested closures, for a packed batch with a window for example
    `and_masks(same document, positions within the document(and_masks(window, causal)))`. What such a closure
    computes is told exactly by which code it runs; anything unknown stays in the result as itself.
    """
    code = getattr(mask_function, "__code__", mask_function)
    if code not in COMBINERS:
        return frozenset([code])
    cells = [cell.cell_contents for cell in mask_function.__closure__]
    parts = [part for cell in cells for part in (cell if isinstance(cell, tuple) else (cell,))]
    inner = frozenset().union(*(mask_pieces(part) for part in parts if callable(part)))
    return inner if code == AND_CODE else inner | {code}


def _code(factory_name: str, *arguments) -> frozenset:
    """Returns the code that a mask factory of transformers returns; empty where this version has no such factory."""
    factory = getattr(masking_utils, factory_name, None)
    return frozenset() if factory is None else frozenset([factory(*arguments).__code__])


(AND_CODE,) = _code("and_masks")
REMAP = _code("remap_positions_for_packed_sequence", masking_utils.causal_mask_function, None)
CAUSAL = frozenset([masking_utils.causal_mask_function.__code__]) | _code("sliding_window_overlay", 1)
DOCUMENTS = _code("packed_sequence_mask_function", None) | REMAP
COMBINERS = REMAP | {AND_CODE}
