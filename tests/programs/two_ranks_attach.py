"""Run under torchrun by plugin/test_ranks.py: a stock trainer, with or without `attach`, and what each rank read."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import datasets
import torch
from transformers import Trainer, TrainingArguments

import packtrain
from packtrain.training.ranks import leave
from tests.plugin.helpers import COMMON, pad
from tests.tiny import random_documents, tiny_model
from tests.training.helpers import long_tailed_lengths

EXAMPLES, PER_UPDATE = 29, 8  # the last update has five


def main(output_dir: Path, attached: bool) -> None:
    torch.set_num_threads(1)
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
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    output_dir.mkdir(parents=True, exist_ok=True)
    result = {"read": read, "losses": losses}
    (output_dir / f"rank{args.process_index}.json").write_text(json.dumps(result))
    leave(trainer.accelerator)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "attached")
