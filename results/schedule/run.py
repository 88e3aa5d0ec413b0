"""Measures a schedule of lengths, short examples first, against the same examples in random order.

    python results/schedule/run.py                 # about five minutes on one core
    python results/schedule/run.py --seeds 1 --rows 200

The same small Llama learns the same rows (`packtrain:arithmetic`, whose lengths have a long tail) for one epoch from
scratch, with `batching.schedule` and without, at two learning rates: a gentle start is said to help where the rate is high.
Both ways have about as many tokens in every update. Held-out losses are taken after a third, two thirds and all of the
epoch's tokens, and compared pair by pair: ways share the seed of weights and shuffle, and take turns at going first. FLOPs
are computed from the lengths that each update had, attention counted per document; over a whole epoch they must be equal, or
the study stops. Time is CPU seconds of the process, reported as ratios of the turns alone, as other programs may share the
machine. What the schedule does to padded layouts is read off the plans, without training.

Finished runs are kept in `out/`: a study that was stopped goes on behind them. Writes `results/schedule/bench.json` and
`results/schedule/README.md`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import AutoConfig, TrainerCallback

from packtrain.compare.flops import training_flops
from packtrain.compare.statistics import Ratio, paired_ratio
from packtrain.data.synthetic import ArithmeticReader
from packtrain.modeling.cost import cost_of
from packtrain.objectives.task import load_task, plan_recipe
from packtrain.packing.plan import Plan
from packtrain.packing.report import describe, describe_phases
from packtrain.recipe.recipe import Recipe
from packtrain.training.run import build, fit

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, as results/ is not installed
from results.page import RESULTS, Kept, limits, origin, origin_lines, percent, store

FOLDER = RESULTS.parent / "out" / "schedule"
ROWS, HELD_OUT, EXAMPLES = 600, 100, 16  # rows of an epoch and to evaluate on; examples of an update without a schedule
VOCABULARY = 1024
LLAMA = {
    "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip
RATES = (3e-3, 1e-2)
SCHEDULE = [{"until": 0.1, "max_length": 64}, {"until": 0.4, "max_length": 256}]
WAYS: dict[str, list[dict[str, float]] | None] = {"without": None, "with": SCHEDULE}
PARTS = (1 / 3, 2 / 3, 1.0)  # of the epoch's tokens, after which the held-out loss is taken


class EvaluateAfter(TrainerCallback):
    """Asks for an evaluation after some updates."""

    def __init__(self, steps: Sequence[int]):
        self.steps = set(steps)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_evaluate = state.global_step in self.steps


def write_rows(folder: Path, rows: int) -> None:
    """Writes the rows to train and to evaluate on, the same for all seeds."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, split, count in (("train", "train", rows), ("held_out", "test", HELD_OUT)):
        reader = ArithmeticReader(count, seed=0, split=split)
        lines = [json.dumps(row) for row in reader.read(0, count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def recipe_of(folder: Path, way: str, *, rate: float, seed: int, strategy: str = "balanced") -> Recipe:
    return Recipe.model_validate({
        "model": {"config": LLAMA, "tokenizer_vocab_size": VOCABULARY},
        "data": {"path": str(folder / "train.jsonl"), "eval_path": str(folder / "held_out.jsonl"), "max_length": 4096},
        "batching": {"strategy": strategy, "examples_per_step": EXAMPLES, "max_tokens": 8192, "schedule": WAYS[way]},
        "objective": {"name": "causal_lm"},
        "training": {
            "output_dir": str(folder / "run"), "learning_rate": rate, "lr_scheduler_type": "cosine", "warmup_steps": 0.05,
            "num_train_epochs": 1, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True,
            "seed": seed, "eval_on_start": False,
        },
    })  # fmt: skip


def ends_of(tokens: np.ndarray) -> list[int]:
    """Returns after how many updates each of `PARTS` of the tokens is nearest, given the tokens of every update, `[steps]`.

    >>> ends_of(np.array([10, 10, 10, 10, 10, 10]))
    [2, 4, 6]
    """
    done = np.cumsum(tokens)
    return [int(np.abs(done - part * done[-1]).argmin()) + 1 for part in PARTS]


def run(folder: Path, way: str, rate: float, seed: int) -> dict[str, Any]:
    """Trains one way; returns held-out losses, tokens and FLOPs after each part, and CPU seconds of all updates."""
    recipe = recipe_of(folder, way, rate=rate, seed=seed)
    trainer = build(recipe)
    plan: Plan = trainer.plan
    updates = [plan.examples(step) for step in range(plan.total_steps)]
    assert sorted(np.concatenate(updates).tolist()) == list(range(len(plan.lengths))), "every example is seen once"
    ends = ends_of(np.array([plan.lengths[ids].sum() for ids in updates]))
    flops, supervised = training_flops(trainer.model.config, frozen=False), trainer.train_dataset.supervised
    trainer.add_callback(EvaluateAfter(ends))
    began = time.process_time()
    fit(trainer)
    seconds = time.process_time() - began
    history = trainer.state.log_history
    losses = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    seen = [np.concatenate(updates[:end]) for end in ends]
    return {
        "held_out": [losses[end] for end in ends], "updates": len(updates), "ends": ends, "cpu_seconds": seconds,
        "tokens": [int(plan.lengths[ids].sum()) for ids in seen],
        "flops": [flops(plan.lengths[ids], int(supervised[ids].sum())) for ids in seen],
        "largest_gradient": max(entry["grad_norm"] for entry in history if "grad_norm" in entry),
    }  # fmt: skip


def look_at_plans(folder: Path, seeds: int) -> dict[str, Any]:
    """Reads off the plans what no training is needed for: phases, padding, and the share of attention in the FLOPs."""
    task = load_task(recipe_of(folder, "without", rate=RATES[0], seed=0))
    lengths, supervised = task.train.lengths.astype(np.int64), int(task.train.supervised.sum())
    config = AutoConfig.for_model(**LLAMA)
    attention = 3 * cost_of(config).quadratic * float((lengths.astype(float) ** 2).sum())

    def padding(strategy: str) -> dict[str, list[float]]:
        """Computed tokens of an epoch over real ones, by way, of each seed."""
        return {
            way: [
                1 / (1 - describe(plan_recipe(recipe_of(folder, way, rate=RATES[0], seed=seed, strategy=strategy), lengths))
                     .padding_share)
                for seed in range(seeds)
            ]
            for way in WAYS
        }  # fmt: skip

    plan = plan_recipe(recipe_of(folder, "with", rate=RATES[0], seed=0), lengths)
    return {
        "tokens": int(lengths.sum()), "longest": int(lengths.max()), "median": float(np.median(lengths)),
        "attention_share": attention / training_flops(config, frozen=False)(lengths, supervised),
        "phases": [asdict(phase) for phase in describe_phases(plan)],
        "padding": {strategy: padding(strategy) for strategy in ("pad_longest", "group_by_length")},
    }  # fmt: skip


def study(folder: Path, kept: Kept, seeds: int, rows: int, minutes: float) -> dict[str, Any]:
    """Runs all that is missing, one learning rate after the other, until the time is over; ways take turns at going first.

    Returns the runs of the learning rates that are finished.
    """
    write_rows(folder, rows)
    end = time.monotonic() + 60 * minutes
    plans = kept.measure("plans", partial(look_at_plans, folder, seeds))
    runs: dict[str, dict[str, list[Any]]] = {}
    for rate in RATES:
        ways: dict[str, list[Any]] = {way: [] for way in WAYS}
        for seed in range(seeds):
            for way in list(WAYS)[:: -1 if seed % 2 else 1]:
                name = f"{way}, {rate:g}, {seed}"
                if time.monotonic() > end and name not in kept.found:
                    return {"runs": runs, "plans": plans}
                ways[way].append(kept.measure(name, partial(run, folder, way, rate, seed)))
                print(f"{name}: {ways[way][-1]['held_out']}", file=sys.stderr, flush=True)
        runs[f"{rate:g}"] = ways
    return {"runs": runs, "plans": plans}


# ------------------------------------------------------------------------------------------------- what came of it


def compare_ways(runs: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> dict[str, Any]:
    """Compares the runs with a schedule to those without, pair by pair.

    Args:
        runs: learning rate -> way -> one run of each seed.
    """
    found: dict[str, Any] = {}
    for rate, ways in runs.items():
        figures: dict[str, Any] = {}
        for name in ("held_out", "tokens", "flops"):
            pairs = [
                [[one[name][part] for one in ways[way]] for way in ("with", "without")] for part in range(len(PARTS))
            ]
            figures[name] = [asdict(paired_ratio(*pair)) for pair in pairs]
            figures[f"{name}_means"] = [[float(np.mean(side)) for side in pair] for pair in pairs]
        seconds, gradients = ([[one[name] for one in ways[way]] for way in ("with", "without")]
                              for name in ("cpu_seconds", "largest_gradient"))  # fmt: skip
        figures |= {"cpu_seconds": asdict(paired_ratio(*seconds)), "gradients": asdict(paired_ratio(*gradients))}
        figures["seeds"], figures["updates"] = (
            len(ways["with"]),
            [ways[way][0]["updates"] for way in ("with", "without")],
        )
        equal = max(abs(ratio - 1) for ratio in (figures["flops"][-1]["estimate"], figures["tokens"][-1]["estimate"]))
        assert equal < 1e-9, f"an epoch has other tokens or FLOPs with a schedule: {equal:.1e}"
        found[rate] = figures
    return found


def markdown(result: Mapping[str, Any]) -> str:
    """Writes the page."""
    plans, found = result["plans"], result["found"]
    seeds = next(iter(found.values()))["seeds"]
    lines = [
        "# Short examples first",
        "",
        "Does a small model learn more from the same examples when the short ones come first, at as many tokens an update?",
        "",
        f"A Llama of two layers (hidden 64) from scratch, one epoch of {plans['tokens']:,} tokens of `packtrain:arithmetic`",
        f"(lengths: median {plans['median']:.0f}, longest {plans['longest']:,}). Attention is "
        f"{plans['attention_share']:.1%} of the FLOPs of this model on these lengths.",
        "",
        "| phase until | longest example | examples | an update | tokens an update (min, mean, max) | updates |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for phase in plans["phases"]:
        low, mean, high = phase["tokens_per_update"]
        lines.append(
            f"| {phase['until']:.1%} | {phase['longest']:,} | {phase['examples']:,} | {phase['examples_per_update']} "
            f"| {low:,}, {mean:,.0f}, {high:,} | {phase['updates']} |"
        )
    lines += [
        "",
        f"Held-out loss, means of {seeds} seeds, and the difference paired by seed with its 95% interval, bold where that",
        "excludes 0; positive is worse with the schedule. FLOPs are computed, from the lengths up to that point:",
        "",
        "| learning rate | after | without | with | difference | tokens | FLOPs |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for rate, row in found.items():
        for part, share in enumerate(PARTS):
            ours, theirs = row["held_out_means"][part]
            ratios = [Ratio(**row[name][part]).estimate for name in ("tokens", "flops")]
            cells = f"{share:.0%} | {theirs:.4f} | {ours:.4f} | {percent(Ratio(**row['held_out'][part]))}"
            lines.append(f"| {rate} | {cells} | {ratios[0]:.3f}x | {ratios[1]:.3f}x |")
    lines += ["", "Over the epoch tokens and FLOPs are those without a schedule, as no example is cut or left out.", ""]
    for rate, row in found.items():
        seconds, gradients = Ratio(**row["cpu_seconds"]).text(), Ratio(**row["gradients"]).text()
        lines.append(
            f"- At {rate}: {row['updates'][0]} updates instead of {row['updates'][1]}, {seconds} the CPU seconds, and the "
            f"largest gradient norm {gradients}."
        )
    for strategy, ways in plans["padding"].items():
        before, after = (float(np.mean(ways[way])) for way in ("without", "with"))
        ratio = paired_ratio(ways["with"], ways["without"]).text()
        lines.append(
            f"- Under `{strategy}` an epoch computes {after:.2f} tokens for every real one instead of {before:.2f}: {ratio}."
        )
    lines += limits(
        "One kind of rows, one schedule, one small model and one epoch from scratch; no model that is fine-tuned. Papers on "
        "length warm-up truncate, and so save attention; nothing is truncated here, so that over an epoch there is nothing "
        "to save in flat layouts. The machine was shared: hence ratios of CPU seconds, and no seconds."
    )
    return "\n".join([*lines, *origin_lines(result, "torch", "transformers")])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="default 5")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"of the epoch (default {ROWS})")
    parser.add_argument("--minutes", type=float, default=60, help="after which no run begins any more (default 60)")
    parser.add_argument("--out", type=Path, default=RESULTS / "schedule", help="default results/schedule")
    args = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    kept = Kept("schedule")
    found = study(FOLDER, kept, args.seeds, args.rows, args.minutes)
    if not found["runs"]:
        sys.exit("error: no learning rate is finished\n    fix: the same command goes on where it stopped")
    result = origin("schedule") | {"plans": found["plans"], "found": compare_ways(found["runs"]), "runs": found["runs"]}
    store(args.out, result, markdown(result), depth=3)
    if len(found["runs"]) == len(RATES):  # else the same command goes on
        kept.finish()
        shutil.rmtree(FOLDER, ignore_errors=True)
    print(markdown(result))


if __name__ == "__main__":
    main()
