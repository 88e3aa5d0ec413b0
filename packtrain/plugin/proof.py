"""Checks that a trainer has the same loss in packtrain's layout, on the trainer itself and before it trains.

A few documents of the first update go through the trainer's own data collator and through packtrain's, and the trainer's
own `compute_loss` computes the loss of both batches, without dropout and gradients. Whatever a trainer does with its
batches (labels that its collator makes, transforms, other inputs, losses of whole rows) shows as a difference, even if
packtrain does not know of it. Every rank takes the same documents.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer

from packtrain.errors import PacktrainError
from packtrain.modeling.isolation import cannot_ask, compute_dtype
from packtrain.modeling.loading import has_router_loss
from packtrain.packing.plan import MicroBatch, Plan
from packtrain.training.guards.out_of_memory import is_out_of_memory

AT_MOST = 8  # documents
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "position_ids", "seq_idx", "shift_labels")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The trainer's loss of a batch, and what it was computed from.

    Attributes:
        loss: the number that training would log if this batch were an update.
        items: labels that the trainer counts for the denominator; None if it does not count them.
        tokens: real tokens; None if the batch does not say.
        keys: keys of the batch.
        one_denominator: whether the loss is divided by the labels of the update, not by those of the micro-batch.
    """

    loss: float
    items: int | None
    tokens: int | None
    keys: frozenset[str]
    one_denominator: bool


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
    return MicroBatch(example_ids=chosen, starts=np.zeros_like(chosen), stops=lengths[chosen].astype(np.int64))


def its_own_batch(loader: DataLoader, documents: MicroBatch) -> dict[str, Any]:
    """Collates the documents as the trainer's own data loader does."""
    return loader.collate_fn([loader.dataset[int(i)] for i in documents.example_ids])


def ask(trainer: Trainer, batch: dict[str, Any], dtype: torch.dtype) -> Answer:
    """Computes the trainer's loss of a batch in evaluation mode and in `dtype`, and leaves no trace in the trainer."""
    model: Any = trainer.model
    weight = next(model.parameters())
    device, lower = weight.device, dtype is not weight.dtype
    keys, mask = frozenset(batch), batch.get("attention_mask")
    flat = "cu_seq_lens_q" in batch
    tokens = batch["input_ids"].numel() if flat else int(mask.sum()) if torch.is_tensor(mask) else None
    (batch,), items = trainer.get_batch_samples(iter([send_to_device(batch, device)]), 1, device)

    def loss(denominator: torch.Tensor | int | None) -> float:
        with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=lower):
            found: Any = trainer.compute_loss(model, dict(batch), num_items_in_batch=denominator)
            return float(found)

    training, metrics = model.training, copy.deepcopy(getattr(trainer, "_metrics", None))  # TRL's, logged as means
    model.eval()
    try:
        found = loss(items)
        halved = found if items is None else loss(2 * items)
    finally:
        model.train(training)
        if metrics is not None:
            setattr(trainer, "_metrics", metrics)  # noqa: B010 (no attribute of every Trainer)
    one_denominator = abs(halved - found / 2) < abs(halved - found)
    if items is not None:  # of all ranks, which take the same documents
        items = int(items) // (trainer.args.world_size if trainer.args.average_tokens_across_devices else 1)
    return Answer(loss=found, items=items, tokens=tokens, keys=keys, one_denominator=one_denominator)


class Proof:
    """Takes the trainer's own loss when it is made, and compares that of packtrain's batch with it.

    Args:
        loader: the trainer's own data loader.
        max_tokens: most tokens of a micro-batch.

    Attributes:
        one_denominator: see `Answer`; what transformers declares if nothing could be computed.
    """

    def __init__(self, trainer: Trainer, loader: DataLoader, plan: Plan, max_tokens: int | None):
        self.trainer = trainer
        self.one_denominator = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
        rows = trainer.args.per_device_train_batch_size
        self.documents = documents_to_ask(plan.lengths, plan.examples(0), rows=rows, max_tokens=max_tokens)
        model = trainer.accelerator.unwrap_model(trainer.model)
        weight = next(model.parameters())
        self.dtype = compute_dtype(trainer.args, weight.dtype)
        self.tolerance = tolerance(self.dtype, weight.device)
        self.before, self.not_asked = None, cannot_ask(model)
        if self.not_asked is None and weight.device.type != trainer.args.device.type:
            self.not_asked = f"the weights are on the {weight.device.type} until training"
        if self.not_asked is None and has_router_loss(model.config):
            self.not_asked = "the router loss depends on the layout"
        if self.not_asked is None:
            try:
                self.before = ask(trainer, its_own_batch(loader, self.documents), self.dtype)
            except Exception as error:  # whatever a user's collator and loss may raise
                self.not_asked = f"the trainer's own batch raised {type(error).__name__}: {error}"

    def of(self, batches: Dataset, *, allow_differences: bool) -> str:
        """Compares the losses, and returns the result in words.

        Args:
            batches: packtrain's batches, `MicroBatch -> batch`.

        Raises:
            PacktrainError: the loss differs or cannot be computed, and differences are not allowed.
        """
        if self.before is None:
            return f"whether the loss stays the same was not checked: {self.not_asked}"
        try:
            after = ask(self.trainer, batches[self.documents], self.dtype)
            self.one_denominator = after.one_denominator
            return agree(self.before, after, self.documents, self.tolerance)
        except PacktrainError as error:
            if not allow_differences:
                raise
            return error.what
        except Exception as error:
            if is_out_of_memory(error):
                return "whether the loss stays the same was not checked: out of memory"
            what = f"training would fail on packtrain's batches: {type(error).__name__}: {error}"
            fix = "try a padded strategy (pad_longest); packtrain lays out input_ids and labels, one label per token"
            raise PacktrainError(what, key="trainer", fix=fix) from error


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """Returns the largest relative difference of two losses that sums in another order explain."""
    if dtype is not torch.float32:
        return 2e-2
    return 1e-4 if device.type == "cpu" else 1e-3  # TF32


def agree(before: Answer, after: Answer, documents: MicroBatch, tolerance: float) -> str:
    """Checks that two losses agree, and returns them in words.

    Raises:
        PacktrainError: they differ; says by how much, and what may be the cause.
    """
    said = f"the loss of {len(documents)} documents is {after.loss:.4f}"
    if (
        _close(before.loss, after.loss, tolerance)
        and before.items == after.items
        and before.tokens in (None, after.tokens)
    ):
        return f"{said}, as before"
    if before.items and after.items and 0 < before.items - after.items <= len(documents):
        if _close(before.loss * before.items, after.loss * after.items, tolerance):
            return (
                f"{said}, and was {before.loss:.4f}: the trainer counted {before.items} labels, including those of first "
                f"tokens, which its model does not learn, and now counts {after.items}"
            )
    where = "rows " + ", ".join(map(str, documents.example_ids.tolist()))
    what = (
        f"these rows have the loss {before.loss:.6g} in the trainer's own batch and {after.loss:.6g} in packtrain's: "
        f"{_cause(before, after, len(documents))}"
    )
    fix = (
        "put the final input_ids and labels into train_dataset, and use a loss that does not depend on whole rows; "
        "allow_differences=True attaches anyway"
    )
    raise PacktrainError(what, where=where, key="trainer", fix=fix)


def _close(one: float, other: float, tolerance: float) -> bool:
    return abs(one - other) <= tolerance * abs(one)


def _cause(before: Answer, after: Answer, documents: int) -> str:
    if before.tokens not in (None, after.tokens):
        return f"its collator makes {before.tokens} tokens of them, and train_dataset has {after.tokens}"
    if before.items != after.items:
        if before.items and after.items and 0 < before.items - after.items <= documents:
            return "its loss includes the labels of first tokens, which packtrain ignores (set them to -100)"
        return f"its collator makes {before.items} labels of them, and packtrain reads {after.items}"
    if more := before.keys - after.keys - {"attention_mask", *PACKING}:
        return f"its batches also have {', '.join(sorted(more))}, which packtrain does not read"
    return "its labels or inputs are not those of train_dataset, or its loss depends on which row a token is in"
