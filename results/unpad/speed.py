"""Times trainers as they are and attached, in turns, and asks for their peak memory in processes of their own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedModel, Trainer, TrainerCallback

from packtrain.compare.statistics import largest_relative_difference, paired_ratio
from packtrain.plugin.attach import attach
from results.unpad.cases import Words, dpo, long_tailed, reward, sequence

UPDATES = 4
WAYS: dict[str, Callable[[Trainer], Trainer]] = {"untouched": lambda trainer: trainer, "attached": attach}
VOCABULARY = 2048  # so that the head is a tenth of the weights, as in models that people train
LLAMA = dict(model_type="llama", vocab_size=VOCABULARY, hidden_size=256, intermediate_size=640, num_hidden_layers=6)
LLAMA |= dict(num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=1024, pad_token_id=0)
BERT = dict(model_type="bert", pad_token_id=0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
STATUS = Path("/proc/self/status")


def shaped(**shape: Any) -> Callable[..., PreTrainedModel]:
    def load(auto: Any, **changes: Any) -> PreTrainedModel:
        torch.manual_seed(0)
        return auto.from_config(AutoConfig.for_model(**shape | changes))

    return load


class Timed(NamedTuple):
    """A trainer to be timed: how it and its model are built, `[number]` lengths of its texts, and rows per update."""

    of: Callable[..., Trainer]
    load: Callable[..., PreTrainedModel]
    vocabulary: int
    lengths: np.ndarray
    per_device: int


CASES: dict[str, Timed] = {
    "DPOTrainer, Llama": Timed(  # a prompt and two answers each
        dpo, shaped(**LLAMA), VOCABULARY, long_tailed(48, 256, 3 * 4 * UPDATES), 4
    ),
    "RewardTrainer, Llama": Timed(reward, shaped(**LLAMA), VOCABULARY, long_tailed(96, 512, 2 * 4 * UPDATES), 4),
    "Trainer, BERT-base, sequence classification": Timed(
        sequence, shaped(**BERT), 30_522, long_tailed(64, 128, 16 * UPDATES, sigma=0.6), 16
    ),
}


def build(name: str, directory: str) -> Trainer:
    of, load, vocabulary, lengths, per_device = CASES[name]
    settings = dict(output_dir=directory, max_steps=UPDATES, per_device_train_batch_size=per_device, learning_rate=1e-4)
    return of(load, Words(vocabulary, lengths, per_device * UPDATES), settings)


class Clock(TrainerCallback):
    """Records when updates end."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.ends.append(time.perf_counter())


def run(trainer: Trainer) -> tuple[list[float], float]:
    """Trains, and returns the loss of every update and the seconds of all but the first."""
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], clock.ends[-1] - clock.ends[0]


def padding(trainer: Trainer) -> float:
    """The share of the trainer's own batches that is padding."""
    masks = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def compare(name: str, rounds: int) -> dict[str, Any]:
    """Times a trainer untouched and attached, in turns; every other round begins with the other."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        share, weights = padding(trainer := build(name, directory)), sum(w.numel() for w in trainer.model.parameters())
        for number in range(rounds):
            for way in list(WAYS)[:: -1 if number % 2 else 1]:
                losses[way], elapsed = run(WAYS[way](build(name, directory)))
                seconds[way].append(elapsed)
    difference = largest_relative_difference(losses["attached"], losses["untouched"])
    assert difference < 1e-4, f"the losses differ by {difference}"
    return {
        "trainer": name,
        "per_device": CASES[name].per_device,
        "parameters": weights,
        "padding": share,
        "seconds": seconds,
        "per_update": {way: statistics.median(times) / (UPDATES - 1) for way, times in seconds.items()},
        "faster": asdict(paired_ratio(seconds["untouched"], seconds["attached"])),
        "largest_relative_loss_difference": difference,
    }


def peaks(name: str) -> dict[str, int]:
    """The bytes by which the resident set of a process of its own grows in training, at its peak; empty but on Linux."""
    return {way: _peak(name, way) for way in WAYS} if STATUS.exists() else {}


def _peak(name: str, way: str) -> int:
    command = [sys.executable, "-m", "results.unpad.speed", name, way]
    root = Path(__file__).resolve().parents[2]
    large = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # tensors of a MiB go back to the system when they are freed
    done = subprocess.run(command, cwd=root, env=os.environ | large, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(name: str, way: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        trainer = build(name, directory)
        trainer.args.max_steps = 2
        before = _resident("VmRSS")
        trainer = WAYS[way](trainer)
        Path("/proc/self/clear_refs").write_text("5")  # starts a new peak, behind attach and its own steps
        trainer.train()
        print(json.dumps(_resident("VmHWM") - before))


def _resident(what: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
