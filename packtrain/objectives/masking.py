"""Masks of masked language modelling, drawn where batches are made."""

from __future__ import annotations

from typing import Any

import numpy as np

from packtrain.data.formats import IGNORED
from packtrain.packing.collator import Batch, PackCollator, without_first_labels
from packtrain.packing.shuffle import derive_key

_MASKS = 0x6D6C6D  # "mlm": keeps these draws apart from others of the same seed
MASKED, RANDOM = 0.8, 0.1  # shares of the chosen tokens that become the mask, and a token drawn at random


class MaskingCollator(PackCollator):
    """Turns documents into batches in which some tokens are masked, and these alone are supervised.

    Args:
        mask_token_id: what a masked token becomes.
        vocabulary: tokens from which random ones are drawn.
        special_ids: tokens that are never chosen.
        share: of the tokens, to be chosen.
        seed, epoch: of the choice.
        layout: the arguments of `PackCollator`.
    """

    def __init__(
        self,
        *,
        mask_token_id: int,
        vocabulary: int,
        special_ids: tuple[int, ...],
        share: float,
        seed: int,
        epoch: int = 0,
        **layout: Any,
    ):
        super().__init__(**layout)
        self.mask_token_id, self.vocabulary, self.special_ids = mask_token_id, vocabulary, special_ids
        self.share, self.seed, self.epoch, self._layout = share, seed, epoch, layout

    def at_epoch(self, epoch: int) -> MaskingCollator:
        """Returns the same collator with the masks of another epoch."""
        return MaskingCollator(
            mask_token_id=self.mask_token_id,
            vocabulary=self.vocabulary,
            special_ids=self.special_ids,
            share=self.share,
            seed=self.seed,
            epoch=epoch,
            **self._layout,
        )

    def collate(
        self,
        input_ids: np.ndarray,
        labels: np.ndarray,
        lengths: np.ndarray,
        example_ids: np.ndarray,
        supervised: np.ndarray | None = None,
    ) -> Batch:
        """Makes a masked batch; arguments as `collate_flat`. Tokens whose label is -100 are never chosen."""
        may_be = (without_first_labels(labels, lengths) != IGNORED) & ~np.isin(input_ids, self.special_ids)
        masked, targets, start = input_ids.copy(), np.full_like(labels, IGNORED), 0
        for length, example_id in zip(lengths.tolist(), example_ids.tolist(), strict=True):
            here = slice(start, start + length)
            start += length
            candidates = np.flatnonzero(may_be[here])
            if not len(candidates):  # padding, or a document of special tokens
                continue
            key = np.array([derive_key(_MASKS, self.seed, self.epoch), example_id % 2**64], dtype=np.uint64)
            draw = np.random.Generator(np.random.Philox(key=key))
            coins, kinds = draw.random(length), draw.random(length)
            drawn = draw.integers(self.vocabulary, size=length)
            chosen = candidates[coins[candidates] < self.share]
            if not len(chosen):
                chosen = candidates[[coins[candidates].argmin()]]
            targets[here][chosen] = input_ids[here][chosen]
            kind = kinds[chosen]
            masked[here][chosen] = np.where(
                kind < MASKED,
                self.mask_token_id,
                np.where(kind < MASKED + RANDOM, drawn[chosen], input_ids[here][chosen]),
            )
        return super().collate(masked, targets, lengths, example_ids)
