"""Run under torchrun by plugin/test_ranks.py: a stock trainer, with or without `attach`, and what each rank read."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import datasets
import torch
from transformers import Trainer, TrainingArguments, default_data_collator

import packtrain
from packtrain.plugin.unpadded import _first_batches, _is_full
from packtrain.training.ranks import leave
from tests.plugin.helpers import COMMON, pad
from tests.plugin.trainers import classification
from tests.tiny import random_documents, tiny_model
from tests.training.helpers import long_tailed_lengths

EXAMPLES, PER_UPDATE = 29, 8  # the last update has five


def main(output_dir: Path, how: str) -> None:
    """Trains a causal model, attached or not, or (`unpadded`, `padded`) a classifier on ranks of the same batches.

    Of a `streamed` one it also writes whether the batches that are compared have padding.
    """
    torch.set_num_threads(1)
    if how in ("unpadded", "padded"):
        trainer = classification(output_dir)
        write(output_dir, packtrain.attach(trainer) if how == "unpadded" else trainer, [])
        return
    if how == "streamed":
        trainer = streamed(output_dir)
        padded = not all(map(_is_full, _first_batches(trainer)))
        write(output_dir, packtrain.attach(trainer), [], padded=padded)
        return
    attached = how == "attached"
    documents = random_documents(long_tailed_lengths(EXAMPLES))
    for number, document in enumerate(documents):
        document["input_ids"][0] = 3 + number  # tells which one it is, wherever it lies
    per_device = PER_UPDATE // 2 // int(os.environ.get("WORLD_SIZE", 1))
    args = TrainingArguments(output_dir=str(output_dir), **COMMON | {"per_device_train_batch_size": per_device})
    data = datasets.Dataset.from_list(documents)
    trainer = Trainer(tiny_model("llama"), args, train_dataset=data, data_collator=pad)
    if attached:
        trainer = packtrain.attach(trainer)
    read: list[int] = []

    def record(model, inputs, batch):
        beginnings = batch["input_ids"][batch["position_ids"] == 0] if attached else batch["input_ids"][:, 0]
        read.extend(token - 3 for token in beginnings.tolist() if token >= 3)

    trainer.model.register_forward_pre_hook(record, with_kwargs=True)
    write(output_dir, trainer, read)


def streamed(output_dir: Path) -> Trainer:
    """Returns a trainer on a stream whose batches, of one width as rank 0 deals them out, are padded from the fourth on."""
    full, padded = ({"input_ids": [5] * 8, "attention_mask": [1] * n + [0] * (8 - n)} for n in (8, 6))
    rows = [row | {"labels": [5] * 6 + [-100] * 2} for row in [full] * 12 + [padded] * 20]
    args = TrainingArguments(output_dir=str(output_dir), **COMMON | {"per_device_train_batch_size": 2, "max_steps": 4})
    data = datasets.Dataset.from_list(rows).to_iterable_dataset()
    return Trainer(tiny_model("llama"), args, train_dataset=data, data_collator=default_data_collator)


def write(output_dir: Path, trainer: Trainer, read: list[int], **more: object) -> None:
    """Trains, and writes losses, gradient norms and what was read."""
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    output_dir.mkdir(parents=True, exist_ok=True)
    weights = [float(weight.detach().double().norm()) for weight in trainer.model.parameters()]
    result = {"read": read, "weights": weights, **more}
    result |= {name: [entry[key] for entry in logs] for name, key in (("losses", "loss"), ("norms", "grad_norm"))}
    (output_dir / f"rank{trainer.args.process_index}.json").write_text(json.dumps(result))
    leave(trainer.accelerator)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
