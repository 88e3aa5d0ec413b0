"""Experiments on a model: what do the outputs of a document depend on?

Documents are laid out in every way that batches come in, and three questions are asked:

- *together or alone*: how far are a document's outputs from those it has by itself?
- *a changed neighbour*: which outputs move when the tokens of another document change?
- *changed padding*: which outputs of real tokens move when padding gets other tokens, or more of it?

    row 0   a a a a a a a a a b b b b b        flat: rows 0 and 1 one after the other, `[1, 28]`
    row 1   c c c d d d d d d d d d d d        rows: as drawn, `[2, 14]`       padded: four rows of 11
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from packtrain.modeling.audit.settings import base

LENGTHS = (9, 5, 3, 11)  # two rows of 14; the longest are longer than the windows of tiny models
PRECISION = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 4e-2}
FEWEST = 4  # ordinary tokens, for documents in which every token can be another
MANY, SMALL = 50_000_000, 1_000_000  # weights
Place = tuple[int, int, int]  # row, start, stop of a document


@dataclass(frozen=True, kw_only=True)
class Laid:
    """Documents in a batch: what the model is called with, and where each of them is."""

    batch: dict[str, Any]
    places: list[Place]


# --------------------------------------------------------------------------------------------- the documents


def sample_documents(model: nn.Module, lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[Tensor]:
    """Draws random ordinary tokens, int64 `[L]` each, on the model's device; no special token among them."""
    embedding = base(model).get_input_embeddings()
    config = base(model).config.get_text_config()
    ids = (value for name, value in vars(config).items() if name.endswith("_token_id"))
    special = {value for value in ids if isinstance(value, int)} | set(range(4))
    rows = getattr(embedding, "num_embeddings", None) or config.vocab_size
    tokens = range(min(rows, 4096))
    ordinary = torch.tensor([token for token in tokens if token not in special])
    if len(ordinary) < FEWEST:  # a vocabulary that is hardly more than its special tokens
        ordinary = torch.tensor([*tokens])
    generator = torch.Generator().manual_seed(seed)
    picked = (torch.randint(len(ordinary), (length,), generator=generator) for length in lengths)
    return [ordinary[choice].to(next(model.parameters()).device) for choice in picked]


# ------------------------------------------------------------------------------------------------- layouts


def flat(documents: list[Tensor], start: int, pad: int) -> Laid:
    """Lays documents out as packtrain does: one row, positions, offsets and sequence numbers, no mask."""
    laid = positions(documents, start, pad)
    lengths = torch.tensor([len(document) for document in documents])
    bounds = torch.tensor([0, *accumulate(lengths.tolist())], dtype=torch.int32, device=documents[0].device)
    numbers = torch.arange(len(documents), dtype=torch.int32).repeat_interleave(lengths)[None]
    longest = int(lengths.max())
    offsets = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    return Laid(batch=laid.batch | offsets | {"seq_idx": numbers.to(bounds.device)}, places=laid.places)


def positions(documents: list[Tensor], start: int, pad: int) -> Laid:
    """Lays documents out as stock collators do: one row and positions that restart, nothing else."""
    bounds = [0, *accumulate(len(document) for document in documents)]
    batch = {"input_ids": torch.cat(documents)[None], "position_ids": restarting(documents, start)[None]}
    return Laid(batch=batch, places=[(0, a, b) for a, b in pairwise(bounds)])


def masked(documents: list[Tensor], start: int, pad: int) -> Laid:
    """Lays out a flat batch with an attention mask of ones, as tokenizers and collators like to add."""
    laid = flat(documents, start, pad)
    return Laid(batch=laid.batch | {"attention_mask": torch.ones_like(laid.batch["input_ids"])}, places=laid.places)


def rows(documents: list[Tensor], start: int, pad: int) -> Laid:
    """Lays out packed rows of equal length, `[2, 14]`, with positions that restart."""
    half = len(documents) // 2
    parts = [documents[:half], documents[half:]]
    batch = {
        "input_ids": torch.stack([torch.cat(part) for part in parts]),
        "position_ids": torch.stack([restarting(part, start) for part in parts]),
    }
    places = []
    for row, part in enumerate(parts):
        bounds = [0, *accumulate(len(document) for document in part)]
        places += [(row, a, b) for a, b in pairwise(bounds)]
    return Laid(batch=batch, places=places)


def padded(documents: list[Tensor], start: int, pad: int, *, left: bool = False, extra: int = 0) -> Laid:
    """Lays out one document per row, padded to the longest and `extra` more, with a mask."""
    width = max(len(document) for document in documents) + extra
    shape, device = (len(documents), width), documents[0].device
    ids = torch.full(shape, pad, device=device)
    mask, places = torch.zeros(shape, dtype=torch.int64, device=device), []
    for row, document in enumerate(documents):
        first = width - len(document) if left else 0
        places.append((row, first, first + len(document)))
        ids[row, first : first + len(document)] = document
        mask[row, first : first + len(document)] = 1
    position_ids = (mask.cumsum(1) - 1).clamp_min(0) + start
    return Laid(batch={"input_ids": ids, "attention_mask": mask, "position_ids": position_ids}, places=places)


def restarting(documents: list[Tensor], start: int) -> Tensor:
    return torch.cat([torch.arange(len(document), device=document.device) + start for document in documents])


LAYOUTS: dict[str, Callable[..., Laid]] = {
    "flat": flat,
    "positions": positions,
    "masked": masked,
    "rows": rows,
    "padded": padded,
}


# ------------------------------------------------------------------------------------------- the experiments


def outputs(model: nn.Module, laid: Laid, use_cache: bool = False) -> Tensor:
    """Computes logits (or last hidden states, also below a head that pools) `[B, T, V]` in float32 or better."""
    takes = inspect.signature(base(model).forward).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
    batch = {name: value for name, value in laid.batch.items() if anything or name in takes}
    if anything or "use_cache" in takes:
        batch["use_cache"] = use_cache
    result = model(**batch)
    found = result.logits if getattr(result, "logits", None) is not None else result[0]
    if found.dim() != 3 or _says_nothing(found):  # a classifier's, one per row; or a head of zeros
        inner = base(model)
        found = getattr(inner, inner.base_model_prefix)(**batch)[0]  # its tokens show in the hidden states below
    found = found[:, -laid.batch["input_ids"].shape[1] :]  # virtual tokens of an adapter stand in front
    return found.to(torch.promote_types(found.dtype, torch.float32))


def _says_nothing(found: Tensor) -> bool:
    """Returns whether a head gives the same whatever it is given, as one that begins at 0 does."""
    return found.shape[1] > 1 and bool((found == found[:1, :1]).all())


def each(found: Tensor, places: list[Place]) -> list[Tensor]:
    """Cuts out the outputs of every document, `[L, V]`."""
    return [found[row, start:stop] for row, start, stop in places]


def alone(model: nn.Module, documents: list[Tensor]) -> list[Tensor]:
    """Computes the outputs of every document by itself, called as plainly as can be."""
    return [outputs(model, Laid(batch={"input_ids": document[None]}, places=[]))[0] for document in documents]


def change(documents: list[Tensor], which: int) -> list[Tensor]:
    """Returns the documents with one in which every token is another (one that occurs in the documents)."""
    pool = torch.cat(documents).unique()
    moved = pool[(torch.searchsorted(pool, documents[which]) + 1) % len(pool)]
    return [*documents[:which], moved, *documents[which + 1 :]]


def dependence(model: nn.Module, layout: Callable[..., Laid], documents: list[Tensor], **options) -> Tensor:
    """Measures `[S, S]`: entry (i, j) is the largest change of document i's outputs when document j's tokens change."""
    start, pad, use_cache = options["start"], options["pad"], options["use_cache"]

    def run(these: list[Tensor]) -> list[Tensor]:
        laid = layout(these, start, pad)
        return each(outputs(model, laid, use_cache), laid.places)

    before = run(documents)
    after = [run(change(documents, which)) for which in range(len(documents))]
    return torch.tensor([[largest(after[j][i], before[i]) for j in range(len(documents))] for i in range(len(before))])


def largest(a: Tensor, b: Tensor) -> float:
    """Returns max |a - b|, infinite where either is not finite."""
    difference = (a - b).abs().max().item()
    return difference if difference == difference else float("inf")


def gradients(model: nn.Module, found: list[Tensor]) -> Tensor:
    """Computes gradients of all trained weights for a fixed random weighting of the outputs of every document, flattened.

    Of a model with more than `MANY` weights only those of its small ones: norms, biases, convolutions, decay rates.
    """
    total = torch.zeros(())
    for number, output in enumerate(found):
        upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(number)).to(output.device)
        total = total + (output * upstream).sum()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if sum(weight.numel() for weight in weights) > MANY:
        weights = [weight for weight in weights if weight.numel() < SMALL] or weights[:1]
    grads = torch.autograd.grad(total, weights, allow_unused=True)
    pairs = zip(grads, weights, strict=True)
    return torch.cat([(torch.zeros_like(weight) if grad is None else grad).flatten() for grad, weight in pairs])


def precision(dtype: torch.dtype) -> float:
    """Returns how far equal computations in another order may lie apart, relative to the largest output."""
    return PRECISION.get(dtype, 4e-2)
