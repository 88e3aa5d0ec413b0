"""Measures what `packtrain.attach` does to a real model: SmolLM2-135M-Instruct in TRL's SFTTrainer, on GSM8K, with LoRA.

    python results/real_model/prepare.py           # once: the model, see there
    python results/real_model/run.py               # about eight minutes on two cores
    python results/real_model/run.py --rounds 1 --rows 2

The same trainer, rows and order, before and after attaching, interleaved. Seconds are those from the end of one update
to the end of the next; the first update of every run is a warm-up. Losses and gradient norms of all updates must be
equal in the digits that are printed, or the benchmark stops. Finished rounds are kept in `out/`: a run that was stopped
goes on behind them.

Writes `results/real_model/bench.json` and `results/real_model/README.md`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from packtrain.compare.statistics import Ratio, paired_ratio
from packtrain.plugin.attach import attach

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, as results/ is not installed
from results.page import RESULTS, Kept, limits, origin, origin_lines, store
from results.real_model.prepare import MODEL, ROOT, missing

GSM8K = Path(os.environ.get("PACKTRAIN_GSM8K", ROOT.parent / "shared/data/gsm8k/train.jsonl"))
ROWS, UPDATES, LONGEST, THREADS = 8, 3, 512, 2  # rows of an update, tokens of a row
LORA = dict(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
FIGURES = ("loss", "grad_norm")


class Clock(TrainerCallback):
    """Records when updates end."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.ends.append(time.perf_counter())


def conversations(rows: int) -> datasets.Dataset:
    """The first GSM8K rows of `UPDATES` updates, as conversations with a prompt and a completion."""
    read = datasets.load_dataset("json", data_files=str(GSM8K), split="train")
    chosen = read.select(range(rows * UPDATES))
    return chosen.map(
        lambda row: {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        },
        remove_columns=chosen.column_names,
    )


def build(data: datasets.Dataset, rows: int, output_dir: str) -> SFTTrainer:
    args = SFTConfig(
        output_dir=output_dir,
        max_length=LONGEST,
        gradient_checkpointing=False,
        per_device_train_batch_size=rows,
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


def one_round(make: Callable[[], Trainer], number: int) -> dict[str, Any]:
    """Trains before and after attaching; every other round begins with the other. Checks that the figures are equal."""
    ways: dict[str, Callable[[], Trainer]] = {"before": make, "attached": lambda: attach(make())}
    found: dict[str, Any] = {"figures": {}, "seconds": {}}
    for way in list(ways)[:: -1 if number % 2 else 1]:
        found["figures"][way], found["seconds"][way] = run(ways[way]())
        print(f"{way:9s} {statistics.median(found['seconds'][way]):6.2f} s per update", flush=True)
    for name in FIGURES:
        digits = {way: [printed(value) for value in figures[name]] for way, figures in found["figures"].items()}
        assert digits["attached"] == digits["before"], f"{name}: {digits}"
    return found


def summarise(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    sums = {way: [sum(one["seconds"][way]) for one in rounds] for way in ("before", "attached")}
    return {
        "figures": rounds[0]["figures"],
        "seconds": {way: [one["seconds"][way] for one in rounds] for way in sums},
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
        f"{result['rows']} rows of GSM8K per update, completions supervised, LoRA on the attention, float32;",
        f"{result['rounds']} interleaved rounds of {UPDATES - 1} timed updates.",
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
        "Few rows an update, one distribution of lengths; the gain grows with their spread. Weights are those of a "
        "four-bit file, read into float32."
    )
    lines += origin_lines(result, "torch", "transformers", "trl", "peft")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"rows of an update (default {ROWS})")
    parser.add_argument("--out", type=Path, default=RESULTS / "real_model", help="default results/real_model")
    arguments = parser.parse_args()
    if (why := missing()) or not GSM8K.exists():
        sys.exit(f"error: {why or f'no {GSM8K}: set PACKTRAIN_GSM8K to the train.jsonl of GSM8K'}")
    torch.set_num_threads(THREADS)
    datasets.disable_progress_bars()
    kept, data, rounds = Kept("real_model"), conversations(arguments.rows), []
    with tempfile.TemporaryDirectory() as directory:
        for number in range(arguments.rounds):
            make = partial(build, data, arguments.rows, directory)
            rounds.append(kept.measure(f"round {number}", partial(one_round, make, number)))
    result = origin("real_model") | {"rounds": arguments.rounds, "rows": arguments.rows, "found": summarise(rounds)}
    store(arguments.out, result, markdown(result))
    kept.finish()
    print(markdown(result))


if __name__ == "__main__":
    main()
