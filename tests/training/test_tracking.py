"""Trackers are told what ran: the recipe's keys and the plan, in TensorBoard's own file and in `to_dict`, which all log."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
from transformers import Seq2SeqTrainingArguments, TrainingArguments

from packtrain.recipe.reader import load_recipe
from packtrain.training.run import build, train
from tests.training.helpers import make_trainer

RECIPE = """
model:
  config: {model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}
  tokenizer_vocab_size: 300
data: {path: "packtrain:arithmetic", num_rows: 40, max_length: 512, overflow: drop}
batching: {examples_per_step: 10, max_tokens: 1024}
lora: {r: 4, target_modules: all-linear}
training: {output_dir: OUT, use_cpu: true, max_steps: 2, logging_steps: 1, save_strategy: "no", report_to: tensorboard}
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "tiny.yaml").write_text(RECIPE.replace("OUT", str(tmp_path / "run")))
    return load_recipe(tmp_path / "tiny.yaml")


def logged_by_tensorboard(directory) -> dict[str, dict]:
    """Reads the texts that a run has written for TensorBoard."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (events,) = directory.rglob("events.out.tfevents.*")
    read = accumulator.EventAccumulator(str(events))
    read.Reload()
    return {
        tag: json.loads(read.Tensors(tag)[0].tensor_proto.string_val[0])
        for tag in ("args/text_summary", "model_config/text_summary")
    }


def test_tensorboard_has_the_recipe_and_no_batch_size_of_one(recipe, tmp_path):
    train(recipe)
    args = logged_by_tensorboard(tmp_path / "run")["args/text_summary"]
    expected = {
        "batching.strategy": "balanced",
        "batching.max_tokens": 1024,
        "batching.examples_per_step": 10,
        "data.path": "packtrain:arithmetic",
        "objective.name": "causal_lm",
        "lora.r": 4,
        "plan.updates": 2,
        "plan.world_size": 1,
        "max_steps": 2,
    }
    assert args.items() >= expected.items()
    assert len(args["plan.hash"]) == 64 and args["gradient_accumulation_steps"] == args["plan.micro_batches_per_update"]
    assert not args.keys() & {"per_device_train_batch_size", "per_device_eval_batch_size", "train_batch_size"}
    plain = TrainingArguments(str(tmp_path), use_cpu=True).to_dict()  # control: what stock arguments say
    assert "per_device_train_batch_size" in plain and "batching.strategy" not in plain


def test_no_secret_reaches_a_tracker(recipe):
    token = "hf_" + "a" * 34
    config = recipe.to_dict()
    config["data"]["path"] = f"https://user:{token}@example.org/rows.jsonl"
    told = json.dumps(build(recipe).args.to_dict())
    assert "packtrain:arithmetic" in told
    from packtrain.training.tracking import facts_for_trackers

    other, plan = type(recipe).model_validate(config), build(recipe).plan
    assert token not in json.dumps(facts_for_trackers(other, plan)) and token in json.dumps(other.to_dict())


def test_a_run_put_together_in_python_tells_its_plan(tmp_path):
    told = make_trainer(tmp_path, strategy="bfd").args.to_dict()
    assert told["plan.strategy"] == "bfd" and told["plan.max_tokens"] == 160 and "batching.strategy" not in told


def test_copies_and_pickles_are_the_arguments_as_they_were_given(tmp_path):
    """`training_args.bin` loads where packtrain is not installed; a class of the user's stays that class."""
    from packtrain.training.tracking import reporting_arguments

    for kind in (TrainingArguments, Seq2SeqTrainingArguments):
        given = kind(str(tmp_path), use_cpu=True, learning_rate=0.5)
        told = reporting_arguments(reporting_arguments(given, {"a.b": 1}), {"a.b": 2})
        assert isinstance(told, kind) and told.to_dict()["a.b"] == 2
        assert told.to_sanitized_dict().keys() == given.to_sanitized_dict().keys() - {
            "per_device_train_batch_size", "per_device_eval_batch_size", "train_batch_size", "eval_batch_size",
        } | {"a.b"}  # fmt: skip
        stored = pickle.dumps(told)
        assert b"packtrain" not in stored
        for again in (pickle.loads(stored), copy.copy(told), copy.deepcopy(told)):
            assert type(again) is kind and again.to_dict() == given.to_dict()
