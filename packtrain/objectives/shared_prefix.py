"""Does a model compute the same where a prompt is laid out once for both answers? Checked on the model itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from packtrain.data.formats import IGNORED
from packtrain.errors import ModelError
from packtrain.modeling.attention.prefixes import KEY as SHARED
from packtrain.modeling.isolation import cannot_ask
from packtrain.modeling.per_document import depends_on_length, threshold_of
from packtrain.objectives.logits import head_outputs_at
from packtrain.objectives.pairs import PairCollator

PROBED = ((7, 5, 6), (9, 4, 8), (3, 6, 2))  # prompt, chosen and rejected of each pair
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative to the largest output; half precision: 2e-2
_FIX = "set `objective.shared_prefix: false`"


def check_shared_prefix(trainer: Any, model: nn.Module) -> None:
    """Compares what the model computes of a few pairs with their prompts once and with all of both documents.

    Does nothing where prompts are not shared. Documents that go on from no prompt at all are the control: a model that
    ignores what it is told about prompts would compute these.

    Args:
        trainer: a `PackTrainer`, for its collator and loss.
        model: that of the trainer, not wrapped by an engine yet.

    Raises:
        ModelError: they differ, the model can't run before its engine takes it, or the longest document is beyond a length
            on which the model's arithmetic depends.
    """
    collator = trainer.collator
    if not getattr(collator, "shared", False):
        return
    if (reason := cannot_ask(model)) is not None:
        raise ModelError(f"cannot be checked before training: {reason}", key="objective.shared_prefix", fix=_FIX)
    threshold = threshold_of(model)
    longest = max(part.longest for part in (trainer.train_dataset, trainer.eval_dataset) if part is not None)
    if threshold is not None and longest > threshold:
        raise ModelError(depends_on_length(threshold), key="objective.shared_prefix", value=True, fix=_FIX)
    whole, once = (
        PairCollator(
            layout="flat",
            shared=shared,
            pad_token_id=collator.pad_token_id,
            position_start=collator.position_start,
            last_only=collator.last_only,
        ).collate(*_pairs_of(model))
        for shared in (False, True)
    )
    alone = {name: value for name, value in once.items() if name not in (SHARED, "key_index")}
    alone |= {"cu_seq_lens_k": once["cu_seq_lens_q"], "max_length_k": once["max_length_q"]}
    head, was_training = trainer._head, model.training
    weight = next(model.parameters())
    model.eval()
    try:
        with torch.no_grad():
            expected, found, control = (_outputs(model, batch, head, weight.device) for batch in (whole, once, alone))
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


def _pairs_of(model: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Makes pairs of drawn tokens, as `PairExamples.gather` would give them: ids, labels, lengths and example ids."""
    draw = np.random.default_rng(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids, labels = [], []
    for prompt, *answers in PROBED:
        tokens = draw.integers(vocabulary, size=prompt)
        for answer in answers:
            more = draw.integers(vocabulary, size=answer)
            ids += [tokens, more]
            labels += [np.full(prompt, IGNORED), more]
    lengths = np.array([2 * prompt + sum(answers) for prompt, *answers in PROBED])
    return np.concatenate(ids), np.concatenate(labels), lengths, np.arange(len(PROBED))


def _outputs(model: nn.Module, batch: dict[str, Any], head: nn.Module, device: torch.device) -> torch.Tensor:
    """Returns what the head gives where answers are predicted or scored, float64 `[N, C]`."""
    on_device = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
    pairs = batch["pairs"]
    index = batch["supervised_index"] if len(pairs["last"]) * 2 == len(pairs["document"]) else batch["predictors"]
    return head_outputs_at(model, on_device, index.to(device), head=head).double()
