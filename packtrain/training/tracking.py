"""What W&B, TensorBoard, trackio, MLflow and the other trackers are told of a run: the recipe and its plan.

transformers' integrations all log `args.to_dict()`. `reporting_arguments` gives it the keys of the recipe, as they are
written there (`batching.strategy`, `data.path`), and what the plan made of them (`plan.updates`); it leaves out the batch
sizes of TrainingArguments, which say nothing here: the plan sizes micro-batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from packtrain.errors import PacktrainError
from packtrain.packing.plan import AnyPlan
from packtrain.recipe.recipe import OWN_SECTIONS, Recipe
from packtrain.recipe.sections import library_arguments
from packtrain.training.checkpoints import redacted

BATCH_SIZES = ("per_device_train_batch_size", "per_device_eval_batch_size", "train_batch_size", "eval_batch_size")
PACKAGES = {"azure_ml": "azureml-mlflow", "comet_ml": "comet_ml"}  # where pip calls a tracker otherwise
LOGGED_ANYWAY = ("model.config",)  # trackers log the model's whole config


class _Reporting(TrainingArguments):
    """Trainer's arguments with more for trackers; pickled and copied, they are plain ones again (`training_args.bin`)."""

    _facts: Mapping[str, Any]
    _kind: type[TrainingArguments]

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().to_dict().items() if key not in BATCH_SIZES} | dict(self._facts)

    def to_sanitized_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().to_sanitized_dict().items() if key not in BATCH_SIZES}

    def __reduce__(self) -> tuple:
        state = {key: value for key, value in vars(self).items() if key not in ("_facts", "_kind")}
        return object.__new__, (self._kind,), state


def reporting_arguments(args: TrainingArguments, facts: Mapping[str, Any]) -> TrainingArguments:
    """Returns a copy of the arguments, of their class, that tells trackers `facts` too."""
    kind = type(args)._kind if isinstance(args, _Reporting) else type(args)
    told = object.__new__(type(kind.__name__, (_Reporting, kind), {"_kind": kind}))
    told.__dict__.update(vars(args), _facts=facts)
    return told


def facts_for_trackers(recipe: Recipe | None, plan: AnyPlan) -> dict[str, Any]:
    """Returns flat `section.key` -> plain value, without secrets: the recipe as far as it says something, and the plan.

    Args:
        recipe: the settings of the run; None for one put together in Python. The rest of `training:` is in the arguments.
    """
    tree = redacted(recipe.to_dict()) if recipe is not None else {}
    arguments = library_arguments(tree.get("training", {}))
    tree["training"] = {key: value for key, value in tree.get("training", {}).items() if key not in arguments}
    facts = {
        f"{section}.{key}": value
        for section in (*OWN_SECTIONS, "objective", "lora", "training")
        for key, value in (tree.get(section) or {}).items()
        if value is not None and f"{section}.{key}" not in LOGGED_ANYWAY
    }
    return facts | {
        "plan.strategy": plan.strategy,
        "plan.max_tokens": plan.scope.max_tokens,
        "plan.layout": plan.layout,
        **({} if plan.num_examples is None else {"plan.examples": plan.num_examples}),
        "plan.updates": plan.total_steps,
        "plan.micro_batches_per_update": plan.gradient_accumulation_steps,
        "plan.world_size": plan.world_size,
        "plan.hash": plan.hash,
    }


def check_trackers(report_to: str | list[str] | None) -> None:
    """Checks that every tracker of `training.report_to` is known to transformers and installed.

    Raises:
        PacktrainError: one is not.
    """
    available = get_available_reporting_integrations()
    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        if name in ("none", "all") or name in available or name == "flyte":  # transformers can't ask for flyte
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            what, fix = (
                "is no tracker that transformers knows",
                f"choose among {', '.join(sorted(INTEGRATION_TO_CALLBACK))}",
            )
            raise PacktrainError(what, key="training.report_to", value=name, fix=fix)
        fix = f"pip install {PACKAGES.get(name, name)}, or leave it out of training.report_to"
        raise PacktrainError(f"{name} is not installed", key="training.report_to", fix=fix)
