"""A step is a set of examples: every step-scope strategy gives the same losses and gradients as plain padding."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from transformers import PrinterCallback

from packtrain.objectives import chunks
from packtrain.objectives.logits import computes_in_chunks, output_head
from packtrain.packing.collator import PackCollator
from tests.tiny import CONFIGS, VOCABULARY
from tests.training.helpers import Curve, curve, make_trainer

REFERENCE = "pad_max"
LAID_OUT_OTHERWISE = ("pad_longest", "group_by_length", "padding_free", "balanced")
# in the ordinary suite; the rest is slow
ORDINARY = [("gpt2", "token", False, False), ("llama", "example", True, True)]


def _marks(family: str, weighting: str, lora: bool, checkpointing: bool) -> list:
    if (family, weighting, lora, checkpointing) in ORDINARY:
        return []
    for_ci = lora and checkpointing and weighting == "token"  # every family with all of them
    return [pytest.mark.slow, *([pytest.mark.ci] if for_ci else [])]


SETTINGS = [
    pytest.param(
        family,
        weighting,
        lora,
        checkpointing,
        id="-".join([family, weighting, "lora" if lora else "full", "checkpointing" if checkpointing else "plain"]),
        marks=_marks(family, weighting, lora, checkpointing),
    )
    for family in sorted(CONFIGS)
    for weighting, lora, checkpointing in itertools.product(("token", "example"), (False, True), (False, True))
]


def run(tmp_path, **settings) -> Curve:
    trainer = make_trainer(tmp_path, **settings)
    trainer.remove_callback(PrinterCallback)
    return curve(trainer)


@pytest.mark.parametrize(("family", "loss_weighting", "lora", "checkpointing"), SETTINGS)
def test_layouts_do_not_change_the_updates(tmp_path, family, loss_weighting, lora, checkpointing):
    settings = dict(family=family, loss_weighting=loss_weighting, lora=lora, gradient_checkpointing=checkpointing)
    reference = run(tmp_path, strategy=REFERENCE, **settings)
    assert len(reference.loss) == 20 and np.all(reference.grad_norm > 0)
    for strategy in LAID_OUT_OTHERWISE:
        difference = run(tmp_path, strategy=strategy, **settings).difference(reference)
        assert difference < 1e-4, f"{strategy}: {difference:.2e}"


@pytest.mark.parametrize(("family", "loss_weighting", "lora", "checkpointing"), SETTINGS)
def test_chunks_do_not_change_the_updates(tmp_path, monkeypatch, family, loss_weighting, lora, checkpointing):
    """Chunks of ten positions; micro-batches have up to 140 of them."""
    settings = dict(family=family, loss_weighting=loss_weighting, lora=lora, gradient_checkpointing=checkpointing)
    reference = run(tmp_path, strategy=REFERENCE, **settings)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 10 * 4 * VOCABULARY)
    for strategy in ("balanced", "pad_longest"):
        trainer = make_trainer(tmp_path, strategy=strategy, **settings)
        trainer.remove_callback(PrinterCallback)
        assert curve(trainer).difference(reference) < 1e-4
        assert computes_in_chunks(output_head(trainer.model))


@pytest.mark.ci
@pytest.mark.slow
def test_compiling_does_not_change_the_updates(tmp_path):
    plain = run(tmp_path, strategy="balanced", max_steps=4)
    compiled = run(tmp_path, strategy="balanced", max_steps=4, torch_compile=True, torch_compile_backend="eager")
    assert compiled.difference(plain) < 1e-4


def test_weightings_differ(tmp_path):
    """Control: the two weightings are not the same loss, so agreeing within each says something."""
    token, example = (run(tmp_path, strategy="balanced", loss_weighting=w) for w in ("token", "example"))
    assert token.difference(example) > 1e-3


def test_positions_that_do_not_restart_are_noticed(tmp_path):
    """Control: a flat batch whose positions and boundaries run on is a different model input."""

    class OneLongDocument(PackCollator):
        def collate(self, *args, **kwargs):
            batch = super().collate(*args, **kwargs)
            total = batch["input_ids"].shape[1]
            batch["position_ids"] = batch["position_ids"].new_tensor([range(total)])
            for side in "qk":
                batch[f"cu_seq_lens_{side}"] = batch[f"cu_seq_lens_{side}"].new_tensor([0, total])
                batch[f"max_length_{side}"] = total
            return batch

    leaking = OneLongDocument(layout="flat", pad_token_id=0)
    reference = run(tmp_path, strategy="padding_free")
    assert run(tmp_path, strategy="padding_free", collator=leaking).difference(reference) > 1e-3


def test_cutting_documents_is_noticed(tmp_path):
    """Control: `wrapped` changes what an update sees."""
    reference, wrapped = (run(tmp_path, strategy=name, max_steps=5) for name in ("padding_free", "wrapped"))
    assert wrapped.difference(reference) > 1e-3
