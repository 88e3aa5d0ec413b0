"""Measures how much faster `packtrain.attach` makes a trainer that somebody already has, with the same losses.

    python results/attach/run.py             # about ten minutes on one core

transformers' Trainer (with its own padding collator) and TRL's SFTTrainer train the same Llama on the same documents in
the same order, before and after attaching, interleaved. Lengths are long-tailed, as in real fine-tuning data. Seconds
are those from the end of one update to the end of the next, with everything a trainer does in between; the first update
of every run is a warm-up. The losses of all updates must agree to 1e-4, or the benchmark stops.

Writes `results/attach/bench.json` and `results/attach/README.md`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import datasets
import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from packtrain.compare.statistics import Ratio, paired_ratio
from packtrain.modeling.tokenizer import train_bpe
from packtrain.plugin.attach import attach

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, as results/ is not installed
from results.attention.run import LLAMA, ROW
from results.page import RESULTS, limits, origin, origin_lines, store

PER_DEVICE, ACCUMULATION, UPDATES = 8, 4, 4
MEAN_LENGTH = 160
COMMON = dict(
    per_device_train_batch_size=PER_DEVICE,
    gradient_accumulation_steps=ACCUMULATION,
    max_steps=UPDATES,
    logging_steps=1,
    learning_rate=1e-3,
    use_cpu=True,
    bf16=False,
    report_to="none",
    save_strategy="no",
    disable_tqdm=True,
)


def documents(mean: float, vocabulary: int) -> datasets.Dataset:
    """Random documents for all updates, the first third of each a prompt; lengths lognormal (sigma 1.15)."""
    generator = np.random.default_rng(1)
    draws = generator.lognormal(0.0, 1.15, PER_DEVICE * ACCUMULATION * UPDATES)
    rows = []
    for length in np.clip(draws / draws.mean() * mean, 8, ROW).astype(int):
        ids = generator.integers(8, vocabulary, length).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    return datasets.Dataset.from_list(rows)


def model(**changes) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA | changes))


def stock(data: datasets.Dataset, tokenizer: PreTrainedTokenizerFast, output_dir: str, **changes) -> Trainer:
    args, collator = TrainingArguments(output_dir=output_dir, **COMMON), DataCollatorForSeq2Seq(tokenizer)
    return Trainer(model(**changes), args, train_dataset=data, data_collator=collator, processing_class=tokenizer)


def sft(data: datasets.Dataset, tokenizer: PreTrainedTokenizerFast, output_dir: str, **changes) -> SFTTrainer:
    args = SFTConfig(output_dir=output_dir, max_length=None, gradient_checkpointing=False, **COMMON)
    return SFTTrainer(model(**changes), args, train_dataset=data, processing_class=tokenizer)


class Clock(TrainerCallback):
    """Records when updates end."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.ends.append(time.perf_counter())


def run(trainer: Trainer) -> tuple[list[float], list[float]]:
    """Train, and return the loss of every update and the seconds of all but the first."""
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], np.diff(clock.ends).tolist()


def compare(build: Callable[[], Trainer], rounds: int) -> dict:
    """Time the trainer before and after attaching, in turns; every other round begins with the other."""
    ways: dict[str, Callable[[], Trainer]] = {"before": build, "attached": lambda: attach(build())}
    seconds: dict[str, list[list[float]]] = {way: [] for way in ways}  # of each round, of each update
    losses: dict[str, list[float]] = {}
    for number in range(rounds):
        for way in list(ways)[:: -1 if number % 2 else 1]:
            losses[way], elapsed = run(ways[way]())
            seconds[way].append(elapsed)
    difference = max(abs(a / b - 1) for a, b in zip(losses["attached"], losses["before"], strict=True))
    assert difference < 1e-4, f"the losses differ by {difference}"
    sums = {way: [sum(elapsed) for elapsed in times] for way, times in seconds.items()}
    return {
        "losses": losses,
        "largest_relative_loss_difference": difference,
        "seconds": seconds,
        "seconds_per_update": {way: statistics.median(times) / (UPDATES - 1) for way, times in sums.items()},
        "faster": asdict(paired_ratio(sums["before"], sums["attached"])),
    }


def markdown(result: dict) -> str:
    lengths = result["lengths"]
    rows = [
        f"| {name} | {found['seconds_per_update']['before']:.2f} | {found['seconds_per_update']['attached']:.2f} "
        f"| **{Ratio(**found['faster']).text()}** | {found['largest_relative_loss_difference']:.0e} |"
        for name, found in result["trainers"].items()
    ]
    lines = [
        "# Attaching to a trainer",
        "",
        "How much faster is a trainer that somebody already has once `packtrain.attach` lays out its batches, and are its",
        "losses the same?",
        "",
        f"Llama of {result['parameters'] / 1e6:.1f}M parameters in float32, {PER_DEVICE} x {ACCUMULATION} documents per",
        f"update, {lengths['mean']:.0f} tokens on average, {lengths['median']:.0f} in the median and at most",
        f"{lengths['longest']}; {result['rounds']} interleaved rounds of {UPDATES - 1} timed updates: medians, and ratios",
        "of whole rounds with their 95% intervals.",
        "",
        "| trainer | seconds per update, before | after | faster | losses differ by |",
        "|---|---|---|---|---|",
        *rows,
        *limits(
            "One model, one distribution of lengths, padding to the longest of a micro-batch as the only baseline, and a "
            "CPU; the more even the lengths, the smaller the gain. TRL's own packing and padding-free modes are compared in "
            "`results/compare_long_tail`."
        ),
        *origin_lines(result, "torch", "transformers", "trl"),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--out", type=Path, default=RESULTS / "attach", help="default results/attach")
    arguments = parser.parse_args()
    data = documents(MEAN_LENGTH, LLAMA["vocab_size"])
    lengths = [len(ids) for ids in data["input_ids"]]
    tokenizer = train_bpe(["some words to train a tokenizer on"] * 10, vocab_size=300)
    with tempfile.TemporaryDirectory() as directory:
        builds = {"transformers.Trainer": stock, "trl.SFTTrainer": sft}
        trainers = {
            name: compare(lambda build=build: build(data, tokenizer, directory), arguments.rounds)
            for name, build in builds.items()
        }
    result = origin("attach") | {
        "rounds": arguments.rounds,
        "parameters": sum(weight.numel() for weight in model().parameters()),
        "lengths": {"mean": np.mean(lengths), "median": np.median(lengths), "longest": max(lengths)},
        "trainers": trainers,
    }
    store(arguments.out, result, page := markdown(result))
    print(page)


if __name__ == "__main__":
    main()
