"""What is settled for every trainer, and how a job becomes the arguments of one; needs torch and transformers only.

Defaults are left alone but for what lets runs be compared: float32, no gradient clipping, no checkpointing of
activations, one log per update.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from results.conformance.rows import Job, model_directory

COMMON: dict[str, Any] = dict(
    learning_rate=1e-3,
    max_grad_norm=0.0,
    logging_steps=1,
    use_cpu=True,
    report_to="none",
    disable_tqdm=True,
    seed=7,
)


def sizes(job: Job, ranks: int, count: Callable[[Job], int]) -> dict[str, Any]:
    """Returns the fields of TrainingArguments that a job asks for; `count` says how many rows a packer makes of it."""
    saving = dict(save_strategy="steps", save_steps=job.save) if job.save else dict(save_strategy="no")
    size, accumulation = job.per_device, job.accumulation
    if job.parts:
        rows = count(dataclasses.replace(job, parts=0))
        size, accumulation = -(-rows // (ranks * job.parts)), job.parts
    return dict(
        output_dir=job.directory,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        per_device_eval_batch_size=job.per_device_eval,
        max_steps=job.updates,
        num_train_epochs=1,
        **saving,
    )


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def parts(job: Job) -> tuple[Any, Any]:
    """Loads the model, in float32, and the tokenizer."""
    directory = model_directory(job, Path(job.directory).parent)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), AutoTokenizer.from_pretrained(
        directory
    )
