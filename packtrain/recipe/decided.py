"""Settings of TrainingArguments that packtrain decides itself, why, and what to set instead."""

from __future__ import annotations

# `training:` key -> (the one value it may have, why another can't be, what to do). Unset is always fine.
NEVER = object()
DECIDED_BY_US: dict[str, tuple[object, str, str]] = {
    "per_device_train_batch_size": (
        NEVER,
        "the planner decides how many examples share a micro-batch",
        "set `batching.examples_per_step` (examples per update, over all devices) and `batching.max_tokens` "
        "(tokens per micro-batch)",
    ),
    "train_sampling_strategy": (
        NEVER,
        "the order of the examples belongs to the plan",
        "set `batching.strategy`, for example to `group_by_length`",
    ),
    "length_column_name": (NEVER, "lengths come from the tokenised data", "leave it out"),
    "auto_find_batch_size": (
        False,
        "a batch size found by trial would change what an update sees",
        "lower `batching.max_tokens`: the updates stay the same",
    ),
    "dataloader_drop_last": (False, "no example is dropped", "leave it out"),
    "remove_unused_columns": (False, "the metadata of packed batches would be removed", "leave it out"),
    "logging_nan_inf_filter": (False, "a loss of NaN would be logged as 0.0", "leave it out"),
    "average_tokens_across_devices": (
        True,
        "the loss is divided by the weight of the whole step on all devices",
        "leave it out",
    ),
    "label_smoothing_factor": (0.0, "the loss has no label smoothing", "leave it out"),
    "use_cache": (False, "a cache joins the documents of a packed batch", "leave it out"),
    "resume_from_checkpoint": (
        NEVER,
        "it is said on the command line",
        "use `packtrain train RECIPE --resume`",
    ),
    "do_train": (True, "training is what `packtrain train` does", "leave it out"),
    "do_eval": (
        NEVER,
        "there is evaluation where there are data for it",
        "set `data.eval_size`, and `training.eval_strategy` for more than at the end",
    ),
    "per_device_eval_batch_size": (
        NEVER,
        "the planner sizes the micro-batches of evaluation, and the loss does not depend on them",
        "set `batching.max_tokens`",
    ),
    **dict.fromkeys(
        ("bf16_full_eval", "fp16_full_eval"),
        (False, "evaluation computes in the precision of training", "set `training.bf16` or `training.fp16`"),
    ),
    "prediction_loss_only": (True, "evaluation sums losses and keeps no predictions", "leave it out"),
    "include_for_metrics": ([], "evaluation sums losses and keeps nothing for metrics", "leave it out"),
    **dict.fromkeys(
        ("batch_eval_metrics", "eval_use_gather_object"),
        (False, "evaluation sums losses and has no other metrics", "leave it out"),
    ),
    "eval_do_concat_batches": (True, "evaluation keeps no predictions", "leave it out"),
    "eval_accumulation_steps": (NEVER, "evaluation keeps no predictions that would fill the device", "leave it out"),
    "dataloader_persistent_workers": (False, "every epoch starts its own workers", "leave it out"),
    "dataloader_multiprocessing_context": (NEVER, "workers are started as Python starts them", "leave it out"),
    "dataloader_in_order": (True, "an update's micro-batches are those next to each other", "leave it out"),
    "ignore_data_skip": (True, "the plan goes on at the update that a run stopped at by itself", "leave it out"),
    "disable_tqdm": (True, "progress is shown in packtrain's own way", "leave it out"),
    "do_predict": (False, "there is nothing to predict on", "leave it out"),
    "hub_token": (NEVER, "a secret does not belong in a recipe", "set the environment variable HF_TOKEN"),
}
