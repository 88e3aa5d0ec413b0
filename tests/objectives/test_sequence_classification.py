"""Sequence classification: the same losses, gradients and weights as transformers' own padded training."""

from __future__ import annotations

import json
import math
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from torch.utils.data import SequentialSampler
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from packtrain.data.examples import build_examples
from packtrain.data.sources import open_rows
from packtrain.errors import DataError, ModelError, RecipeError
from packtrain.modeling.attention.varlen import register
from packtrain.modeling.tokenizer import train_bpe
from packtrain.objectives import OBJECTIVES, SequenceClassification
from packtrain.objectives.sequence_classification import SEQUENCE_CLASSIFICATION, classification_head
from packtrain.packing.plan import make_plan
from packtrain.packing.strategies import resolve_strategy
from packtrain.recipe.reader import load_recipe
from packtrain.training.run import build, train
from packtrain.training.trainer import PackTrainer
from tests.tiny import CONFIGS
from tests.training.helpers import LeakingCollator

UPDATES, PER_UPDATE = 20, 6
STORIES = ("the plot is thin", "fine", "a long and winding tale of " + "very " * 12 + "little", "not bad at all")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    draw = np.random.default_rng(0)
    labels = ("negative", "neutral", "positive")
    lines = [
        {"text": " ".join(draw.choice(STORIES, size=draw.integers(1, 4))), "label": labels[draw.integers(3)]}
        for _ in range(UPDATES * PER_UPDATE)
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


@pytest.fixture(scope="module")
def task(rows):
    opened = open_rows(rows)
    tokenizer = train_bpe((row["text"] for row in opened), 300)
    examples = build_examples(opened, tokenizer, max_length=128)
    return SequenceClassification().task(tokenizer, examples, None, seed=0)


def classifier(task, family: str, lora: bool = False):
    config = AutoConfig.for_model(**CONFIGS[family] | {"vocab_size": len(task.tokenizer), "pad_token_id": 0})
    for name, value in task.config_fields.items():
        setattr(config, name, value)
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_config(config)
    task.prepare(model)
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(2)
        options = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "SEQ_CLS"}
        model = get_peft_model(model, LoraConfig(**options))
    return model


def arguments(directory, **changes):
    return TrainingArguments(
        output_dir=str(directory),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        learning_rate=1e-3,
        max_steps=UPDATES,
        disable_tqdm=True,
        remove_unused_columns=False,
        **changes,
    )


def curve(trainer) -> np.ndarray:
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return np.array([[entry["loss"], entry["grad_norm"]] for entry in logs])


def ours(task, directory, model, strategy: str, collator=None, max_tokens: int = 150) -> np.ndarray:
    plan = make_plan(
        task.train.lengths, strategy=strategy, examples_per_step=PER_UPDATE, max_tokens=max_tokens, max_steps=UPDATES
    )
    steps = plan.gradient_accumulation_steps
    assert steps > 1  # the mean over an update is not that of a micro-batch
    args = arguments(directory, gradient_accumulation_steps=steps, per_device_train_batch_size=1, ignore_data_skip=True)
    collator = collator or task.collator(resolve_strategy(strategy), max_length=128)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.set_attn_implementation(register() if plan.layout == "flat" else "sdpa")
    return curve(PackTrainer(model, args, train_examples=task.train, plan=plan, collator=collator, loss=task.loss))


class InOrder(Trainer):
    def _get_train_sampler(self, dataset=None):
        return SequentialSampler(self.train_dataset)


def theirs(task, directory, model) -> np.ndarray:
    """transformers' Trainer on padded rows, a class a row, in the order of the plan's updates."""
    plan = make_plan(task.train.lengths, examples_per_step=PER_UPDATE, max_tokens=10_000, max_steps=UPDATES)
    order = np.concatenate([plan.examples(step) for step in range(UPDATES)])
    table = [
        {"input_ids": task.train[int(i)]["input_ids"].tolist(), "label": int(task.train.classes[i])} for i in order
    ]
    args = arguments(directory, per_device_train_batch_size=PER_UPDATE)
    collator = DataCollatorWithPadding(task.tokenizer)
    return curve(InOrder(model, args, train_dataset=datasets.Dataset.from_list(table), data_collator=collator))


SLOW = [pytest.mark.slow, pytest.mark.ci]


@pytest.mark.parametrize(
    ("family", "lora"),
    [
        ("gpt2", False),
        ("llama", True),
        *(pytest.param(family, False, marks=pytest.mark.slow) for family in ("llama", "qwen3")),
        pytest.param("qwen3", True, marks=SLOW),
        pytest.param("gpt2", True, marks=pytest.mark.slow),
    ],
)
def test_losses_and_weights_are_those_of_padded_training(task, tmp_path, family, lora):
    reference = classifier(task, family, lora)
    expected = theirs(task, tmp_path, reference)
    assert len(expected) == UPDATES
    for strategy in ("balanced", "pad_longest", "group_by_length"):
        model = classifier(task, family, lora)
        np.testing.assert_allclose(ours(task, tmp_path, model, strategy), expected, rtol=1e-5)
        for (name, weight), other in zip(model.named_parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(weight, other, rtol=1e-4, atol=1e-5, msg=name)


def test_a_leak_between_documents_would_show(task, tmp_path):
    expected = theirs(task, tmp_path, classifier(task, "llama"))
    leaking = LeakingCollator(layout="flat", pad_token_id=0)
    found = ours(task, tmp_path, classifier(task, "llama"), "balanced", collator=leaking)
    assert np.max(np.abs(found - expected) / np.abs(expected)) > 1e-3


def test_the_last_token_alone_is_supervised(task):
    batch = task.collator(resolve_strategy("balanced"), max_length=128)([
        {**task.train[0], "example_id": 0}, {**task.train[3], "example_id": 3},
    ])  # fmt: skip
    bounds = batch["cu_seq_lens_q"].tolist()
    supervised = (batch["labels"][0] != -100).nonzero().flatten().tolist()
    assert supervised == [bound - 1 for bound in bounds[1:]]
    assert batch["labels"][0, supervised].tolist() == [task.train.classes[0], task.train.classes[3]]


def test_classes_are_numbered_in_order_of_their_names(task, rows):
    written = [json.loads(line)["label"] for line in rows.read_text().splitlines()]
    assert task.config_fields["id2label"] == {0: "negative", 1: "neutral", 2: "positive"}
    assert [task.config_fields["id2label"][number] for number in task.train.classes] == written


RECIPE = {
    "model": {"config": {key: value for key, value in CONFIGS["llama"].items() if not key.endswith("token_id")}},
    "batching": {"examples_per_step": PER_UPDATE, "max_tokens": 150},
    "objective": {"name": "sequence_classification"},
    "training": {"max_steps": 5, "use_cpu": True, "report_to": "none", "learning_rate": 1e-3, "logging_steps": 1},
}


@pytest.fixture
def recipe(tmp_path, rows) -> Path:
    data = {"path": str(rows), "max_length": 128, "eval_size": 12}
    model = RECIPE["model"] | {"tokenizer_vocab_size": 300}
    model["config"] = {key: value for key, value in model["config"].items() if key != "vocab_size"}
    settings = RECIPE | {"model": model, "data": data}
    settings["training"] = RECIPE["training"] | {"output_dir": str(tmp_path / "run")}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_a_recipe_trains_saves_and_is_read_again(recipe, tmp_path, task):
    trainer = build(load_recipe(recipe), console=Console(quiet=True))
    assert type(trainer.model).__name__ == "LlamaForSequenceClassification"
    summary = train(load_recipe(recipe), console=Console(quiet=True))
    assert summary.supervised_tokens == 5 * PER_UPDATE and math.isfinite(summary.held_out_loss_after)
    saved = AutoModelForSequenceClassification.from_pretrained(summary.model_dir)
    assert saved.config.id2label == {0: "negative", 1: "neutral", 2: "positive"}
    assert saved.config.pad_token_id is not None


def test_accuracy_is_counted_over_examples(recipe):
    trainer = build(load_recipe(recipe), console=Console(quiet=True))
    found = trainer.evaluate()
    model, right = trainer.model.eval(), 0
    for i in range(len(trainer.eval_dataset)):
        row = trainer.eval_dataset[i]
        logits = model(torch.tensor(row["input_ids"])[None]).logits
        right += int(logits.argmax() == row["labels"][-1])
    assert found["eval_accuracy"] == pytest.approx(right / len(trainer.eval_dataset))
    assert found["eval_tokens"] == len(trainer.eval_dataset)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("batching.strategy=wrapped", "batching.strategy"),
        ("data.overflow=split", "data.overflow"),
        ("objective.loss_weighting=example", "objective.loss_weighting"),
    ],
)
def test_contradictions_are_problems_of_the_recipe(recipe, override, key):
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, [override])
    assert [problem.key for problem in caught.value.problems] == [key]


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ({"text": "fine", "label": 1.5}, "objective.label_column"),
        ({"text": "fine", "label": None}, "objective.label_column"),
        ({"text": "fine", "label": 3}, "objective.label_column"),  # a number among names
        ({"text": "fine"}, "objective.label_column"),
    ],
)
def test_a_row_without_a_usable_class_is_named(recipe, tmp_path, rows, line, key):
    path = tmp_path / "bad.jsonl"
    path.write_text(rows.read_text() + json.dumps(line) + "\n")
    with pytest.raises(DataError) as caught:
        build(load_recipe(recipe, [f"data.path={path}", "data.eval_size=0"]), console=Console(quiet=True))
    assert caught.value.key == key


def test_no_such_column_and_other_counts_are_refused(recipe):
    for override in ("objective.label_column=class", "objective.num_labels=7"):
        with pytest.raises(DataError):
            build(load_recipe(recipe, [override]), console=Console(quiet=True))


def test_a_model_that_pools_before_its_head_is_refused():
    bert = AutoConfig.for_model("bert", vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ModelError, match="pools"):
        classification_head(AutoModelForSequenceClassification.from_config(bert))


def test_it_is_one_line_of_the_objectives():
    assert OBJECTIVES["sequence_classification"] is SequenceClassification
    assert SEQUENCE_CLASSIFICATION.head is classification_head
