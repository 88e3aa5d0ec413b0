"""Does a model compute the same where what documents share is laid out once? Checked on the model itself."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import nn

from packtrain.data.formats import IGNORED
from packtrain.errors import ModelError
from packtrain.modeling.attention.prefixes import KEY as SHARED
from packtrain.modeling.isolation import cannot_ask
from packtrain.modeling.per_document import depends_on_length, threshold_of
from packtrain.objectives.groups import GroupCollator
from packtrain.objectives.logits import head_outputs_at

# (prompt, answer) in tokens, of each example's documents; a prompt begins as the document before it, and goes on alone
PROBED = (((7, 5), (7, 6)), ((9, 4), (9, 8), (9, 3)), ((3, 6), (8, 2), (13, 5)))
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative to the largest output; half precision: 2e-2
_FIX = "set `objective.shared_prefix: false`"


def check_shared_prefix(trainer: Any) -> None:
    """Compares what the model computes of a few answers with what they share once and with all of every document.

    Does nothing where nothing is shared. Documents that go on from nothing at all are the control: a model that ignores
    what it is told about prefixes would compute these.

    Args:
        trainer: a `PackTrainer` whose model its engine has not taken yet.

    Raises:
        ModelError: they differ, the model can't run before its engine takes it, or the longest document is beyond a length
            on which the model's arithmetic depends.
    """
    collator = trainer.collator
    if not getattr(collator, "shared", False):
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    if (reason := cannot_ask(model)) is not None:
        raise ModelError(f"cannot be checked before training: {reason}", key="objective.shared_prefix", fix=_FIX)
    threshold = threshold_of(model)
    longest = max(part.longest for part in (trainer.train_dataset, trainer.eval_dataset) if part is not None)
    if threshold is not None and longest > threshold:
        raise ModelError(depends_on_length(threshold), key="objective.shared_prefix", value=True, fix=_FIX)
    whole, once = (
        GroupCollator(
            layout="flat",
            shared=shared,
            pad_token_id=collator.pad_token_id,
            position_start=collator.position_start,
            last_only=collator.last_only,
        ).collate(*_drawn(model))
        for shared in (False, True)
    )
    alone = {name: value for name, value in once.items() if name not in (SHARED, "key_index")}
    alone |= {"cu_seq_lens_k": once["cu_seq_lens_q"], "max_length_k": once["max_length_q"]}
    asked = "supervised_index" if collator.last_only else "predictors"
    head, was_training = trainer._head, model.training
    weight = next(model.parameters())
    model.eval()
    try:
        with torch.no_grad():
            expected, found, control = (_outputs(model, batch, batch[asked], head) for batch in (whole, once, alone))
    except RuntimeError as error:
        raise ModelError(
            f"cannot run with a shared prefix: {error}", key="objective.shared_prefix", fix=_FIX
        ) from error
    finally:
        model.train(was_training)
    size, off = expected.abs().max(), (found - expected).abs().max()
    allowed = _TOLERANCE.get(weight.dtype, 2e-2) * size
    if not off <= allowed or (control - expected).abs().max() <= off:
        what = (
            f"computes something else for answers that share a prompt: outputs of up to {size:.3g} differ by {off:.2g}"
        )
        fix = f"{_FIX}: its layers mix tokens otherwise than by an attention that knows of prompts"
        raise ModelError(what, key="objective.shared_prefix", value=type(model).__name__, fix=fix)


def _drawn(model: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Draws the tokens of examples, as `GroupExamples.gather` would give them: the arguments of `GroupCollator.collate`."""
    draw = np.random.default_rng(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids, labels = [], []
    for documents in PROBED:
        before = draw.integers(vocabulary, size=0)
        for prompt, answer in documents:
            new = draw.integers(vocabulary, size=max(0, prompt - len(before)) + answer)
            before = np.concatenate([before[:prompt], new])
            ids.append(before)
            labels.append(np.where(np.arange(len(before)) < prompt, IGNORED, before))
    lengths, supervised = (np.array([sum(map(of, documents)) for documents in PROBED]) for of in (sum, itemgetter(1)))
    return np.concatenate(ids), np.concatenate(labels), lengths, np.arange(len(PROBED)), supervised


def _outputs(model: nn.Module, batch: dict[str, Any], index: torch.Tensor, head: nn.Module) -> torch.Tensor:
    """Returns what the head gives at places of a batch, float64 `[N, C]`."""
    device = next(model.parameters()).device
    on_device = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
    return head_outputs_at(model, on_device, index.to(device), head=head).double()
