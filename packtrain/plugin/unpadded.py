"""Unpads the models of a trainer, and checks on the trainer itself that nothing else changes.

The trainer keeps its batches, loss, data loader and order; only the layers of its models run without padding.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import PreTrainedModel, Trainer

from packtrain.errors import PacktrainError
from packtrain.modeling.audit.settings import base, quietly
from packtrain.modeling.isolation import cannot_ask, compute_dtype
from packtrain.modeling.unpad import nonzero_adapters, unpad
from packtrain.plugin.proof import tolerance
from packtrain.training.guards.out_of_memory import is_out_of_memory

logger = logging.getLogger(__name__)

_ASKED = 2  # batches
TrainerT = TypeVar("TrainerT", bound=Trainer)


class Step(NamedTuple):
    """What the trainer computes of one of its batches: the loss, and norms of the gradients of its weights."""

    loss: float
    norms: torch.Tensor  # float64 [weights]


def unpad_trainer(trainer: TrainerT, *, instead_of: PacktrainError | None = None) -> TrainerT:
    """Lets the models of a trainer run without padding, and returns it.

    Args:
        instead_of: why its batches cannot be flat.

    Raises:
        PacktrainError: a model cannot be unpadded, or the trainer's loss or gradients would change. The trainer is left as
            it was.
    """
    models = _models(trainer)
    with ExitStack() as undo:
        try:
            with _untouched(trainer):
                batches, not_asked = _own_batches(trainer)
                before = [_step(trainer, batch) for batch in batches]
            names = []
            for name, model in models.items():
                unpadding = undo.enter_context(unpad(model))
                names += [f"{name}.{inner}" if inner else name for inner in unpadding.modules]
            with _untouched(trainer):
                after = [_step(trainer, batch) for batch in batches]
            said = (
                _agree(trainer, before, after)
                if batches
                else f"whether the loss stays the same was not checked: {not_asked}"
            )
        except PacktrainError as error:
            raise _refusal(trainer, error, instead_of) from error
        undo.pop_all()
    why = f", because {_reason(instead_of)}" if instead_of is not None else ""
    logger.warning(
        "packtrain: the layers of %s run without padding; batches stay the trainer's own%s; %s",
        ", ".join(names),
        why,
        said,
    )
    return trainer


def _models(trainer: Trainer) -> dict[str, nn.Module]:
    """Returns the transformers models that a trainer holds, each once: `model`, `ref_model`, ..."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, value in [("model", trainer.model), *vars(trainer).items()]:
        if isinstance(value, nn.Module):
            model = trainer.accelerator.unwrap_model(value)
            if isinstance(base(model), PreTrainedModel):
                found.setdefault(id(base(model)), (name, model))
    return dict(found.values())


def _own_batches(trainer: Trainer) -> tuple[list[Any], str]:
    """Returns the first batches of the trainer's own data loader, or none and why."""
    model = _model(trainer)
    reason = cannot_ask(model)
    if reason is None and next(model.parameters()).device.type != trainer.args.device.type:
        reason = f"the weights are on the {next(model.parameters()).device.type} until training"
    if reason is not None:
        return [], reason
    batches = []
    for batch in trainer.get_train_dataloader():
        batches.append(send_to_device(batch, trainer.args.device))
        if len(batches) == _ASKED:
            break
    return batches, "it has no batch"


@contextmanager
def _untouched(trainer: Trainer) -> Iterator[None]:
    """Leaves the random numbers, the collator, the metrics and the mode of the model of a trainer as they were."""
    model = _model(trainer)
    training, collator = model.training, trainer.data_collator
    metrics = {name: copy.deepcopy(value) for name, value in vars(trainer).items() if name.startswith("_metrics")}
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), quietly(), nonzero_adapters(model):
        try:
            trainer.data_collator = copy.deepcopy(collator)  # it may draw from a generator of its own
            model.eval()
            yield
        finally:
            trainer.data_collator = collator
            model.train(training)
            vars(trainer).update(metrics)


def _model(trainer: Trainer) -> nn.Module:
    model: Any = trainer.model
    return trainer.accelerator.unwrap_model(model)


def _step(trainer: Trainer, batch: Any) -> Step:
    """Computes the loss of a batch as training does, and its gradients, which are not kept."""
    model: Any = trainer.model
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    dtype, device = compute_dtype(trainer.args, weights[0].dtype), weights[0].device
    try:
        (batch,), items = trainer.get_batch_samples(iter([copy.copy(batch)]), 1, device)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not weights[0].dtype):
            inputs = trainer._prepare_inputs(batch)
            loss: Any = trainer.compute_loss(model, inputs, num_items_in_batch=items)
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    except PacktrainError:
        raise
    except Exception as error:  # whatever a loss may raise
        if is_out_of_memory(error):
            raise
        raise PacktrainError(f"its loss raised {type(error).__name__}: {error}", key="trainer") from error
    norms = [0.0 if gradient is None else float(gradient.double().norm()) for gradient in gradients]
    return Step(float(loss), torch.tensor(norms, dtype=torch.float64))


def _agree(trainer: Trainer, before: list[Step], after: list[Step]) -> str:
    """Checks that losses and gradients agree, and says so.

    Raises:
        PacktrainError: they differ.
    """
    weight = next(_model(trainer).parameters())
    allowed = tolerance(compute_dtype(trainer.args, weight.dtype), weight.device)
    for one, other in zip(before, after, strict=True):
        if not abs(one.loss - other.loss) <= allowed * max(abs(one.loss), 1e-6):
            what = f"its loss of a batch is {one.loss:.6g} with padding and {other.loss:.6g} without"
            raise PacktrainError(what, key="trainer")
        apart = float((one.norms - other.norms).abs().max() / one.norms.max().clamp(min=1e-12))
        if not apart <= 10 * allowed:
            raise PacktrainError(f"its gradients of a batch differ by {apart:.1e} without padding", key="trainer")
    return f"the loss of the first micro-batch is {after[0].loss:.4f}, as before, and so are the gradients"


def _refusal(trainer: Trainer, error: PacktrainError, flat: PacktrainError | None) -> PacktrainError:
    """Says what cannot be done with which trainer and task, in the ways that were tried."""
    name = f"{type(trainer).__name__} with {type(base(_model(trainer))).__name__}"
    if flat is None:
        return PacktrainError(f"{name} cannot run without padding: {error.what}", key="trainer", fix=error.fix)
    what = f"{name} takes no flat batches ({_reason(flat)}), and cannot run without padding either ({error.what})"
    return PacktrainError(what, where=flat.where, key=flat.key, value=flat.value, fix=flat.fix)


def _reason(error: PacktrainError) -> str:
    return " ".join(part for part in (error.key, error.what) if part)
