"""Unpads the models of a trainer, and checks on the trainer itself that nothing else changes.

The trainer keeps its batches, loss, data loader and order; only the layers of its models run without padding. That is
right for every loss: rows stay rows, and no micro-batch is added, left empty or mixed with another.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from accelerate.data_loader import DataLoaderDispatcher
from torch import nn
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, Trainer

from packtrain.errors import DataError, ModelError, PacktrainError
from packtrain.modeling.audit.settings import base
from packtrain.modeling.unpad import Flatten, unpad
from packtrain.plugin.asking import (
    LIBRARIES,
    Answer,
    NoLabels,
    ask,
    close,
    gradients_apart,
    named,
    not_askable,
    tolerance,
    untouched,
)
from packtrain.plugin.proof import LossDiffers
from packtrain.plugin.verdicts import Verdicts
from packtrain.training.guards.out_of_memory import is_out_of_memory

logger = logging.getLogger(__name__)

_ASKED = 2  # batches
_LOOKED_AT = 16  # batches, for one with padding
_READS_PADDING = "it reads the outputs at padding, as a softmax over all positions of a row does"
_MASK_IT = "leave padding out of the loss by the batch's attention_mask, in the trainer's `compute_loss`"
TrainerT = TypeVar("TrainerT", bound=Trainer)


def unpad_trainer(trainer: TrainerT, verdicts: Verdicts, *, instead_of: PacktrainError | None = None) -> TrainerT:
    """Lets the models of a trainer run without padding, and returns it.

    Args:
        verdicts: of the other ranks, which compare batches of their own.
        instead_of: why its batches cannot be flat.

    Raises:
        PacktrainError: a model cannot be unpadded, or the trainer's loss or gradients would change. The trainer is left as
            it was.
    """
    modules: list[str] = []
    not_asked = next(filter(None, verdicts.gathered(not_askable(trainer))), None)
    with ExitStack() as undo:
        try:
            with verdicts.shared():
                batches = [] if not_asked else _own_batches(trainer)
            batches = batches[: min(verdicts.gathered(len(batches)))]
            before = _answers(trainer, batches, verdicts)
            with verdicts.shared():
                for name, model in models_of(trainer).items():
                    unpadding = undo.enter_context(_unpad(model, ask_whole=not has_own_loss(trainer)))
                    modules += [f"{name}.{inner}" if inner else name for inner in unpadding.modules]
            after = _answers(trainer, batches, verdicts)
            with verdicts.shared():
                said = _agree(trainer, before, after)
        except PacktrainError as error:
            raise _refusal(trainer, error, instead_of) from error
        undo.pop_all()
    if batches and all(map(_is_full, batches)):
        said += "; the batches that were compared have no padding"
    if not_asked:
        said = f"whether the loss stays the same was not checked: {not_asked}"
    why = f". Its batches are not flat because {reason(instead_of)}" if instead_of is not None else ""
    logger.log(
        logging.WARNING if trainer.is_world_process_zero() else logging.DEBUG,
        "packtrain: %s keeps its own batches, and the layers of %s run without padding; %s%s",
        named(trainer),
        " and ".join(modules),
        said,
        why,
    )
    return trainer


def models_of(trainer: Trainer) -> dict[str, nn.Module]:
    """Returns the transformers models that a trainer holds, each once: `model`, `ref_model`, ..."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, value in [("model", trainer.model), *vars(trainer).items()]:
        if isinstance(value, nn.Module):
            model = trainer.accelerator.unwrap_model(value)
            if isinstance(base(model), PreTrainedModel):
                found.setdefault(id(base(model)), (name, model))
    return dict(found.values())


def is_unpadded(trainer: Trainer) -> bool:
    """Returns whether a model of the trainer runs without padding already."""
    hooks = (module._forward_pre_hooks.values() for model in models_of(trainer).values() for module in model.modules())
    return any(isinstance(hook, Flatten) for those in hooks for hook in those)


def reason(error: PacktrainError) -> str:
    """Says in a clause why a trainer takes no flat batches."""
    if isinstance(error, LossDiffers):
        return error.cause
    if isinstance(error, DataError):
        return "its rows are not token ids with one label per token"
    if isinstance(error, ModelError):
        return error.what.partition(": ")[0]  # the rest is its figures
    if error.__cause__ is not None and not isinstance(error.__cause__, PacktrainError):
        return "its loss cannot be computed from one row that holds several documents"
    what = error.what.partition(": ")[2]  # of "must be False: all batches are planned once"
    return what or " ".join(part for part in ("it" if error.key == "trainer" else error.key, error.what) if part)


def has_own_loss(trainer: Trainer) -> bool:
    """Whether the user wrote the loss, so that the model's own, and what it reads, does not matter."""
    owner = next(cls for cls in type(trainer).__mro__ if "compute_loss" in vars(cls))
    return trainer.compute_loss_func is not None or not owner.__module__.startswith(LIBRARIES)


def _unpad(model: nn.Module, *, ask_whole: bool) -> Any:
    try:
        with _without_autocast(model):
            return unpad(model, ask_whole=ask_whole)
    except PacktrainError:
        raise
    except Exception as error:  # whatever a model may raise that is asked with rows of tokens
        if is_out_of_memory(error):
            raise
        what = f"{type(base(model)).__name__} raised {type(error).__name__} for rows of tokens: {error}"
        raise PacktrainError(what, key="trainer.model") from error


@contextmanager
def _without_autocast(model: nn.Module) -> Iterator[None]:
    """Computes in the precision of the weights: accelerate has wrapped the `forward` of reference models in autocast."""
    prepared = vars(model).pop("forward", None) if "_original_forward" in vars(model) else None
    try:
        yield
    finally:
        if prepared is not None:
            vars(model)["forward"] = prepared


def _own_batches(trainer: Trainer) -> list[Any]:
    """Returns batches of the trainer's own data loader, which training will read once more: the first, and one with padding.

    Raises:
        PacktrainError: they cannot be made, or are no longer the first ones when a stream is read again.
    """
    batches = _first_batches(trainer)
    if isinstance(trainer.train_dataset, IterableDataset) and not _starts_over(trainer, batches):
        what = (
            "its train_dataset does not start over when it is iterated again, and training would miss the rows read now"
        )
        fix = "give a dataset whose __iter__ starts over, for example a datasets.IterableDataset"
        raise PacktrainError(what, key="trainer", fix=fix)
    return batches


def _starts_over(trainer: Trainer, batches: list[Any]) -> bool:
    """Reads the first batches once more; a stream that is at its end may also raise an error."""
    try:
        return _equal(batches, _first_batches(trainer))
    except PacktrainError:
        return False


def _equal(one: Any, other: Any) -> bool:
    """Compares batches: lists, mappings, tensors and plain values."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)


def _first_batches(trainer: Trainer) -> list[Any]:
    """Returns the first batch and the next one, or a later one with padding: what reads padding shows only there."""
    batches: list[Any] = []
    with untouched(trainer):
        try:
            loader = trainer.get_train_dataloader()
            in_step = isinstance(loader, DataLoaderDispatcher)  # rank 0 deals batches out: all ranks read as many
            for number, batch in enumerate(loader, start=1):
                if len(batches) < _ASKED or all(map(_is_full, batches)):
                    batches = [*batches[: _ASKED - 1], batch]
                found = number >= _ASKED and not all(map(_is_full, batches))
                if number >= _LOOKED_AT or (found and not in_step):
                    break
        except Exception as error:  # whatever a user's collator may raise
            raise PacktrainError(f"its own batch raised {type(error).__name__}: {error}", key="trainer") from error
    return batches


def _is_full(batch: Any) -> bool:
    """Returns whether the masks of a batch say that it has no padding."""
    masks = [value for name, value in batch.items() if "attention_mask" in name] if isinstance(batch, Mapping) else []
    return bool(masks) and all(torch.is_tensor(mask) and bool(mask.all()) for mask in masks)


def _answers(trainer: Trainer, batches: list[Any], verdicts: Verdicts) -> list[Answer]:
    try:
        with untouched(trainer):
            return [ask(trainer, batch, verdicts, prepare=True) for batch in batches]
    except PacktrainError:
        raise
    except Exception as error:  # whatever a loss may raise
        if is_out_of_memory(error):
            raise
        raise PacktrainError(f"its loss raised {type(error).__name__}: {error}", key="trainer") from error


def _agree(trainer: Trainer, before: list[Answer], after: list[Answer]) -> str:
    """Checks that losses and gradients agree, and says so.

    Raises:
        PacktrainError: they differ.
    """
    allowed = tolerance(trainer)
    for one, other in zip(before, after, strict=True):
        if not close(one.loss, other.loss, allowed):
            figures = f"its loss of a batch is {one.loss:.6g} with padding and {other.loss:.6g} without"
            raise PacktrainError(f"{figures}: {_READS_PADDING}", key="trainer", fix=_MASK_IT)
        if not (apart := gradients_apart(one, other)) <= 10 * allowed:
            what = f"its gradients of a batch differ by {apart:.1e} without padding: {_READS_PADDING}"
            raise PacktrainError(what, key="trainer", fix=_MASK_IT)
    if not after:
        return "it has no batch to compare"
    if not any(answer.gradient.any() for answer in before):
        return "its first losses have no gradients, so its models were compared, and not what it makes of them"
    return f"the loss of its first micro-batch is {after[0].loss:.4f}, as before, and so are the gradients"


def _refusal(trainer: Trainer, error: PacktrainError, flat: PacktrainError | None) -> PacktrainError:
    """Says what cannot be done with which trainer and task, in the ways that were tried."""
    if isinstance(error, NoLabels):  # it would not train with padding either
        return PacktrainError(error.what, where=named(trainer), fix=error.fix)
    if flat is None:
        return PacktrainError(f"{named(trainer)} cannot run without padding: {error.what}", fix=error.fix)
    what = (
        f"{named(trainer)} takes no flat batches ({_tried(flat)}), and cannot run without padding either ({error.what})"
    )
    return PacktrainError(what, fix=error.fix or flat.fix)


def _tried(flat: PacktrainError) -> str:
    if isinstance(flat, DataError):
        return ": ".join(part for part in (flat.where, flat.key, flat.what) if part)
    return reason(flat)
