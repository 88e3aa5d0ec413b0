"""Runs of tiny models through PackTrainer, for the tests of the training room."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

from packtrain.data.examples import Examples
from packtrain.modeling.attention.varlen import choose_implementation
from packtrain.packing.collator import PackCollator
from packtrain.packing.plan import make_plan
from packtrain.packing.strategies import resolve_strategy
from packtrain.training.trainer import PackTrainer
from tests.tiny import random_documents, tiny_model

MAX_LENGTH = 48


def long_tailed_lengths(count: int, seed: int = 0) -> list[int]:
    """Lengths from 4 to MAX_LENGTH, most of them short."""
    drawn = np.random.default_rng(seed).lognormal(2.3, 0.7, count)
    return np.clip(drawn, 4, MAX_LENGTH).astype(int).tolist()


def tiny_examples(count: int = 60, seed: int = 0) -> Examples:
    rows = random_documents(long_tailed_lengths(count, seed), seed=seed)
    return Examples.from_dataset(datasets.Dataset.from_list(rows))


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Loss and global gradient norm (before clipping) of every update."""

    loss: np.ndarray
    grad_norm: np.ndarray

    def difference(self, other: Curve) -> float:
        """Largest relative difference to `other`, over both figures and all updates."""
        return max(
            np.max(np.abs(mine - theirs) / np.abs(theirs))
            for mine, theirs in ((self.loss, other.loss), (self.grad_norm, other.grad_norm))
        )


class LeakingCollator(PackCollator):
    """A flat batch whose documents see each other: the bounds say that there is one, and nothing else is changed."""

    def collate(self, *args, **kwargs):
        batch = super().collate(*args, **kwargs)
        total = batch["input_ids"].shape[1]
        for side in "qk":
            batch[f"cu_seq_lens_{side}"] = batch[f"cu_seq_lens_{side}"].new_tensor([0, total])
            batch[f"max_length_{side}"] = total
        return batch


def make_trainer(
    output_dir: Path,
    *,
    strategy: str,
    family: str = "llama",
    loss_weighting: str = "token",
    lora: bool = False,
    examples_per_step: int = 6,
    max_tokens: int = 160,
    attn_implementation: str = "auto",
    examples: Examples | None = None,
    collator: PackCollator | None = None,
    world_size: int = 1,
    num_epochs: float = 2.0,
    shapes: int | None = None,
    schedule: list[tuple[float, int]] | None = None,
    model: torch.nn.Module | None = None,
    model_changes: dict | None = None,
    use_cpu: bool = True,
    probe_memory: bool | None = None,
    on_nonfinite: str = "stop",
    max_skipped_updates: int = 10,
    worker_timeout: int = 300,
    **training,
) -> PackTrainer:
    """A PackTrainer over random documents; keyword arguments beyond the named ones are TrainingArguments."""
    examples = examples or tiny_examples()
    plan = make_plan(
        examples.lengths,
        strategy=strategy,
        shapes=shapes,
        schedule=schedule,
        seed=0,
        examples_per_step=examples_per_step,
        max_tokens=max_tokens,
        max_length=MAX_LENGTH,
        num_epochs=num_epochs,
        max_steps=training.get("max_steps", -1),
        world_size=world_size,
    )
    dtype = torch.bfloat16 if training.get("bf16") else torch.float32
    implementation = choose_implementation(
        attn_implementation, layout=plan.layout, device="cpu" if use_cpu else "cuda", dtype=dtype
    )
    if implementation is None and family == "gemma2":
        implementation = "eager"  # as load_model has it: some versions of transformers pick sdpa, without the softcap
    model = model or tiny_model(family, attn_implementation=implementation, **(model_changes or {}))
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    args = TrainingArguments(
        output_dir=str(output_dir),
        use_cpu=use_cpu,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        per_device_train_batch_size=1,
        num_train_epochs=num_epochs,
        ignore_data_skip=True,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        **{"logging_steps": 1, "learning_rate": 1e-3, "report_to": "none", "save_strategy": "no"} | training,
    )
    return PackTrainer(
        model,
        args,
        train_examples=examples,
        plan=plan,
        probe_memory=probe_memory,
        on_nonfinite=on_nonfinite,
        max_skipped_updates=max_skipped_updates,
        worker_timeout=worker_timeout,
        collator=collator
        or PackCollator(
            layout=plan.layout,
            pad_token_id=0,
            padded_to=resolve_strategy(strategy).padded_to,
            max_length=MAX_LENGTH,
            loss_weighting=loss_weighting,
        ),
    )


def curve(trainer: PackTrainer) -> Curve:
    """Train, and read loss and gradient norm of every update from the logs."""
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return Curve(
        loss=np.array([entry["loss"] for entry in logs]), grad_norm=np.array([entry["grad_norm"] for entry in logs])
    )
