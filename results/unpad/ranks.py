"""Two ranks over gloo: transformers' own samplers and `attach`, on the same long-tailed examples, in turns.

Started by `run.py` under torchrun: `python -m torch.distributed.run --nproc_per_node=2 -m results.unpad.ranks OUT ROUNDS`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from packtrain.compare.statistics import paired_ratio
from packtrain.plugin.attach import attach
from packtrain.training.ranks import leave
from results.unpad.cases import COMMON, Words, long_tailed
from results.unpad.speed import LLAMA, VOCABULARY

RANKS, PER_DEVICE, ACCUMULATION, UPDATES = 2, 4, 2, 4
HELD_OUT = 16
WAYS = ("random", "group_by_length", "batch_rebalance", "attached")


def documents(number: int, seed: int, mean: float = 160) -> datasets.Dataset:
    """Random walks over the vocabulary, which a model learns a little of; long-tailed lengths, the same for any seed."""
    generator = np.random.default_rng(seed)
    walks = [
        (generator.integers(VOCABULARY) + np.cumsum(generator.integers(0, 4, length))) % VOCABULARY
        for length in long_tailed(mean, 1024, number)
    ]
    return datasets.Dataset.from_list([{"input_ids": walk.tolist(), "labels": walk.tolist()} for walk in walks])


def build(way: str, data: datasets.Dataset, held_out: datasets.Dataset, words: Words, directory: str) -> Trainer:
    strategy = "random" if way == "attached" else way
    sizes = dict(per_device_train_batch_size=PER_DEVICE, gradient_accumulation_steps=ACCUMULATION)
    arguments = TrainingArguments(directory, num_train_epochs=1, train_sampling_strategy=strategy, **COMMON, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA))
    collator = DataCollatorForSeq2Seq(words.tokenizer)
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=held_out, data_collator=collator)
    return attach(trainer) if way == "attached" else trainer


def main(out: Path, rounds: int) -> None:
    torch.set_num_threads(1)
    data = documents(RANKS * PER_DEVICE * ACCUMULATION * UPDATES, seed=0)
    held_out, words = documents(HELD_OUT, seed=1), Words(VOCABULARY, np.ones(1), 1)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    losses: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as directory:
        build("attached", data, held_out, words, directory).train()  # to warm up
        for number in range(rounds):
            for way in WAYS[number % len(WAYS) :] + WAYS[: number % len(WAYS)]:
                trainer = build(way, data, held_out, words, directory)
                trainer.accelerator.wait_for_everyone()
                began = time.perf_counter()
                trainer.train()
                trainer.accelerator.wait_for_everyone()
                seconds[way].append(time.perf_counter() - began)
                assert trainer.state.global_step == UPDATES
                if number == 0:
                    losses[way] = trainer.evaluate()["eval_loss"]
    lengths = [len(ids) for ids in data["input_ids"]]
    result = {"seconds": seconds, "held_out": losses, "examples": len(data), "tokens": sum(lengths)}
    if trainer.is_world_process_zero():
        out.write_text(json.dumps(result))
    leave(trainer.accelerator)


def compare(rounds: int) -> dict[str, Any]:
    """Runs this program on two ranks and returns its seconds, with ratios to `random` and to the fastest sampler."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "found.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}"]
        command = [sys.executable, *launcher, "-m", "results.unpad.ranks", str(out), str(rounds)]
        subprocess.run(command, cwd=Path(__file__).resolve().parents[2], check=True)
        found = json.loads(out.read_text())
    seconds = found["seconds"]
    return found | {
        "medians": {way: statistics.median(times) for way, times in seconds.items()},
        "faster": {way: asdict(paired_ratio(seconds["random"], times)) for way, times in seconds.items()},
        "ours": {way: asdict(paired_ratio(times, seconds["attached"])) for way, times in seconds.items()},
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
