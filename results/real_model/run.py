"""Measures what `packtrain.attach` does to a real model: SmolLM2-135M-Instruct in TRL's SFTTrainer, on GSM8K, with LoRA.

    python results/real_model/prepare.py           # once: the model, see there
    python results/real_model/run.py               # about ten minutes on one core

The same trainer, rows and order, before and after attaching, interleaved. Seconds are those from the end of one update
to the end of the next; the first update of every run is a warm-up. Losses and gradient norms of all updates must be
equal in the digits that are printed, or the benchmark stops.

Writes `results/real_model/bench.json` and `results/real_model/README.md`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import datasets
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from packtrain.compare.statistics import Ratio, paired_ratio
from packtrain.plugin.attach import attach

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, as results/ is not installed
from results.page import RESULTS, limits, origin, origin_lines, store
from results.real_model.prepare import MODEL, ROOT, missing

GSM8K = Path(os.environ.get("PACKTRAIN_GSM8K", ROOT.parent / "shared/data/gsm8k/train.jsonl"))
PER_DEVICE, ACCUMULATION, UPDATES = 8, 1, 4
LORA = dict(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
FIGURES = ("loss", "grad_norm")


class Clock(TrainerCallback):
    """Records when updates end."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.ends.append(time.perf_counter())


def rows() -> datasets.Dataset:
    """The first GSM8K rows, as conversations with a prompt and a completion."""
    read = datasets.load_dataset("json", data_files=str(GSM8K), split="train")
    chosen = read.select(range(PER_DEVICE * ACCUMULATION * UPDATES))
    return chosen.map(
        lambda row: {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        },
        remove_columns=chosen.column_names,
    )


def build(data: datasets.Dataset, output_dir: str) -> SFTTrainer:
    args = SFTConfig(
        output_dir=output_dir,
        max_length=None,
        gradient_checkpointing=False,
        per_device_train_batch_size=PER_DEVICE,
        gradient_accumulation_steps=ACCUMULATION,
        max_steps=UPDATES,
        logging_steps=1,
        learning_rate=2e-4,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer, peft_config=LoraConfig(**LORA))


def run(trainer: Trainer) -> tuple[dict[str, list[float]], list[float]]:
    """Trains; returns loss and gradient norm of every update, and the seconds of all but the first."""
    clock = Clock()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(clock)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    figures = {name: [float(entry[name]) for entry in logs] for name in FIGURES}
    return figures, [end - start for start, end in pairwise(clock.ends)]


def printed(value: float) -> str:
    """A loss or a norm as Trainer prints it: four significant digits."""
    return f"{value:.4g}"


def compare(make: Callable[[], Trainer], rounds: int) -> dict:
    """Times the trainer before and after attaching, in turns; every other round begins with the other."""
    ways: dict[str, Callable[[], Trainer]] = {"before": make, "attached": lambda: attach(make())}
    seconds: dict[str, list[list[float]]] = {way: [] for way in ways}
    figures: dict[str, dict[str, list[float]]] = {}
    for number in range(rounds):
        for way in list(ways)[:: -1 if number % 2 else 1]:
            figures[way], elapsed = run(ways[way]())
            seconds[way].append(elapsed)
            print(f"{way:9s} {statistics.median(elapsed):6.2f} s per update", flush=True)
    for name in FIGURES:
        digits = {way: [printed(value) for value in found[name]] for way, found in figures.items()}
        assert digits["attached"] == digits["before"], f"{name}: {digits}"
    sums = {way: [sum(elapsed) for elapsed in times] for way, times in seconds.items()}
    return {
        "figures": figures,
        "seconds": seconds,
        "seconds_per_update": {way: statistics.median(times) / (UPDATES - 1) for way, times in sums.items()},
        "faster": asdict(paired_ratio(sums["before"], sums["attached"])),
    }


def markdown(result: dict) -> str:
    found = result["found"]
    lines = [
        "# A real model",
        "",
        "Does SmolLM2-135M-Instruct keep its losses and gradient norms in TRL's SFTTrainer when `packtrain.attach` lays",
        "out its batches, and how much faster is it?",
        "",
        f"GSM8K rows, completions supervised, {PER_DEVICE} x {ACCUMULATION} per update, LoRA on the attention, float32,",
        f"one core; {result['rounds']} interleaved rounds of {UPDATES - 1} timed updates.",
        "",
        "| | before | attached |",
        "|---|---:|---:|",
        "| seconds per update | "
        + " | ".join(f"{seconds:.2f}" for seconds in found["seconds_per_update"].values())
        + " |",
    ]
    for name in FIGURES:
        cells = [", ".join(printed(value) for value in found["figures"][way][name]) for way in ("before", "attached")]
        lines.append(f"| {name.replace('_', ' ')} of {UPDATES} updates | {' | '.join(cells)} |")
    lines += ["", f"Attached it is **{Ratio(**found['faster']).text()}** as fast."]
    lines += limits(
        "Eight rows an update, one distribution of lengths; the gain grows with their spread. Weights are those of a "
        "four-bit file, read into float32."
    )
    lines += origin_lines(result, "torch", "transformers", "trl", "peft")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    parser.add_argument("--out", type=Path, default=RESULTS / "real_model", help="default results/real_model")
    arguments = parser.parse_args()
    if (why := missing()) or not GSM8K.exists():
        sys.exit(f"error: {why or f'no {GSM8K}: set PACKTRAIN_GSM8K to the train.jsonl of GSM8K'}")
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    data = rows()
    with tempfile.TemporaryDirectory() as directory:
        found = compare(lambda: build(data, directory), arguments.rounds)
    result = origin("real_model") | {"threads": 1, "rounds": arguments.rounds, "found": found}
    store(arguments.out, result, markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
