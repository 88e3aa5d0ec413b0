"""Checks that a trainer has the same loss in packtrain's layout, on the trainer itself and before it trains.

A few documents of the first update, the longest of all, and one whose first token has a label go through the trainer's
own data collator and through packtrain's, and the trainer's own `compute_loss` computes loss and gradients of both
batches, without dropout. Whatever a trainer does with its batches (labels that its collator makes, transforms, other
inputs, losses of whole rows) shows as a difference, even if packtrain does not know of it. Every rank takes the same
documents.

Examples may be dealt anew among micro-batches only where the loss is a sum over the update: the losses of two parts, each
divided by the labels of both, must add up to that of the whole, and a micro-batch without labels must add nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer

from packtrain.data.formats import IGNORED
from packtrain.errors import PacktrainError
from packtrain.modeling.audit.settings import base
from packtrain.modeling.loading import has_router_loss
from packtrain.packing.plan import MicroBatch, Plan
from packtrain.plugin.asking import (
    Answer,
    NoLabels,
    ask,
    ask_loss,
    close,
    gradients_apart,
    model_of,
    not_askable,
    tolerance,
)
from packtrain.plugin.verdicts import RankFailed, Verdicts, ran_out_of_memory

AT_MOST = 8  # documents
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "position_ids", "seq_idx", "shift_labels")


class LossDiffers(PacktrainError):
    """The trainer's loss is another one in packtrain's layout; `cause` says why in a clause."""

    def __init__(self, what: str, *, cause: str, where: str, fix: str):
        self.cause = cause
        super().__init__(f"{what}: {cause}", where=where, key="trainer", fix=fix)


def documents_to_ask(lengths: np.ndarray, example_ids: np.ndarray, *, rows: int, max_tokens: int | None) -> MicroBatch:
    """Chooses whole documents of every length among `example_ids`, at most as many as the trainer has in a micro-batch.

    Args:
        lengths: lengths of all examples, int32 `[n]`.
        example_ids: the examples of an update, int64 `[m]`.
        rows: the trainer's `per_device_train_batch_size`.
        max_tokens: most tokens of a micro-batch, padding included; None for `rows` of the longest.
    """
    by_length = example_ids[np.argsort(lengths[example_ids], kind="stable")]
    count = min(len(by_length), max(2, min(rows, AT_MOST)))
    chosen = by_length[np.linspace(0, len(by_length) - 1, count).round().astype(np.int64)]
    most = max_tokens or rows * int(lengths[by_length[-1]])
    while len(chosen) > 1 and len(chosen) * int(lengths[chosen[-1]]) > most:
        chosen = chosen[:-1]
    return _whole(lengths, chosen)


def rare_documents(dataset: Any, lengths: np.ndarray) -> list[MicroBatch]:
    """Chooses the longest document of all, and the first whose first token has a label: a micro-batch each."""
    chosen = [int(lengths.argmax())]
    if (first := first_labelled(dataset)) is not None:
        chosen.append(first)
    return [_whole(lengths, np.array([example], dtype=np.int64)) for example in dict.fromkeys(chosen)]


def first_labelled(dataset: Any) -> int | None:
    """Returns the first row of a `datasets.Dataset` with a label at its first token; None if there is no such row."""
    if "labels" not in dataset.column_names:
        return None
    start = 0
    for table in dataset.select_columns("labels").with_format("arrow").iter(batch_size=1000):
        for rows in table["labels"].chunks:
            if not (pa.types.is_list(rows.type) or pa.types.is_large_list(rows.type)):
                return None
            offsets = rows.offsets.to_numpy()
            some = np.flatnonzero(np.diff(offsets))
            labels = rows.values.take(pa.array(offsets[some])).to_numpy(zero_copy_only=False)
            if len(found := some[labels != IGNORED]):
                return start + int(found[0])
            start += len(rows)
    return None


def _whole(lengths: np.ndarray, chosen: np.ndarray) -> MicroBatch:
    return MicroBatch(example_ids=chosen, starts=np.zeros_like(chosen), stops=lengths[chosen].astype(np.int64))


def _parts(documents: MicroBatch) -> Iterator[MicroBatch]:
    """Yields two parts of the documents, the second empty if there is one document, and a micro-batch of none."""
    half = (len(documents) + 1) // 2
    for part in (slice(0, half), slice(half, None), slice(0, 0)):
        yield MicroBatch(
            example_ids=documents.example_ids[part], starts=documents.starts[part], stops=documents.stops[part]
        )


def its_own_batch(loader: DataLoader, documents: MicroBatch) -> dict[str, Any]:
    """Collates the documents as the trainer's own data loader does."""
    return loader.collate_fn([loader.dataset[int(i)] for i in documents.example_ids])


class Proof:
    """Takes the trainer's own losses when it is made, and compares those of packtrain's batches with them.

    Args:
        loader: the trainer's own data loader.
        max_tokens: most tokens of a micro-batch.
        verdicts: of the other ranks, which compare the same documents.

    Attributes:
        is_sum: whether the loss of an update is a sum over its micro-batches, however examples are dealt; what
            transformers declares if nothing could be computed.
        takes_empty: whether a micro-batch without examples leaves the loss finite.
        not_asked: why nothing could be computed, or None.
        fails: whether that is an error of the trainer itself.
    """

    def __init__(self, trainer: Trainer, loader: DataLoader, plan: Plan, max_tokens: int | None, verdicts: Verdicts):
        self.trainer, self.verdicts = trainer, verdicts
        self.is_sum = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
        self.takes_empty, self.fails = True, False
        rows = trainer.args.per_device_train_batch_size
        asked = documents_to_ask(plan.lengths, plan.examples(0), rows=rows, max_tokens=max_tokens)
        self.documents = [asked, *rare_documents(trainer.train_dataset, plan.lengths)]
        self.before: list[Answer] = []
        self.not_asked = next(filter(None, verdicts.gathered(not_askable(trainer))), None)
        if self.not_asked is None and has_router_loss(base(model_of(trainer)).config):
            self.not_asked = "the router loss depends on the layout"
        if self.not_asked is None:
            try:
                self.before = [self._ask_own(loader, documents) for documents in self.documents]
            except Exception as error:  # whatever a user's collator and loss may raise
                self.fails = not ran_out_of_memory(error)
                raised = f"the trainer's own batch raised {_said(error)}"
                self.not_asked = error.what if isinstance(error, NoLabels) else raised

    def _ask_own(self, loader: DataLoader, documents: MicroBatch) -> Answer:
        with self.verdicts.shared():
            batch = its_own_batch(loader, documents)
        return ask(self.trainer, batch, self.verdicts)

    def of(self, batches: Dataset, *, allow_differences: bool) -> str:
        """Compares losses and gradients, and returns the result in words.

        Args:
            batches: packtrain's batches, `MicroBatch -> batch`.

        Raises:
            PacktrainError: the loss or its gradients differ or cannot be computed, and differences are not allowed.
        """
        if self.not_asked is not None:
            return f"whether the loss stays the same was not checked: {self.not_asked}"
        try:
            after = [ask(self.trainer, batches[documents], self.verdicts) for documents in self.documents]
            self._add_up(batches, after[0])
            said = [
                agree(*answers, documents, tolerance(self.trainer))
                for *answers, documents in zip(self.before, after, self.documents, strict=True)
            ]
            return said[0]
        except Exception as error:
            if ran_out_of_memory(error):
                self.not_asked = "out of memory"
                return "whether the loss stays the same was not checked: out of memory"
            if isinstance(error, PacktrainError) and not isinstance(error, RankFailed):
                if not allow_differences:
                    raise
                return error.what
            what = f"training would fail on packtrain's batches: {_said(error)}"
            fix = "try a padded strategy (pad_longest); packtrain lays out input_ids and labels, one label per token"
            raise PacktrainError(what, key="trainer", fix=fix) from error

    def _add_up(self, batches: Dataset, whole: Answer) -> None:
        """Finds out whether the losses of parts add up to that of the whole, with one denominator."""

        def loss(documents: MicroBatch, items: int | None) -> float:
            return ask_loss(self.trainer, batches[documents], items, self.verdicts)

        *parts, nothing = [loss(part, whole.items) for part in _parts(self.documents[0])]
        halved = None if whole.items is None else loss(self.documents[0], 2 * whole.items)
        allowed = tolerance(self.trainer)
        self.takes_empty = bool(np.isfinite(nothing))
        self.is_sum = (
            halved is not None
            and close(whole.loss / 2, halved, allowed)
            and close(whole.loss, sum(parts), allowed)
            and abs(nothing) <= allowed * abs(whole.loss)
        )


def _said(error: Exception) -> str:
    return f"an error: {error.what}" if isinstance(error, RankFailed) else f"{type(error).__name__}: {error}"


def agree(before: Answer, after: Answer, documents: MicroBatch, tolerance: float) -> str:
    """Checks that two losses and their gradients agree, and returns them in words.

    Raises:
        LossDiffers: they differ; says by how much, and what may be the cause.
    """
    where = "rows " + ", ".join(map(str, documents.example_ids.tolist()))
    fix = (
        "put the final input_ids and labels into train_dataset, and use a loss that does not depend on whole rows; "
        'attach(layout="unpad") keeps the trainer\'s own batches, and allow_differences=True attaches anyway'
    )
    counted = before.items == after.items and before.tokens in (None, after.tokens)
    if not (close(before.loss, after.loss, tolerance) and counted):
        what = (
            f"these rows have the loss {before.loss:.6g} in the trainer's own batch and {after.loss:.6g} in packtrain's"
        )
        raise LossDiffers(what, cause=_cause(before, after, len(documents)), where=where, fix=fix)
    if not (apart := gradients_apart(before, after)) <= 10 * tolerance:
        what = f"the gradients of these rows differ by {apart:.1e} between the trainer's own batch and packtrain's"
        cause = "attention leaks between documents, or an adapter depends on which row a token is in"
        raise LossDiffers(what, cause=cause, where=where, fix=fix)
    return f"the loss of {len(documents)} documents is {after.loss:.4f}, as before"


def _cause(before: Answer, after: Answer, documents: int) -> str:
    if before.tokens not in (None, after.tokens):
        return f"its collator makes {before.tokens} tokens of them, and train_dataset has {after.tokens}"
    if before.items != after.items:
        if before.items and after.items and 0 < before.items - after.items <= documents:
            return (
                f"its loss includes the labels of first tokens, which packtrain ignores (set them to {IGNORED}): the "
                f"trainer counted {before.items} labels, and now counts {after.items}"
            )
        return f"its collator makes {before.items} labels of them, and packtrain reads {after.items}"
    if more := before.keys - after.keys - {"attention_mask", *PACKING}:
        return f"its batches also have {', '.join(sorted(more))}, which packtrain does not read"
    return "its labels or inputs are not those of train_dataset, or its loss depends on which row a token is in"
