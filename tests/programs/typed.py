"""A program that uses every public name, for a type checker alone: what each call gives is known, and is not `Any`."""

from __future__ import annotations

from typing import Any, assert_type

import datasets
import numpy as np
from transformers import PreTrainedModel, TrainingArguments
from trl import SFTTrainer

import packtrain
from packtrain.data.examples import AnyExamples
from packtrain.modeling.audit.report import AuditReport
from packtrain.modeling.unpad import Unpadding
from packtrain.packing.plan import AnyPlan, MicroBatch, Plan
from packtrain.recipe.recipe import Recipe
from packtrain.training.summary import Summary


def use(model: PreTrainedModel, trainer: SFTTrainer, args: TrainingArguments, rows: datasets.IterableDataset) -> None:
    recipe = packtrain.load_recipe("quickstart", ["batching.max_tokens=8192"])
    assert_type(recipe, Recipe)
    assert_type(recipe.batching.max_tokens, int)

    examples, held_out = packtrain.load_examples(recipe)
    assert_type(examples, AnyExamples)
    assert_type(held_out, AnyExamples | None)
    assert_type(examples.lengths, np.ndarray)
    assert_type(examples[0], dict[str, np.ndarray])

    plan = packtrain.make_plan(examples.lengths, strategy="balanced", examples_per_step=8, max_tokens=512)
    assert_type(plan, Plan)
    assert_type(plan.micro_batches(0, 0), list[MicroBatch])
    collator = packtrain.PackCollator(layout="flat", pad_token_id=0)
    assert_type(collator([examples[0]]), dict[str, Any])
    assert_type(packtrain.register_attention(), str)
    stream = packtrain.PackedStream(rows, capacity=4096, collator=collator)
    assert_type(stream.state_dict(), dict[str, Any])

    assert_type(packtrain.audit(model), AuditReport)
    assert_type(packtrain.attach(trainer), SFTTrainer)  # the trainer's own class
    assert_type(packtrain.unpad(model), Unpadding)
    assert_type(packtrain.train(recipe, overwrite=True), Summary)
    own = packtrain.PackTrainer(model, args, train_examples=examples, plan=plan, collator=collator)
    assert_type(own.plan, AnyPlan)
