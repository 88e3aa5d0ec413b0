"""Run under torchrun by training/test_two_processes.py: trains, and writes what each rank read and every loss."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from packtrain.training.ranks import leave
from tests.training.helpers import make_trainer


def main(output_dir: Path, strategy: str) -> None:
    torch.set_num_threads(1)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    trainer = make_trainer(output_dir, strategy=strategy, world_size=world_size)
    assert trainer.args.world_size == world_size
    read: list[list[int]] = []
    fetch = trainer.get_batch_samples

    def fetch_and_record(*args):
        batches, total = fetch(*args)
        read.append([i for batch in batches for i in batch["example_ids"].tolist() if i >= 0])
        return batches, total

    trainer.get_batch_samples = fetch_and_record
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    output_dir.mkdir(parents=True, exist_ok=True)
    result = {"read": read, "losses": losses, "norms": norms, "epoch": trainer.state.epoch}
    (output_dir / f"rank{trainer.args.process_index}.json").write_text(json.dumps(result))
    leave(trainer.accelerator)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
