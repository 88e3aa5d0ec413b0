"""Sums over tokens and over examples, divided once at the end: means that don't depend on how a set was batched."""

from __future__ import annotations

from typing import Any

import torch

from packtrain.objectives.objective import TokenLosses


def add_sums(total: dict[str, torch.Tensor], more: dict[str, torch.Tensor]) -> None:
    """Add to `total` in place: name -> float64 `[2]`, numerator and denominator."""
    for name, pair in more.items():
        total[name] = total[name] + pair if name in total else pair


def means_of(sums: dict[str, torch.Tensor], skip: tuple[str, ...] = ()) -> dict[str, float]:
    """Numerator / denominator of each sum that counted anything."""
    pairs = {name: pair.tolist() for name, pair in sums.items() if name not in skip}
    return {name: numerator / count for name, (numerator, count) in pairs.items() if count}


def evaluation_sums(losses: TokenLosses, batch: dict[str, Any]) -> torch.Tensor:
    """float64 `[4]`: sum of nll, supervised tokens, sum over examples of their mean nll, examples."""
    documents = document_of(batch).flatten()[losses.index]  # [N]
    count = len(batch["example_ids"])
    nll = losses.nll.double()
    per_document = torch.zeros(2, count, dtype=torch.float64, device=nll.device)
    per_document[0].index_add_(0, documents, nll)
    per_document[1].index_add_(0, documents, torch.ones_like(nll))
    scored = per_document[1] > 0
    means = per_document[0][scored] / per_document[1][scored]
    return torch.stack([nll.sum(), per_document[1].sum(), means.sum(), scored.sum().double()])


def document_of(batch: dict[str, Any]) -> torch.Tensor:
    """int64, the shape of `labels`: which document of the micro-batch each position belongs to."""
    if "cu_seq_lens_q" in batch:
        lengths = batch["cu_seq_lens_q"].diff()  # [S]
        return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)[None]
    rows, width = batch["labels"].shape
    return torch.arange(rows, device=batch["labels"].device)[:, None].expand(rows, width)
