"""Reward models of recipes and TRL's RewardTrainer on the same pairs in the same order."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

from packtrain.training.run import build
from tests.objectives.preference.helpers import (
    LORA,
    PER_UPDATE,
    RATE,
    UPDATES,
    LeakingPairs,
    curves,
    in_order,
    pair_recipe,
    pair_rows,
    write_pairs,
)

SLOW = [pytest.mark.slow, pytest.mark.ci]
FIGURES = ("loss", "grad_norm", "margin", "mean_reward", "accuracy")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    return write_pairs(path, pair_rows(UPDATES * PER_UPDATE))


def make(rows, output_dir, *, lora: bool = False, center: float = 0.0, shared: bool = False, **changes):
    objective = {"name": "reward", "center_rewards_coefficient": center, "shared_prefix": shared}
    recipe = pair_recipe(rows, output_dir, lora=lora, **changes).to_dict()
    return build(type(pair_recipe(rows, output_dir)).model_validate(recipe | {"objective": objective}))


def theirs(ours, rows, directory, *, lora: bool, center: float) -> np.ndarray:
    order = np.concatenate([ours.plan.examples(step) for step in range(UPDATES)])
    table = [json.loads(line) for line in rows.read_text().splitlines()]
    weights = ours.model.state_dict()
    config = ours.model.config
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa")
    if not lora:
        model.load_state_dict(weights)
    trainer = in_order(RewardTrainer)(
        model=model,
        args=RewardConfig(
            output_dir=str(directory),
            per_device_train_batch_size=PER_UPDATE,
            learning_rate=RATE,
            max_steps=UPDATES,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            max_length=None,
            center_rewards_coefficient=center or None,
        ),
        train_dataset=datasets.Dataset.from_list([table[i] for i in order]),
        processing_class=ours.processing_class,
        peft_config=LoraConfig(**LORA, task_type="SEQ_CLS") if lora else None,
    )
    if lora:
        trainer.model.load_state_dict(weights)
    return curves(trainer, FIGURES)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(("lora", "center"), [(False, 0.0), (False, 0.1), (True, 0.0)])
def test_every_update_is_that_of_trl(rows, tmp_path, lora, center):
    first = make(rows, tmp_path / "ours", lora=lora, center=center)
    expected = theirs(first, rows, tmp_path / "theirs", lora=lora, center=center)
    assert len(expected) == UPDATES and first.plan.gradient_accumulation_steps > 1
    assert len(set(expected[:, -1])) > 2
    layouts = {
        "balanced": first,
        "pad_longest": make(rows, tmp_path / "ours", lora=lora, center=center, batching__strategy="pad_longest"),
        "shared": make(rows, tmp_path / "ours", lora=lora, center=center, shared=True),
    }
    for name, trainer in layouts.items():
        np.testing.assert_allclose(curves(trainer, FIGURES), expected, rtol=1e-5, atol=1e-5, err_msg=name)
    if not center:
        leaks = make(rows, tmp_path / "ours", lora=lora, shared=True)
        leaks.collator = LeakingPairs(layout="flat", pad_token_id=0, shared=True, last_only=True)
        assert np.abs(curves(leaks, FIGURES)[:, 0] / expected[:, 0] - 1).max() > 1e-3
    other = make(rows, tmp_path / "ours", lora=lora, center=0.5)  # the control: a term that TRL didn't have
    assert np.abs(curves(other, FIGURES)[:, 0] / expected[:, 0] - 1).max() > 1e-3


def test_a_reward_is_that_of_the_last_token(rows, tmp_path):
    trainer = make(rows, tmp_path / "ours", shared=True)
    part = trainer.plan.micro_batches(0, 0)[0]
    batch = trainer.train_dataset and next(iter(trainer.get_train_dataloader()))
    losses = trainer.loss.losses(trainer.model, batch, head=trainer._head)
    alone = []
    for example in part.example_ids.tolist():
        prompt, chosen = int(trainer.train_dataset.prompt[example]), int(trainer.train_dataset.chosen[example])
        ids = torch.from_numpy(trainer.train_dataset[example]["input_ids"])[None]
        for document in ids.split([prompt + chosen, ids.shape[1] - prompt - chosen], dim=1):
            alone.append(trainer.model(input_ids=document).logits[0, 0])
    torch.testing.assert_close(losses.scores.flatten(), torch.stack(alone), rtol=1e-5, atol=1e-5)
