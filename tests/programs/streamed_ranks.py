"""One of several ranks whose stock Trainer reads packs of a stream; writes which rows it saw, and its weights.

Arguments: a directory.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import packtrain
from packtrain.training.ranks import settle_at_exit
from tests.tiny import tiny_model

ROWS = [{"input_ids": list(range(3, 30 + 7 * (n % 9)))} for n in range(25)]


class StreamTrainer(Trainer):
    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, batch_size=None)

    def training_step(self, model, inputs, *args, **kwargs):
        seen.append([row for row in inputs["example_ids"].tolist() if row >= 0])
        return super().training_step(model, inputs, *args, **kwargs)


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    settle_at_exit()
    packs = packtrain.PackedStream(ROWS, packtrain.PackCollator(), capacity=256)  # before the ranks meet, as a user may
    arguments = TrainingArguments(
        str(directory), use_cpu=True, max_steps=4, ignore_data_skip=True, report_to=[], save_strategy="no"
    )
    model = tiny_model("llama", vocab_size=128)
    model.set_attn_implementation(packtrain.register_attention())
    StreamTrainer(model, arguments, train_dataset=packs).train()
    weights = sum(float(weight.double().abs().sum()) for weight in model.parameters())
    found = {"seen": seen, "weights": weights, "ranks": packs.stream.world_size}
    (directory / f"rank{arguments.process_index}.json").write_text(json.dumps(found))


seen: list[list[int]] = []
if __name__ == "__main__":
    main(Path(sys.argv[1]))
