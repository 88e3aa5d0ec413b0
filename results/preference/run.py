"""Measures DPO on pairs: TRL padded, TRL attached, a recipe, and a recipe whose prompts are computed once.

    python results/preference/run.py         # at most half an hour on one core

The same Llama learns from the same pairs in the same order, in four ways that take turns. Lengths are drawn around the
medians of three data sets, as "Accelerating Direct Preference Optimization with Prefix Sharing" (arXiv:2410.20305, table 1)
gives them: tokens of the prompt and both answers, and tokens of a prompt to those of an answer. All log-probabilities of
the reference are computed before the clock starts, also TRL's. Seconds are those from the end of one update to the end of
the next; the first update of every run is a warm-up. The losses of all updates must agree to 1e-4, or the study stops.

Writes `results/preference/bench.json` and `results/preference/README.md` after every round, so that what is finished is
kept when time runs out.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from packtrain.compare.statistics import Ratio, paired_ratio
from packtrain.plugin.attach import attach
from packtrain.recipe.recipe import Recipe
from packtrain.training.run import build

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, as results/ is not installed
from results.attention.run import LLAMA, ROW
from results.page import RESULTS, limits, origin, origin_lines, store

PER_DEVICE, ACCUMULATION, UPDATES = 2, 2, 3  # pairs of a micro-batch of TRL, micro-batches, updates of a run
RATE = 1e-5
WORDS = [f"{first}{second}" for first in "ba be bi bo bu da de di do du".split() for second in "ka le mi no su".split()]
WAYS = ("TRL, padded", "TRL, attached", "recipe", "recipe, shared prefix")
MINUTES = 25.0


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The lengths of a data set.

    Attributes:
        overall: median tokens of a prompt with both answers.
        ratio: median of the tokens of a prompt to those of an answer.
        published: how much faster sharing prefixes was there, without and with packing.
    """

    overall: int
    ratio: float
    published: tuple[float, float]

    @property
    def answer(self) -> float:
        return self.overall / (self.ratio + 2)

    @property
    def prompt(self) -> float:
        return self.answer * self.ratio


PROFILES = {
    "Capybara": Profile(overall=1160, ratio=1.59, published=(1.42, 1.34)),
    "HelpSteer": Profile(overall=775, ratio=6.34, published=(1.47, 1.48)),
    "UltraFeedback": Profile(overall=409, ratio=0.42, published=(1.11, 1.17)),
}


def pairs_of(profile: Profile, count: int, *, seed: int = 0, scale: float = 1.0) -> list[dict[str, str]]:
    """Draws pairs of words of one token each, lengths lognormal (sigma 0.6) around the medians of the profile."""
    draw = np.random.default_rng(seed)

    def text(median: float) -> str:
        length = int(np.clip(median * scale * draw.lognormal(0.0, 0.6), 2, ROW // 2 - 8))
        return " ".join(draw.choice(WORDS, length))

    def pair() -> dict[str, str]:
        return {name: text(profile.answer) for name in ("chosen", "rejected")}

    return [{"prompt": text(profile.prompt) + "\n"} | pair() for _ in range(count)]


class Clock(TrainerCallback):
    """Records when updates end."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.ends.append(time.perf_counter())


class InOrder(DPOTrainer):
    """TRL's trainer, reading its rows in their order."""

    def _get_train_sampler(self, dataset=None):
        return SequentialSampler(self.train_dataset)


def recipe_of(rows: Path, directory: Path, *, shared: bool, **config: Any) -> Recipe:
    return Recipe.model_validate({
        "model": {"config": LLAMA | {"vocab_size": 400} | config, "tokenizer_vocab_size": 400},
        "data": {"path": str(rows), "max_length": 4 * ROW},
        "batching": {"examples_per_step": PER_DEVICE * ACCUMULATION, "max_tokens": 4 * ROW},
        "objective": {"name": "preference", "shared_prefix": shared},
        "training": {
            "output_dir": str(directory), "learning_rate": RATE, "max_steps": UPDATES, "logging_steps": 1,
            "save_strategy": "no", "report_to": "none", "use_cpu": True, "seed": 42,
        },
    })  # fmt: skip


def trl_of(ours: Trainer, rows: Path, directory: Path) -> DPOTrainer:
    """TRL's trainer with the weights, the tokenizer and the pairs of ours, in the order of its plan."""
    plan: Any = getattr(ours, "plan", None)
    order = np.concatenate([plan.examples(step) for step in range(UPDATES)])
    table = [json.loads(line) for line in rows.read_text().splitlines()]

    def model() -> Any:
        made = AutoModelForCausalLM.from_config(ours.model.config, attn_implementation="sdpa")
        made.load_state_dict(ours.model.state_dict())
        return made

    args = DPOConfig(
        output_dir=str(directory),
        per_device_train_batch_size=PER_DEVICE,
        gradient_accumulation_steps=ACCUMULATION,
        max_steps=UPDATES,
        learning_rate=RATE,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        max_length=None,
        precompute_ref_log_probs=True,
    )
    data = datasets.Dataset.from_list([table[i] for i in order])
    return InOrder(
        model=model(), ref_model=model(), args=args, train_dataset=data, processing_class=ours.processing_class
    )


def builders(rows: Path, directory: Path, **config: Any) -> dict[str, Callable[[], Trainer]]:
    """Returns what makes the trainer of each way."""

    def recipe(shared: bool) -> Trainer:
        return build(recipe_of(rows, directory, shared=shared, **config))

    def trl() -> Trainer:
        return trl_of(recipe(False), rows, directory)

    makers = (trl, lambda: attach(trl()), lambda: recipe(False), lambda: recipe(True))
    return dict(zip(WAYS, makers, strict=True))


def run(trainer: Trainer) -> dict[str, Any]:
    """Trains; returns the loss of every update, the seconds of all but the first, and the peak of memory meanwhile."""
    clock = Clock()
    trainer.add_callback(clock)
    gc.collect()
    before = resident("VmRSS") if reset_resident_peak() else None
    trainer.train()
    peak = None if before is None else resident("VmHWM") - before
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "seconds": np.diff(clock.ends).tolist(), "peak_bytes": peak}


def reset_resident_peak() -> bool:
    """Returns freed memory to the system and starts a new peak of the resident set; False where there is no way to."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def resident(name: str) -> int:
    """Reads a line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def measure_round(makers: dict[str, Callable[[], Trainer]], number: int) -> dict[str, dict[str, Any]]:
    """Runs all ways, every other round from the last to the first; their losses must agree."""
    found = {way: run(makers[way]()) for way in list(makers)[:: -1 if number % 2 else 1]}
    reference = found[WAYS[0]]["losses"]
    for way in WAYS:
        off = max(abs(a / b - 1) for a, b in zip(found[way]["losses"], reference, strict=True))
        assert off < 1e-4, f"the losses of {way} differ by {off}"
    return {way: found[way] for way in WAYS}


def summarise(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Returns medians over rounds, and ratios of whole rounds."""
    sums = {way: [sum(one[way]["seconds"]) for one in rounds] for way in WAYS}
    peaks = {way: [one[way]["peak_bytes"] for one in rounds if one[way]["peak_bytes"] is not None] for way in WAYS}
    reference = [one[WAYS[0]]["losses"] for one in rounds]
    return {
        "rounds": rounds,
        "seconds_per_update": {way: statistics.median(times) / (UPDATES - 1) for way, times in sums.items()},
        "peak_bytes": {way: statistics.median(found) if found else None for way, found in peaks.items()},
        "faster_than_trl": {way: asdict(paired_ratio(sums[WAYS[0]], sums[way])) for way in WAYS[1:]},
        "faster_by_the_prefix": asdict(paired_ratio(sums["recipe"], sums["recipe, shared prefix"])),
        "largest_relative_loss_difference": {
            way: max(
                abs(a / b - 1)
                for one, losses in zip(rounds, reference, strict=True)
                for a, b in zip(one[way]["losses"], losses, strict=True)
            )
            for way in WAYS[1:]
        },
    }


def tokens_of(trainer: Trainer) -> dict[str, float]:
    """Returns means over pairs of the tokens of prompt, chosen and rejected, and what sharing the prompt leaves of all."""
    examples: Any = trainer.train_dataset
    means = {name: float(getattr(examples, name).mean()) for name in ("prompt", "chosen", "rejected")}
    written_out = float(examples.examples.lengths.mean())
    return means | {"fewer_tokens": written_out / (written_out - means["prompt"])}


def markdown(result: dict[str, Any]) -> str:
    rows, prefix = [], []
    for name, found in result["profiles"].items():
        for way in WAYS:
            faster = found["faster_than_trl"].get(way)
            peak = found["peak_bytes"][way]
            rows.append(
                f"| {name} | {way} | {found['seconds_per_update'][way]:.2f} | "
                f"{Ratio(**faster).text() if faster else '1'} | {f'{peak / 2**20:,.0f}' if peak is not None else '-'} |"
            )
        tokens, (alone, packed) = found["tokens"], found["published"]
        by_prefix = Ratio(**found["faster_by_the_prefix"]).text()
        prefix.append(
            f"| {name} | {tokens['prompt']:,.0f} | {tokens['chosen']:,.0f} | {tokens['rejected']:,.0f} | "
            f"{tokens['fewer_tokens']:.2f}x | **{by_prefix}** | {alone:.2f}x, {packed:.2f}x |"
        )
    differences = [
        difference
        for found in result["profiles"].values()
        for difference in found["largest_relative_loss_difference"].values()
    ]
    counts = sorted({len(found["rounds"]) for found in result["profiles"].values()})
    lines = [
        "# Preference pairs",
        "",
        "How fast is DPO on pairs whose prompts are long or short: TRL padded, TRL attached, and recipes without and with a",
        "prompt that is computed once? The same losses come out of all four.",
        "",
        f"Llama of {result['parameters'] / 1e6:.1f}M parameters in float32, {PER_DEVICE * ACCUMULATION} pairs per update,",
        f"{UPDATES - 1} timed updates in each of {' to '.join(map(str, counts))} interleaved rounds: medians, and ratios of",
        "whole rounds with their 95% intervals. Reference log-probabilities are computed beforehand everywhere. Losses of",
        f"all updates differ by at most {max(differences):.0e}. Memory is the peak of the resident set while a run trains,",
        "above what it was before.",
        "",
        "| lengths like those of | way | seconds per update | faster than TRL padded | MiB |",
        "|---|---|---:|---:|---:|",
        *rows,
        "",
        "What the shared prefix adds to the recipe, next to the fewer tokens and to what arXiv:2410.20305 reports for these",
        "data sets with a 7B model on GPUs (without packing, with packing):",
        "",
        "| lengths like those of | prompt | chosen | rejected | fewer tokens | faster by the prefix | reported there |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *prefix,
        *limits(
            "Lengths are drawn around published medians, with a spread of our own; the words are drawn, so what is learnt "
            "says nothing. One small model on a CPU, where attention runs document by document; on a GPU a varlen kernel "
            "reads the prompt's keys once per answer, and the ratio is another one. TRL's default computes the reference "
            "anew in every update, which is slower than what is shown here."
        ),
        *origin_lines(result, "torch", "transformers", "trl"),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"no round begins later (default {MINUTES:g})")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds, at most (default 5)")
    parser.add_argument("--scale", type=float, default=1.0, help="of all lengths (default 1)")
    parser.add_argument("--out", type=Path, default=RESULTS / "preference", help="default results/preference")
    arguments = parser.parse_args()
    began, longest = time.perf_counter(), 0.0
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        os.environ["PACKTRAIN_CACHE"] = str(directory / "cache")
        makers, tokens, parameters = {}, {}, 0
        for profile_name, profile in PROFILES.items():
            rows = directory / f"{profile_name}.jsonl"
            pairs = pairs_of(profile, PER_DEVICE * ACCUMULATION * UPDATES, scale=arguments.scale)
            rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
            makers[profile_name] = builders(rows, directory / "run")
            trainer = makers[profile_name]["recipe"]()
            tokens[profile_name] = tokens_of(trainer)
            parameters = sum(weight.numel() for weight in trainer.model.parameters())
        rounds: dict[str, list[dict[str, Any]]] = {profile_name: [] for profile_name in PROFILES}
        for number in range(arguments.rounds):
            for profile_name in PROFILES:
                started = time.perf_counter()
                if number and started - began + longest > arguments.minutes * 60:
                    break
                rounds[profile_name].append(measure_round(makers[profile_name], number))
                longest = max(longest, time.perf_counter() - started)
                profiles = {
                    each: summarise(found)
                    | {"tokens": tokens[each], "published": PROFILES[each].published, "lengths": asdict(PROFILES[each])}
                    for each, found in rounds.items()
                    if found
                }
                result = origin("preference") | {"parameters": parameters, "profiles": profiles}
                store(arguments.out, result, page := markdown(result), depth=4)
                print(page, flush=True)


if __name__ == "__main__":
    main()
