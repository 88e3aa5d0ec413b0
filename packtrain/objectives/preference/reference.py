"""Log-probabilities of both answers of every pair under the reference model: computed once, and kept in the cache.

The reference is the model as training begins, before a checkpoint is read; with an adapter, the model without it. No copy
of it is made. One packed forward pass over the examples, without gradients and without dropout, gives float32 `[n, 2]`:

    <cache>/references/<key>      16 bytes of XXH3 of the rest, and then the numbers

The key covers all that they depend on: the reference's weights and config, the examples, the precision, attention and
device that computed them, and the versions of torch and transformers. How the examples were packed is no part of it.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from accelerate.utils import gather_object
from torch import Tensor, nn

from packtrain.data.store import cache_root, hash_of
from packtrain.errors import ModelError
from packtrain.modeling.isolation import cannot_ask
from packtrain.objectives.logits import function_of_losses
from packtrain.objectives.pairs import PairExamples
from packtrain.objectives.preference.loss import sum_over_documents
from packtrain.objectives.shared_prefix import check_shared_prefix
from packtrain.packing.collator import MicroBatches
from packtrain.packing.plan import EVALUATION, make_plan

_VERSION = 1  # raise it when the same model and pairs would give other numbers
_DIGEST = 16  # bytes


def begin(trainer: Any) -> str:
    """Gives the trainer's examples the log-probabilities of the reference model, and checks a shared prefix; collective.

    Args:
        trainer: a `PackTrainer` whose model is the reference, or the reference with an adapter.

    Returns:
        A line for people.

    Raises:
        ModelError: the model cannot run before its engine takes it, or what it computes is not finite.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if (reason := cannot_ask(model)) is not None:
        fix = "launch with ZeRO-2 or DDP, which leave weights whole"
        raise ModelError(f"the reference cannot be computed before training: {reason}", key="objective.name", fix=fix)
    check_shared_prefix(trainer)
    weights = reference_weights(model)
    parts: list[PairExamples] = [part for part in (trainer.train_dataset, trainer.eval_dataset) if part is not None]
    computed = 0
    for part in parts:
        path = cache_root() / "references" / reference_key(trainer, model, part, weights)
        found = read_reference(path, len(part))
        if not all(gather_object([found is not None])):  # on every rank, or on none: computing is collective
            found = compute_reference(trainer, model, part)
            computed += len(part)
            if trainer.args.should_save:
                keep_reference(path, found)
        part.reference = found
    count = sum(len(part) for part in parts)
    how = "found in the cache" if not computed else f"computed for {computed:,}"
    which = "the model without its adapter" if hasattr(model, "disable_adapter") else "the model before training"
    return f"reference    {which}: log-probabilities of {count:,} pairs, {how}"


def compute_reference(trainer: Any, model: nn.Module, examples: PairExamples) -> np.ndarray:
    """Computes the log-probabilities of both answers of every pair, float32 `[n, 2]`, on all ranks together."""
    examples.reference = None
    plan = make_plan(
        examples.lengths,
        strategy=EVALUATION[trainer.plan.layout],
        examples_per_step=len(examples),
        max_tokens=trainer.plan.scope.max_tokens,
        world_size=trainer.args.world_size,
        num_epochs=1,
    )
    batches = MicroBatches(examples, trainer.collator)
    found = torch.zeros(len(examples), 2, dtype=torch.float64, device=trainer.args.device)
    with _as_reference(trainer, model):
        for micro_batch in plan.micro_batches(0, trainer.args.process_index):
            if len(micro_batch):
                batch = trainer._prepare_inputs(batches[micro_batch])
                ids = torch.from_numpy(micro_batch.example_ids).to(found.device)
                found[ids] = reference_logps(model, batch, head=trainer._head).double()
    logps = trainer.accelerator.reduce(found, reduction="sum").cpu().numpy().astype(np.float32)
    if not np.isfinite(logps).all():
        first = int(np.flatnonzero(~np.isfinite(logps).all(axis=1))[0])
        what = f"the reference gives example {first} a probability that is not finite"
        raise ModelError(what, key="model", value=logps[first].tolist(), fix="check its weights, or train in bf16")
    return logps


@torch.no_grad()
def reference_logps(model: nn.Module, batch: dict[str, Any], *, head: nn.Module | None = None) -> Tensor:
    """Returns the log-probabilities of both answers of each pair of a batch, `[P, 2]`."""
    targets = batch["labels"].flatten()[batch["supervised_index"]]

    def function(nll: Tensor) -> tuple[Tensor, Tensor]:
        logps = sum_over_documents(-nll, batch)[batch["pairs"]["of"]]
        return logps.sum(), logps.detach()

    return function_of_losses(model, batch, batch["predictors"], targets, function, head=head)[1]


@contextlib.contextmanager
def _as_reference(trainer: Any, model: Any) -> Iterator[None]:
    """Makes the model the reference, on the device and in the precision of training, while open."""
    home, training = next(model.parameters()).device, model.training
    model.to(trainer.args.device)
    model.eval()
    without = model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext()
    try:
        with without, trainer.accelerator.autocast():
            yield
    finally:
        model.train(training)
        model.to(home)


# ------------------------------------------------------------------------------------------------------ the cache


def reference_weights(model: nn.Module) -> str:
    """Hashes names, shapes, dtypes and values of the reference's weights; of an adapted model, those that are frozen."""
    adapted = hasattr(model, "disable_adapter")
    digest = xxhash.xxh3_128()
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if adapted and value.requires_grad:
            continue
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def reference_key(trainer: Any, model: Any, examples: PairExamples, weights: str) -> str:
    """Returns the name of a file in the cache: a hash of all that the numbers depend on."""
    config = model.config.to_dict()
    args = trainer.args
    return hash_of(
        _VERSION,
        weights,
        {name: repr(value) for name, value in sorted(config.items())},
        str(model.config._attn_implementation),
        examples.fingerprint,
        "bf16" if args.bf16 else "fp16" if args.fp16 else "no",
        args.device.type,
        {package: version(package) for package in ("torch", "transformers")},
    )


def read_reference(path: Path, count: int) -> np.ndarray | None:
    """Reads float32 `[count, 2]`; None where there is no such file, or a damaged one."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    whole = len(data) == _DIGEST + 8 * count and xxhash.xxh3_128(data[_DIGEST:]).digest() == data[:_DIGEST]
    return np.frombuffer(data[_DIGEST:], dtype="<f4").reshape(count, 2).copy() if whole else None


def keep_reference(path: Path, logps: np.ndarray) -> None:
    """Writes a file aside and renames it; a cache that can't be written to is computed again next time."""
    data = logps.astype("<f4").tobytes()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        number, aside = tempfile.mkstemp(prefix=".staging-", dir=path.parent)
        with os.fdopen(number, "wb") as file:
            file.write(xxhash.xxh3_128(data).digest() + data)
        os.replace(aside, path)
