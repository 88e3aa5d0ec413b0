"""DPO of a recipe and TRL's DPOTrainer on the same pairs in the same order: every figure of every update."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pytest
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

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

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    return write_pairs(path, pair_rows(UPDATES * PER_UPDATE))


def theirs(ours, rows, directory, *, lora: bool, **options) -> np.ndarray:
    """TRL with the model, tokenizer and pairs of a trainer of ours, in the order of its plan."""
    order = np.concatenate([ours.plan.examples(step) for step in range(UPDATES)])
    table = [json.loads(line) for line in rows.read_text().splitlines()]
    weights = ours.model.state_dict()
    base = ours.model.get_base_model() if lora else ours.model
    model = AutoModelForCausalLM.from_config(base.config, attn_implementation="sdpa")
    reference = None
    if not lora:
        model.load_state_dict(weights)
        reference = AutoModelForCausalLM.from_config(base.config, attn_implementation="sdpa")
        reference.load_state_dict(weights)
    trainer = in_order(DPOTrainer)(
        model=model,
        ref_model=reference,
        args=DPOConfig(
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
            **options,
        ),
        train_dataset=datasets.Dataset.from_list([table[i] for i in order]),
        processing_class=ours.processing_class,
        peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM") if lora else None,
    )
    if lora:
        trainer.model.load_state_dict(weights)
    return curves(trainer)


@pytest.mark.parametrize(
    ("lora", "options"),
    [
        pytest.param(False, {}, marks=pytest.mark.ci),
        pytest.param(True, {}, marks=pytest.mark.ci),
        *(
            (False, {"loss_type": kind, "beta": 0.3, **more})
            for kind, more in {
                "sigmoid_norm": {},
                "hinge": {},
                "ipo": {},
                "exo_pair": {"label_smoothing": 1e-3},
                "nca_pair": {},
                "robust": {"label_smoothing": 0.1},
                "bco_pair": {},
                "sppo_hard": {},
                "apo_zero": {},
                "apo_down": {},
            }.items()
        ),
    ],
)
def test_every_update_is_that_of_trl(rows, tmp_path, lora, options):
    changes = {f"objective__{name}": value for name, value in options.items()}

    def ours(**more):
        return build(pair_recipe(rows, tmp_path / "ours", lora=lora, **changes, **more))

    first = ours()
    expected = theirs(first, rows, tmp_path / "theirs", lora=lora, **options)
    assert len(expected) == UPDATES
    assert len(set(expected[:, -1])) > 2, "accuracies that say nothing"
    assert first.plan.gradient_accumulation_steps > 1  # the mean over an update is not that of a micro-batch
    layouts = {
        "balanced": first,
        "pad_longest": ours(batching__strategy="pad_longest"),
        "shared": ours(objective__shared_prefix=True),
    }
    for name, trainer in layouts.items():
        found = curves(trainer)
        if not lora:  # the model is its reference: which of two equal rewards is larger is up to rounding
            assert np.abs(expected[0, 2:5]).max() < 1e-6
            found[0, -1] = expected[0, -1]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5, err_msg=name)
    leaks = ours(objective__shared_prefix=True)
    leaks.collator = LeakingPairs(layout="flat", pad_token_id=0, shared=True)
    assert np.abs(curves(leaks)[1:, 0] / expected[1:, 0] - 1).max() > 1e-3
