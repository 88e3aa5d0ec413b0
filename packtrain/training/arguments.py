"""The `training:` section of a recipe as transformers' TrainingArguments, which start the process group and the engine."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainingArguments

from packtrain.errors import PacktrainError, refused_by
from packtrain.packing.plan import AnyPlan
from packtrain.recipe.recipe import Recipe
from packtrain.recipe.sections import library_arguments
from packtrain.training.deepspeed_config import deepspeed_config
from packtrain.training.ranks import check_launcher, meeting, start_cpu_group


def training_arguments(recipe: Recipe, plan: AnyPlan, *, evaluate: bool) -> TrainingArguments:
    """Returns the recipe's `training:` section as TrainingArguments, with what the plan decides."""
    decided = {
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "per_device_train_batch_size": 1,  # the plan sizes micro-batches; engines only want a number
        "remove_unused_columns": False,
        "ignore_data_skip": True,  # the plan starts at global_step by itself
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,  # RichProgress shows it
    }
    training: dict[str, Any] = {"eval_on_start": evaluate, "use_cpu": use_cpu_by_default()} | library_arguments(
        recipe.training
    )
    training |= decided
    if recipe.training.get("early_stopping_patience"):
        training.setdefault("metric_for_best_model", "loss")
    training["deepspeed"] = deepspeed_config(
        training,
        world_size=plan.world_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        use_cpu=training["use_cpu"],
    )
    check_launcher(deepspeed=training["deepspeed"] is not None)
    with refused_by("transformers", "training", training), meeting():
        start_cpu_group(training)
        args = TrainingArguments(**training)
    if args.fp16 and args.device.type == "cpu" and training["deepspeed"] is None:
        what, fix = "has no effect on a CPU, which would compute in float32", "set bf16: true, or leave it out"
        raise PacktrainError(what, key="training.fp16", value=True, fix=fix)
    return args


def use_cpu_by_default() -> bool:
    """Whether there is no accelerator, or only Apple's, which has no float64: sums over tokens are made in it."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device is None or device.type == "mps"
