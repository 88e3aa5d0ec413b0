"""Masked diffusion through PackTrainer: the layout changes nothing, and a resumed run sees the same noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import PrinterCallback, TrainingArguments

from packtrain.modeling.attention.varlen import choose_implementation
from packtrain.objectives.masked_diffusion.loss import Masking, make_bidirectional, masked_diffusion
from packtrain.objectives.masked_diffusion.noise import NoisingCollator
from packtrain.packing.plan import make_plan
from packtrain.packing.strategies import resolve_strategy
from packtrain.training.trainer import PackTrainer
from tests.objectives.masked_diffusion.test_loss import MASK, TAIL_OF_THREE, tailed_examples
from tests.tiny import tiny_model

LENGTHS = [5, 9, 12, 4, 7, 6, 14, 8, 5, 11, 6, 4, 9, 10]
MASKING = Masking(mask_token_id=MASK)


def trainer_for(output_dir, strategy: str, *, family: str = "llama", collator=None, **training) -> PackTrainer:
    examples = tailed_examples(LENGTHS)
    width = int(examples.lengths.max())
    plan = make_plan(
        examples.lengths, strategy=strategy, examples_per_step=5, max_tokens=3 * width, max_length=width, num_epochs=3
    )
    rule = resolve_strategy(strategy)
    implementation = choose_implementation("auto", layout=plan.layout, device="cpu", dtype=torch.float32)
    model = make_bidirectional(tiny_model(family, attn_implementation=implementation, attention_dropout=0.0))
    options = {"save_strategy": "no", "logging_steps": 1, "learning_rate": 3e-3, "report_to": "none"} | training
    args = TrainingArguments(
        output_dir=str(output_dir),
        use_cpu=True,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        num_train_epochs=3,
        ignore_data_skip=True,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        remove_unused_columns=False,
        **options,
    )
    layout = dict(layout=plan.layout, pad_token_id=0, padded_to=rule.padded_to, max_length=width)
    trainer = PackTrainer(
        model,
        args,
        train_examples=examples,
        plan=plan,
        collator=(collator or NoisingCollator)(MASKING, TAIL_OF_THREE, seed=3, **layout),
        loss=masked_diffusion(MASKING),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def curve(trainer: PackTrainer) -> np.ndarray:
    """`[updates, 2]`: loss and gradient norm."""
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return np.array([[entry["loss"], entry["grad_norm"]] for entry in logs])


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> np.ndarray:
    return curve(trainer_for(tmp_path_factory.mktemp("reference"), "pad_max"))


@pytest.mark.parametrize("strategy", ["pad_longest", "group_by_length", "padding_free", "balanced"])
def test_layouts_do_not_change_the_trajectory(tmp_path, reference, strategy):
    assert reference.shape == (9, 2) and (reference > 0).all()
    np.testing.assert_allclose(curve(trainer_for(tmp_path, strategy)), reference, rtol=1e-4)


def test_a_leak_between_documents_would_be_noticed(tmp_path, reference):
    """Control: the same batches with one boundary for all documents."""

    class OneLongDocument(NoisingCollator):
        def collate(self, *args):
            batch = super().collate(*args)
            ends = torch.tensor([0, batch["input_ids"].shape[1]], dtype=torch.int32)
            return batch | {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}

        def at_epoch(self, epoch):
            return OneLongDocument(self.masking, self.tail, seed=self.seed, epoch=epoch, **self._layout)

    leaking = curve(trainer_for(tmp_path, "padding_free", collator=OneLongDocument))
    assert np.abs(leaking / reference - 1).max() > 1e-3


def test_a_resumed_run_ends_with_the_same_weights(tmp_path):
    unbroken = trainer_for(tmp_path, "balanced", save_strategy="steps", save_steps=1)
    unbroken.train()
    expected = {name: p.detach().clone() for name, p in unbroken.model.named_parameters()}
    for killed_after in (2, 7):  # in epochs 1 and 3
        resumed = trainer_for(tmp_path, "balanced", save_strategy="steps", save_steps=1)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{killed_after}"))
        assert all(torch.equal(p, expected[name]) for name, p in resumed.model.named_parameters())
