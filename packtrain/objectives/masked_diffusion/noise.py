"""Masked-diffusion noise, drawn where batches are made.

    epoch 0, example 7        q q | a b c E 0 1        prompt | canvas, supervised from end to end
    t = 0.52, p = 0.52        q q | a M c M 0 M        M is the mask token; only masked positions are scored

With the tail `void` the eos is masked in every example, and scored as a token that is masked at p = 1.

Every draw comes from a generator keyed by (seed, epoch, example id): a batch is the same whatever it is packed
with, on whichever rank or data worker, and a resumed run sees bitwise the noise it would have seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from packtrain.data.formats import IGNORED
from packtrain.objectives.masked_diffusion.tails import EOS, Tail, parts_of
from packtrain.packing.collator import Batch, PackCollator, without_first_labels
from packtrain.packing.shuffle import derive_key

_NOISE = 0x6E6F6973  # "nois": keeps these draws apart from others of the same seed


@dataclass(frozen=True, kw_only=True)
class Masking:
    """The settings of masking; the defaults are LLaDA's fine-tuning (arXiv:2502.09992, algorithm 2).

    Attributes:
        mask_token_id: what a masked token becomes.
        weight: of a masked token's loss: 1/p makes the loss a bound on the likelihood, `none` is a plain mean.
        norm: `sequence` divides by the canvas of each document and averages over documents, so every answer
            counts the same; `token` divides by all canvas tokens of the step.
        shift: the logits of a position predict the next one, as in models that were autoregressive before
            (Dream, arXiv:2508.15487).
        eps: least share of tokens masked.
    """

    mask_token_id: int
    weight: Literal["1/p", "none"] = "1/p"
    norm: Literal["sequence", "token"] = "sequence"
    shift: bool = False
    eps: float = 1e-3


def draw_masks(
    lengths: np.ndarray, example_ids: np.ndarray, *, seed: int, epoch: int, eps: float = 1e-3
) -> tuple[np.ndarray, np.ndarray]:
    """Draws one noise level per document, and an independent coin per token with that probability.

        t ~ U(0, 1),  p = (1 - eps) t + eps,  masked ~ Bernoulli(p)

    Args:
        lengths, example_ids: int64 `[S]`.

    Returns:
        p float64 `[S]`, and the coins, bool `[T]`, which do not know yet what is prompt.
    """
    levels, coins = np.empty(len(lengths)), np.empty(int(lengths.sum()))
    key, start = derive_key(_NOISE, seed, epoch), 0
    for document, (length, example_id) in enumerate(zip(lengths.tolist(), example_ids.tolist(), strict=True)):
        generator = np.random.Generator(np.random.Philox(key=np.array([key, example_id % 2**64], dtype=np.uint64)))
        levels[document] = generator.random()
        coins[start : start + length] = generator.random(length)
        start += length
    levels = (1 - eps) * levels + eps
    return levels, coins < np.repeat(levels, lengths)


class NoisingCollator(PackCollator):
    """Turns documents of `TailedExamples` into a noised batch.

    The keys of a plain batch, of which `input_ids` are noised, `labels` keep the clean canvas, `loss_weights` are
    what each token counts (0 where it is not masked), and `parts`, int8, shaped like `labels`: prompt, content,
    eos or tail (see `packtrain.objectives.masked_diffusion.tails`). `supervised_index` are the masked tokens, and
    `has_padding` (bool) says whether there is any.

    Args:
        masking: how to mask and weigh.
        tail: the tail of the documents, to tell the parts, and whether the eos is always masked.
        seed, epoch: of the noise.
        layout: the arguments of `PackCollator`.
    """

    def __init__(self, masking: Masking, tail: Tail, *, seed: int, epoch: int = 0, **layout: Any):
        super().__init__(**layout)
        self.masking, self.tail, self.seed, self.epoch, self._layout = masking, tail, seed, epoch, layout

    def at_epoch(self, epoch: int) -> NoisingCollator:
        """Returns the same collator with the noise of another epoch."""
        return NoisingCollator(self.masking, self.tail, seed=self.seed, epoch=epoch, **self._layout)

    def collate(
        self,
        input_ids: np.ndarray,
        labels: np.ndarray,
        lengths: np.ndarray,
        example_ids: np.ndarray,
        supervised: np.ndarray | None = None,
    ) -> Batch:
        """Makes a noised batch; arguments as `collate_flat`."""
        labels = without_first_labels(labels, lengths)  # [T]
        masking, canvas = self.masking, labels != IGNORED  # [T]
        levels, coins = draw_masks(lengths, example_ids, seed=self.seed, epoch=self.epoch, eps=masking.eps)
        parts = parts_of(input_ids, labels, lengths, self.tail)  # [T]
        always = (parts == EOS) & self.tail.hides_end  # [T]
        masked = canvas & (coins | always)  # [T]
        batch = super().collate(np.where(masked, masking.mask_token_id, input_ids), labels, lengths, example_ids)
        document = np.repeat(np.arange(len(lengths)), lengths)  # [T]
        weights = np.ones(len(labels))  # [T]
        if masking.weight == "1/p":
            weights = weights / np.where(always, 1.0, levels[document])
        if masking.norm == "sequence":
            weights = weights / np.maximum(np.bincount(document, canvas, len(lengths)), 1)[document]
        weights = np.where(masked, weights, 0.0).astype(np.float32)
        batch["loss_weights"] = lay_out(weights, batch)
        batch["supervised_index"] = batch["loss_weights"].flatten().nonzero().flatten()
        batch["has_padding"] = batch["labels"].numel() > len(labels)
        batch["parts"] = lay_out(parts, batch)
        return batch


def lay_out(values: np.ndarray, batch: Batch) -> torch.Tensor:
    """Lays values `[T]` of documents end to end out in the shape of the batch's `input_ids`; 0 on padding."""
    result = torch.zeros(batch["input_ids"].shape, dtype=torch.from_numpy(values).dtype)
    real = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(result, dtype=torch.bool)
    result[real] = torch.from_numpy(values)
    return result
