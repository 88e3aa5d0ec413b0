"""Documents to tensors: one kernel per layout, and two ways to reach it.

* `MicroBatches`: a dataset of planned micro-batches; gathers tokens straight from the stored examples.
* `PackCollator`: also takes a list of tokenised rows, so it works in a stock `transformers.Trainer`
  (`data_collator=PackCollator(...)`, `remove_unused_columns=False`).

Two documents of 3 and 2 tokens, prompt masked in the first, in the two layouts:

    flat     input_ids     [[ 5,  6,  7,  8,  9]]      padded  input_ids      [[ 5, 6, 7], [ 8, 9,  0]]
             labels        [[-, -,  7,  -,  9]]                labels         [[ -, -, 7], [ -, 9,  -]]     (- is -100)
             position_ids  [[ 0,  1,  2,  0,  1]]              attention_mask [[ 1, 1, 1], [ 1, 1,  0]]
             cu_seq_lens_q [0, 3, 5]                           position_ids   [[ 0, 1, 2], [ 0, 1,  2]]
             seq_idx       [[ 0,  0,  0,  1,  1]]                supervised_index [2, 4]
             supervised_index [2, 4]

A flat batch has no `attention_mask`: with one, transformers lets attention leak between documents.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from operator import index
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from packtrain.data.examples import AnyExamples
from packtrain.data.formats import IGNORED, MASKS
from packtrain.data.tokenised import read_row
from packtrain.errors import DataError, PlanError
from packtrain.packing.bounds import KEY as BOUNDS
from packtrain.packing.bounds import Bounds
from packtrain.packing.packs import offsets_of
from packtrain.packing.plan import MicroBatch
from packtrain.packing.scopes import EMPTY_TOKENS
from packtrain.packing.shapes import Shapes

Batch = dict[str, Any]

logger = logging.getLogger(__name__)


def collate_flat(
    input_ids: np.ndarray,
    labels: np.ndarray,
    lengths: np.ndarray,
    example_ids: np.ndarray,
    *,
    supervised: np.ndarray | None = None,
    factors: np.ndarray | None = None,
    loss_weighting: Literal["token", "example"] = "token",
    position_start: int = 0,
    first_labels: bool = False,
) -> Batch:
    """Lays documents end to end in one row.

    Args:
        input_ids, labels: int64 `[T]`, documents end to end, labels unshifted. Neither is changed.
        lengths: int64 `[S]`, tokens of each document, summing to T.
        example_ids: int64 `[S]`.
        supervised: int64 `[S]`, supervised tokens of the whole example (a document may be a piece of one); None to
            count them here.
        factors: float32 `[T]`, by which the tokens' weights are multiplied; None for 1.
        loss_weighting: "token" gives every supervised token weight 1; "example" 1 / supervised tokens of its example.
        position_start: the model's first position (2 for RoBERTa).
        first_labels: keep the label of the first token of a document, for losses that don't predict it from the one before.

    Returns:
        A flat batch: everything `[1, T]` but `cu_seq_lens_*` int32 `[S + 1]`, `max_length_*` (Python int),
        `document_bounds` (`Bounds`), `supervised_index` int64 `[N]`, the positions whose label is not -100, and
        `example_ids` int64 `[S]`. `loss_weights` is 0 where the label is -100.
    """
    offsets = offsets_of(lengths)  # [S + 1]
    document = np.repeat(np.arange(len(lengths)), lengths)  # [T]
    labels = labels.copy() if first_labels else without_first_labels(labels, lengths)
    positions = np.arange(len(input_ids)) - offsets[document] + position_start  # [T]
    weights = _loss_weights(labels, document, len(lengths), supervised, loss_weighting, factors)
    cu_seq_lens = torch.from_numpy(offsets.astype(np.int32))
    longest = int(lengths.max())
    return {
        "input_ids": torch.from_numpy(input_ids)[None],
        "labels": torch.from_numpy(labels)[None],
        "position_ids": torch.from_numpy(positions)[None],
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": longest,
        "max_length_k": longest,
        BOUNDS: Bounds(cu_seq_lens),
        "seq_idx": torch.from_numpy(document.astype(np.int32))[None],
        "loss_weights": torch.from_numpy(weights)[None],
        "supervised_index": torch.from_numpy(np.flatnonzero(labels != IGNORED)),
        "example_ids": torch.from_numpy(np.asarray(example_ids, dtype=np.int64)),
    }


def collate_padded(
    input_ids: np.ndarray,
    labels: np.ndarray,
    lengths: np.ndarray,
    example_ids: np.ndarray,
    *,
    pad_token_id: int,
    width: int | None = None,
    supervised: np.ndarray | None = None,
    factors: np.ndarray | None = None,
    loss_weighting: Literal["token", "example"] = "token",
    position_start: int = 0,
    first_labels: bool = False,
    padding_side: Literal["right", "left"] = "right",
) -> Batch:
    """Lays out one document per row, padded to `width` (None: the longest).

    Arguments as `collate_flat`. Padding is known by its place, never by its id: where the padding token is also the
    end-of-text token, the real one keeps its label.

    Returns:
        `input_ids`, `labels`, `attention_mask`, `position_ids` int64 `[B, width]`, `loss_weights` float32 `[B, width]`,
        `supervised_index` int64 `[N]` (row-major over `[B, width]`), `example_ids` int64 `[B]`.
    """
    document = np.repeat(np.arange(len(lengths)), lengths)
    labels = labels.copy() if first_labels else without_first_labels(labels, lengths)
    weights = _loss_weights(labels, document, len(lengths), supervised, loss_weighting, factors)

    longest = int(lengths.max())
    width = longest if width is None else width
    if longest > width:
        raise PlanError(
            f"a document of {longest} tokens does not fit into a row of {width}", key="max_length", value=width
        )
    start = np.zeros_like(lengths) if padding_side == "right" else width - lengths  # [B], column of the first token
    columns = np.arange(width)[None]  # [1, width]
    real = (columns >= start[:, None]) & (columns < (start + lengths)[:, None])  # [B, width]

    def rows(values: np.ndarray, fill: float) -> torch.Tensor:
        padded = np.full((len(lengths), width), fill, dtype=values.dtype)
        padded[real] = values
        return torch.from_numpy(padded)

    targets = rows(labels, IGNORED)
    return {
        "input_ids": rows(input_ids, pad_token_id),
        "labels": targets,
        "attention_mask": torch.from_numpy(real.astype(np.int64)),
        "position_ids": torch.from_numpy(np.maximum(columns - start[:, None], 0) + position_start),
        "loss_weights": rows(weights, 0.0),
        "supervised_index": (targets.flatten() != IGNORED).nonzero().flatten(),
        "example_ids": torch.from_numpy(np.asarray(example_ids, dtype=np.int64)),
    }


class PackCollator:
    """Turns documents into a batch of one layout.

    Args:
        layout: "flat" or "padded".
        pad_token_id: for padding, and for micro-batches of padding only.
        padded_to: "longest" of the micro-batch, or "max_length".
        max_length: the width with `padded_to="max_length"`.
        loss_weighting: see `collate_flat`. It decides `loss_weights` alone, which packtrain's own trainer and your own
            loop can use; `transformers.Trainer` and TRL ignore them, so in these "example" has no effect.
        position_start, padding_side, first_labels: see `collate_flat` and `collate_padded`.

    A model that is given flat batches has to isolate the documents itself; `packtrain audit` says which do, and
    `packtrain.attach` checks and prepares it. Without `remove_unused_columns=False` a stock trainer takes the masks of
    rows away before they get here, and all their tokens are supervised, which is logged.

        >>> collator = PackCollator(layout="flat", pad_token_id=0)
        >>> collator([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])["position_ids"]
        tensor([[0, 1, 2, 0, 1]])
    """

    def __init__(
        self,
        layout: Literal["flat", "padded"] = "flat",
        pad_token_id: int = 0,
        padded_to: Literal["longest", "max_length"] | None = None,
        max_length: int | None = None,
        loss_weighting: Literal["token", "example"] = "token",
        position_start: int = 0,
        padding_side: Literal["right", "left"] = "right",
        first_labels: bool = False,
    ):
        if layout not in ("flat", "padded"):
            raise PlanError("must be 'flat' or 'padded'", key="layout", value=layout)
        if loss_weighting not in ("token", "example"):
            raise PlanError("must be 'token' or 'example'", key="objective.loss_weighting", value=loss_weighting)
        if padded_to == "max_length" and max_length is None:
            raise PlanError("must be set for padding to max_length", key="max_length")
        self.layout, self.pad_token_id = layout, pad_token_id
        self.width = max_length if padded_to == "max_length" else None
        self.loss_weighting, self.position_start, self.padding_side = loss_weighting, position_start, padding_side
        self.first_labels = first_labels
        self._logged: set[str] = set()  # columns, and what is said once

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Batch:
        """Makes a batch from tokenised rows: lists, arrays or tensors of integers.

        `input_ids`; and `labels`, or `completion_mask` and/or `assistant_masks` (a token is supervised where all masks are
        1), or none of them (every token is supervised). Tokens at the ends whose `attention_mask` is 0 are padding and
        left out. `example_id` is optional. Text and single values are not used, which is logged once.

        Raises:
            DataError: with row, column and value: no such rows, other lists of numbers, packed rows, a label per row.
        """
        return self.collate(*self.documents_of(features)) if features else self.empty()

    def documents_of(
        self, features: Sequence[Mapping[str, Any]]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Returns rows as `(input_ids, labels, lengths, example_ids)`, documents end to end; see `collate_flat`."""
        if isinstance(features, Mapping):
            what = "is one mapping of columns, and PackCollator takes a list of rows"
            fix = "give [dataset[i] for i in ids], or list(dataset.select(ids))"
            raise DataError(what, key="features", value=list(features), fix=fix)
        places = [f"row {number} of the batch" for number in range(len(features))]
        rows = [
            read_row(feature, where=where, position_start=self.position_start)
            for feature, where in zip(features, places, strict=True)
        ]
        example_ids = [
            _example_id(feature.get("example_id", number), where)
            for number, (feature, where) in enumerate(zip(features, places, strict=True))
        ]
        unlabelled = not any(feature.get(name) is not None for feature in features for name in ("labels", *MASKS))
        self._log_once({name for row in rows for name in row.unused}, unlabelled)
        lengths = np.array([len(row.input_ids) for row in rows], dtype=np.int64)
        ids, labels = (np.concatenate([row[part] for row in rows]) for part in (0, 1))
        return ids, labels, lengths, np.array(example_ids, dtype=np.int64)

    def _log_once(self, unused: set[str], unlabelled: bool) -> None:
        """Logs what the rows' own numbers do not show, once, and in one data-loading worker."""
        worker = get_worker_info()
        if worker is not None and worker.id:
            return
        if new := sorted(unused - self._logged):
            logger.warning("packtrain: PackCollator does not use %s of the rows", ", ".join(new))
        if self.loss_weighting == "example" and "loss_weighting" not in self._logged:
            logger.warning(
                "packtrain: loss_weighting='example' is in the batch's `loss_weights`, which transformers.Trainer and TRL "
                "ignore; packtrain's own trainer, or a loop that multiplies by them, follows it"
            )
            self._logged.add("loss_weighting")
        if unlabelled and "labels" not in self._logged:
            logger.warning(
                "packtrain: the rows that PackCollator gets have no labels and no masks, so every token is supervised (a "
                "Trainer takes masks away before, unless remove_unused_columns=False)"
            )
            self._logged.add("labels")
        self._logged |= unused

    def collate(
        self,
        input_ids: np.ndarray,
        labels: np.ndarray,
        lengths: np.ndarray,
        example_ids: np.ndarray,
        supervised: np.ndarray | None = None,
        factors: np.ndarray | None = None,
    ) -> Batch:
        """Makes a batch from documents end to end; arguments as `collate_flat`."""
        options: dict[str, Any] = {
            "supervised": supervised, "factors": factors,
            "loss_weighting": self.loss_weighting, "position_start": self.position_start,
            "first_labels": self.first_labels,
        }  # fmt: skip
        if self.layout == "flat":
            return collate_flat(input_ids, labels, lengths, example_ids, **options)
        return collate_padded(
            input_ids, labels, lengths, example_ids,
            pad_token_id=self.pad_token_id, width=self.width, padding_side=self.padding_side, **options,
        )  # fmt: skip

    def at_epoch(self, epoch: int) -> PackCollator:
        """Returns the collator of that epoch; this one draws nothing, so it is the same in all."""
        return self

    def titles(self, batch: Mapping[str, Any]) -> list[str]:
        """Says of every document of a batch what it is of its example, for people; nothing where it is the whole of it."""
        return [""] * len(batch["example_ids"])

    def empty(self) -> Batch:
        """Makes the micro-batch of a rank that has no examples left in a step: one document of padding, weight zero."""
        ids = np.full(EMPTY_TOKENS, self.pad_token_id, dtype=np.int64)
        labels = np.full(EMPTY_TOKENS, IGNORED, dtype=np.int64)
        return self.collate(ids, labels, np.array([EMPTY_TOKENS]), np.array([-1]))


class MicroBatches(Dataset):
    """The examples as micro-batches: indexed by a `MicroBatch` of the plan, gives its finished batch.

    `examples` has `gather(example_ids, starts, stops) -> (input_ids [T], labels [T])`, `factors` of the same arguments
    (float32 `[T]`, or None), `supervised`, int32 `[n]`, and `extras(example_ids)`, further entries of their batch. With
    `shapes` flat batches are padded to one of a few shapes.
    """

    def __init__(self, examples: AnyExamples, collator: PackCollator, shapes: Shapes | None = None):
        self.examples, self.collator, self.shapes = examples, collator, shapes

    def at_epoch(self, epoch: int) -> MicroBatches:
        """Returns the same examples, collated as in that epoch (diffusion draws its masks from seed, epoch and example)."""
        return MicroBatches(self.examples, self.collator.at_epoch(epoch), self.shapes)

    def __getitem__(self, micro_batch: MicroBatch) -> Batch:
        if self.shapes is not None:
            return self._shaped(micro_batch, self.shapes)
        if not len(micro_batch):
            return self.collator.empty()
        ids = micro_batch.example_ids
        input_ids, labels = self.examples.gather(ids, micro_batch.starts, micro_batch.stops)
        supervised = np.asarray(self.examples.supervised[ids], dtype=np.int64)
        factors = self.examples.factors(ids, micro_batch.starts, micro_batch.stops)
        options = {} if factors is None else {"factors": factors}  # not every objective knows factors
        batch = self.collator.collate(input_ids, labels, micro_batch.lengths, ids, supervised, **options)
        return batch | {**self.examples.extras(ids)}

    def _shaped(self, micro_batch: MicroBatch, shapes: Shapes) -> Batch:
        """Makes a flat batch of one of the shapes: documents of padding behind the others, which nothing supervises."""
        ids, lengths = micro_batch.example_ids, micro_batch.lengths
        pads = shapes.padding(int(lengths.sum()))
        padding, more = np.full(int(pads.sum()), self.collator.pad_token_id, dtype=np.int64), len(pads)
        input_ids, labels, supervised, options = padding, np.full_like(padding, IGNORED), np.zeros(more, np.int64), {}
        if len(micro_batch):
            real_ids, real_labels = self.examples.gather(ids, micro_batch.starts, micro_batch.stops)
            input_ids, labels = np.concatenate([real_ids, input_ids]), np.concatenate([real_labels, labels])
            supervised = np.append(np.asarray(self.examples.supervised[ids], dtype=np.int64), supervised)
            factors = self.examples.factors(ids, micro_batch.starts, micro_batch.stops)
            if factors is not None:
                options = {"factors": np.append(factors, np.ones(len(padding), np.float32))}
        lengths, ids = np.append(lengths, pads), np.append(ids, np.full(more, -1))
        batch = self.collator.collate(input_ids, labels, lengths, ids, supervised, **options)
        return with_empty_documents(batch, shapes.documents, longest=shapes.longest)


def with_empty_documents(batch: Batch, documents: int, *, longest: int) -> Batch:
    """Returns a flat batch with empty documents up to a number of them, so that its offsets have the shape of others.

    Args:
        longest: the `max_length_q` of all; no document exceeds it.
    """
    ids, offsets = batch["example_ids"], batch["cu_seq_lens_q"]
    empty = max(0, documents - len(ids))
    offsets = torch.cat([offsets, offsets[-1:].expand(empty)])
    return batch | {
        "example_ids": torch.cat([ids, ids.new_full((empty,), -1)]),
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets,
        "max_length_q": longest,
        "max_length_k": longest,
        BOUNDS: Bounds(offsets),
    }


def without_first_labels(labels: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns a copy in which the first token of every document is not supervised: nothing before it predicts it.

    Args:
        labels: int64 `[T]`, documents end to end.
        lengths: int64 `[S]`.
    """
    labels = labels.copy()
    labels[offsets_of(lengths)[:-1][lengths > 0]] = IGNORED
    return labels


def _example_id(value: Any, where: str) -> int:
    try:
        return index(value)
    except TypeError:
        fix = "number the rows, or leave it out"
        raise DataError("must be a whole number", where=where, key="example_id", value=value, fix=fix) from None


def _loss_weights(labels, document, documents, supervised, loss_weighting, factors) -> np.ndarray:
    """Returns float32 `[T]`, 0 where nothing is supervised, so that their sum is the loss's denominator."""
    counted = labels != IGNORED  # [T]
    if loss_weighting == "token":
        weights = counted.astype(np.float32)
    else:
        if supervised is None:
            supervised = np.bincount(document[counted], minlength=documents)  # [S]
        weights = np.where(counted, 1.0 / np.maximum(supervised, 1)[document], 0.0).astype(np.float32)
    return weights if factors is None else weights * factors
