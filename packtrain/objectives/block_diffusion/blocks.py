"""The copies, batches and attention of block diffusion (Fast-dLLM v2, Wu et al., arXiv:2509.26328).

A document is padded with masks to a multiple of the block size D and laid out three times:

    block          0 0 1 1   0 0 1 1   0 0 1 1        D = 2, prompt q, answer a b, one token of padding
    view 1         q M b M   . . . .   . . . .        a masked: a token is masked in exactly one of the views,
    view 2         . . . .   q a M M   . . . .        b masked: so both together supervise every token once
    clean          . . . .   . . . .   q a b M

A view's token attends its own block of its own view (both ways) and all earlier blocks of the clean copy; clean tokens
attend clean blocks up to their own. So a block is restored from its noisy self and the true text before it, as when it
is generated. Masks are drawn with one level per block; logits predict the next token, as the model was trained before:

    loss = sum over both views of -log p(masked token) / supervised tokens

which is the causal objective on this batch. The published recipe runs [view 1; clean] and [view 2; clean]; the clean
copy attends no view, so one serves both and a quarter of the tokens is saved, with the same result (tested).

    name = register(block_size=32); model.set_attn_implementation(name)
    examples = ViewedExamples(examples, mask_token_id, block_size=32)     # their lengths count all three copies
    PackTrainer(model, ..., plan=make_plan(examples.lengths, ...), train_examples=examples,
                collator=BlockCollator(mask_token_id, block_size=32, seed=seed), loss=BLOCK_DIFFUSION)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from packtrain.data.examples import Examples
from packtrain.data.report import DataReport
from packtrain.errors import ModelError, PlanError
from packtrain.modeling.attention.documents import documents_in
from packtrain.modeling.attention.kernels import Pattern, attend_one
from packtrain.objectives.causal import CAUSAL_LM
from packtrain.objectives.examples import DerivedExamples
from packtrain.packing.collator import IGNORED, Batch, PackCollator, collate_flat
from packtrain.packing.scopes import EMPTY_TOKENS
from packtrain.packing.shuffle import derive_key

COPIES = 3  # view 1, view 2, clean


class ViewedExamples(DerivedExamples):
    """Examples as block diffusion lays them out: three copies of each, padded to whole blocks.

        example     q a b                        3 tokens
        document    q a b F  q a b F  q a b F    12 tokens in blocks of 2: view 1, view 2, clean; F is padding

    The copies are equal here; noise is drawn where batches are made (`BlockCollator`). A plan must count all three: a
    micro-batch of `max_tokens` holds what is computed, not what was read.

    Args:
        examples: prompt and answer of each.
        fill_token_id: pads the last block; the mask.
        block_size: D.

    Attributes:
        lengths: int64 `[n]`, tokens of the three copies: what a plan needs.
        supervised: int `[n]`, supervised tokens of the example; each is masked in one of the views.
    """

    def __init__(self, examples: Examples, fill_token_id: int, *, block_size: int):
        self.examples, self.fill_token_id, self.block_size = examples, fill_token_id, block_size
        self.lengths = occupied(np.asarray(examples.lengths, dtype=np.int64), block_size)
        self.supervised = examples.supervised
        self.fingerprint = f"{examples.fingerprint} views of {block_size}"

    @property
    def report(self) -> DataReport:
        """The examples' own report, and what their views are."""
        old, tokens = self.examples.report, int(self.lengths.sum())
        what = f"views: {COPIES} copies of every example, padded to blocks of {self.block_size}"
        note = f"{what}: {old.tokens:,} tokens are laid out as {tokens:,}"
        return replace(old, notes=(*old.notes, note))

    def gather(
        self, example_ids: Sequence[int] | np.ndarray, starts: np.ndarray | None = None, stops: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns documents end to end, as `Examples.gather`; `starts` and `stops` can only be those of whole documents."""
        ids = np.asarray(example_ids, dtype=np.int64)
        whole = (starts is None or not np.any(starts)) and (stops is None or np.array_equal(stops, self.lengths[ids]))
        assert whole, "views can't be cut"
        input_ids, labels = self.examples.gather(ids)
        lengths = np.asarray(self.examples.lengths[ids], dtype=np.int64)
        return lay_out_copies(input_ids, lengths, self.block_size, self.fill_token_id), lay_out_copies(
            labels, lengths, self.block_size, IGNORED
        )


def occupied(lengths: np.ndarray, block_size: int) -> np.ndarray:
    """Counts the tokens that the three copies of examples of these lengths take, int64 `[n]`."""
    return COPIES * -(-lengths // block_size) * block_size


def lay_out_copies(values: np.ndarray, lengths: np.ndarray, block_size: int, fill: int) -> np.ndarray:
    """Returns documents end to end, `[T]`, each padded with `fill` to whole blocks and repeated three times.

    >>> lay_out_copies(np.array([7, 8, 9, 5]), np.array([3, 1]), 2, 0)
    array([7, 8, 9, 0, 7, 8, 9, 0, 7, 8, 9, 0, 5, 0, 5, 0, 5, 0])
    """
    copies = []
    for document in np.split(values, np.cumsum(lengths)[:-1]):
        copies += [np.pad(document, (0, -len(document) % block_size), constant_values=fill)] * COPIES
    return np.concatenate(copies)


BLOCK_DIFFUSION = CAUSAL_LM  # on batches of a `BlockCollator`
_BLOCK = 0x626C6F63  # "bloc": keeps these draws apart from others of the same seed


# ------------------------------------------------------------------------------------------------------ batches


class BlockCollator(PackCollator):
    """Turns documents of `ViewedExamples` into flat batches of two complementary views and a clean copy.

    The keys of a flat batch, in which each document is its three copies: `cu_seq_lens_*` bound all three together,
    `position_ids` restart with every copy, `labels` are set where a view is masked. Called with rows, as a stock
    `transformers.Trainer` does, it makes their copies first.

    Args:
        mask_token_id: what a masked token becomes, and what pads a document's last block.
        block_size: D.
        seed, epoch: of the masks.
        eps: least share of tokens masked in view 1; p = (1 - eps) t + eps with t ~ U(0, 1) for every block.
    """

    def __init__(
        self,
        mask_token_id: int,
        *,
        block_size: int = 32,
        seed: int,
        epoch: int = 0,
        eps: float = 1e-3,
        layout: str = "flat",
    ):
        if layout != "flat":
            fix = "choose a flat strategy, such as balanced or padding_free"
            raise PlanError(
                "must have the flat layout for block diffusion", key="batching.strategy", value=layout, fix=fix
            )
        super().__init__(layout="flat", pad_token_id=mask_token_id)
        self.mask_token_id, self.block_size = mask_token_id, block_size
        self.seed, self.epoch, self.eps = seed, epoch, eps

    def at_epoch(self, epoch: int) -> BlockCollator:
        """Returns the same collator with the masks of another epoch."""
        return BlockCollator(self.mask_token_id, block_size=self.block_size, seed=self.seed, epoch=epoch, eps=self.eps)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Batch:
        """Makes a batch from rows as they were read; see `PackCollator.__call__`."""
        if not features:
            return self.empty()
        ids, labels, lengths, example_ids = self.documents_of(features)
        return self.collate(
            lay_out_copies(ids, lengths, self.block_size, self.mask_token_id),
            lay_out_copies(labels, lengths, self.block_size, IGNORED),
            occupied(lengths, self.block_size),
            example_ids,
        )

    def collate(
        self,
        input_ids: np.ndarray,
        labels: np.ndarray,
        lengths: np.ndarray,
        example_ids: np.ndarray,
        supervised: np.ndarray | None = None,
    ) -> Batch:
        """Makes a noised batch; arguments as `collate_flat`, of documents that `ViewedExamples.gather` made."""
        documents = []
        for start, length, example_id in zip(np.cumsum(lengths) - lengths, lengths, example_ids.tolist(), strict=True):
            here = slice(start, start + length // COPIES)  # the copies are equal: one is enough
            documents.append(self._noised(input_ids[here], labels[here], example_id))
        ids, targets = (np.concatenate(arrays) for arrays in zip(*documents, strict=True))
        batch = collate_flat(ids, targets, lengths, example_ids)
        positions = [np.tile(np.arange(length // COPIES), COPIES) for length in lengths]
        batch["position_ids"] = torch.from_numpy(np.concatenate(positions))[None]
        return batch

    def empty(self) -> Batch:
        """Makes the micro-batch of a rank that has no examples left in a step."""
        row = {"input_ids": np.full(EMPTY_TOKENS, self.mask_token_id), "labels": np.full(EMPTY_TOKENS, IGNORED)}
        return self([row | {"example_id": -1}])

    def _noised(self, clean: np.ndarray, labels: np.ndarray, example_id: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns token ids and labels of view 1, view 2 and the clean copy of a document, end to end."""
        labels = labels.copy()
        labels[0] = IGNORED  # nothing comes before it
        first = draw_block_masks(
            len(clean), self.block_size, example_id, seed=self.seed, epoch=self.epoch, eps=self.eps
        )
        ids, targets = [], []
        for masked in (first & (labels != IGNORED), ~first & (labels != IGNORED)):
            ids.append(np.where(masked, self.mask_token_id, clean))
            targets.append(np.where(masked, labels, IGNORED))
        return np.concatenate([*ids, clean]), np.concatenate([*targets, np.full_like(labels, IGNORED)])


def draw_block_masks(
    length: int, block_size: int, example_id: int, *, seed: int, epoch: int, eps: float = 1e-3
) -> np.ndarray:
    """Draws which tokens view 1 masks, bool `[length]`: one level p per block, one coin per token."""
    key = np.array([derive_key(_BLOCK, seed, epoch), example_id % 2**64], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key))
    levels = (1 - eps) * generator.random(length // block_size) + eps
    return generator.random(length) < np.repeat(levels, block_size)


# ---------------------------------------------------------------------------------------------------- attention


def register(block_size: int) -> str:
    """Makes attention over views known to transformers under the name that is returned. Idempotent."""
    name = f"packtrain_blocks_{block_size}"
    AttentionInterface.register(name, partial(block_attention, block_size=block_size))
    AttentionMaskInterface.register(name, _no_mask)
    return name


@lru_cache(maxsize=1)
def view_masks(lengths: frozenset[int], block_size: int, device: torch.device) -> dict[int, Tensor]:
    """Returns the `view_mask` of every length in a micro-batch: all its layers ask for the same, and a mask is large (0.6
    GiB at 8,192 tokens), so those of one micro-batch are kept and no more."""
    return {length: view_mask(length, block_size, device) for length in lengths}


def view_mask(length: int, block_size: int, device: torch.device | str = "cpu") -> Tensor:
    """Makes the mask of the three copies of a document: bool `[3 length, 3 length]`, True attends."""
    position = torch.arange(COPIES * length, device=device)
    copy, block = position // length, position % length // block_size
    clean = copy == COPIES - 1
    own = (copy[:, None] == copy) & (block[:, None] == block)  # a view's block, both ways
    before = clean & ~clean[:, None] & (block < block[:, None])  # view -> clean text of earlier blocks
    causal = clean & clean[:, None] & (block <= block[:, None])  # clean -> clean, block by block
    return own | before | causal


def block_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    *,
    block_size: int,
    **kwargs,
) -> tuple[Tensor, None]:
    """Computes attention for batches of a `BlockCollator`, as transformers calls it: `[1, H, T, D]` -> `[1, T, H, Dv]`.

    Raises:
        ModelError: another batch, or a sliding window that the documents exceed.
    """
    documents = documents_in(kwargs)
    if documents is None or attention_mask is not None:
        fix = "set another attention for other batches, for example sdpa"
        raise ModelError("block attention works only on batches of a BlockCollator", key="objective.name", fix=fix)
    window = kwargs.get("sliding_window")
    if window is not None and documents.longest > COPIES * window:
        what = f"the model has a window of {window}, which block attention does not apply"
        fix = f"keep examples within {window} tokens"
        raise ModelError(what, key="data.max_length", value=documents.longest // COPIES, fix=fix)
    lengths = [length // COPIES for length in documents.lengths]
    masks = view_masks(frozenset(lengths), block_size, query.device)
    outputs = []
    for length, (start, stop) in zip(lengths, pairwise(documents.bounds), strict=True):
        pattern = Pattern(
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            causal=False,
            mask=masks[length][None, None],
            softcap=softcap,
            sinks=s_aux,
            dropout=dropout,
        )
        one = (states[:, :, start:stop] for states in (query, key, value))
        outputs.append(attend_one(*one, pattern).transpose(1, 2))  # [1, 3 L, H, Dv]
    return torch.cat(outputs, dim=1), None


def _no_mask(*args, **kwargs) -> None:
    """Makes no mask: the attention function has its own."""
