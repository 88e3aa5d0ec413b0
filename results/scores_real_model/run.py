"""Measures what pruning by scores does to a real model: SmolLM2-135M-Instruct, one epoch of what is left of GSM8K rows.

    python results/real_model/prepare.py           # once: the model, see there
    python results/scores_real_model/run.py        # about 50 minutes on two cores, in sittings of 35
    python results/scores_real_model/run.py --seeds 2 --pool 12

Each seed has rows of its own: the pool. The model scores them as it comes, in packed forward passes, and is then trained
with LoRA for one epoch on all of them, and on those that `data.keep` keeps when 50, 30 and 10% are pruned: the highest EL2N,
which Data Diet finds best (Paul, Ganguli and Dziugaite 2021, https://arxiv.org/abs/2107.07075), the middle perplexities,
which Marion et al. find best (2023, https://arxiv.org/abs/2309.04564), or a random choice. Held-out losses are compared
pair by pair with the run on the random choice of the same size, and with the run on all rows. Unlike in `results/scores`, a
run on fewer rows makes fewer updates: that is what pruning saves.

Runs are spread over a few processes with one thread each, and their results are kept in `out/`: a study that was stopped, or
whose minutes are over, goes on behind them. Sizes that have not been finished for all seeds are not on the page.

Writes `results/scores_real_model/bench.json`, `README.md` and, where matplotlib is installed, `choices.png`.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from rich.console import Console
from scipy.stats import spearmanr

from packtrain.compare.statistics import Ratio, paired_ratio
from packtrain.objectives.masked_diffusion.pictures import pyplot
from packtrain.objectives.task import load_task
from packtrain.recipe.recipe import Recipe
from packtrain.recipe.sections import SCORES
from packtrain.training.run import build, fit
from packtrain.training.scoring import score

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, as results/ is not installed
from results.page import RESULTS, Kept, limits, origin, origin_lines, percent, store
from results.real_model.prepare import MODEL, ROOT, missing
from results.scores.run import FULL, PRUNED, RANDOM, in_words, name_of, without_rows

GSM8K = Path(os.environ.get("PACKTRAIN_GSM8K", ROOT.parent / "shared/data/gsm8k/train.jsonl"))
HELD_OUT, POOL, SEEDS, EXAMPLES, RATE = 24, 40, 5, 4, 1e-3  # rows; rows; seeds; examples of an update; learning rate
LAYERS = list(range(20, 30))
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "layers_to_transform": LAYERS}  # fmt: skip
SCORED = "scores"
AMOUNTS, PAIRS = ("rows", "tokens", "updates"), (("perplexity", "length"), ("el2n", "length"), ("perplexity", "el2n"))
CHOICES = (("el2n", "high"), ("perplexity", "middle"), (RANDOM, None))
Figures = Mapping[str, Mapping[str, Any]]
Run = tuple[str, int, dict[str, Any] | None]  # name, seed, `data.keep`


def write_rows(folder: Path, seed: int, pool: int) -> None:
    """Writes the rows to evaluate on, and the pool of a seed."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = GSM8K.read_text(encoding="utf-8").splitlines()
    first = HELD_OUT + seed * pool
    parts = {"held_out": lines[:HELD_OUT], "pool": lines[first : first + pool]}
    for name, rows in parts.items():
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def recipe_of(folder: Path, seed: int, keep: Mapping[str, Any] | None, model: str = "", lora: Any = None) -> Recipe:
    """The recipe of a run over the rows in its folder: chats whose answers are supervised, LoRA, float32, one epoch."""
    return Recipe.model_validate({
        "model": {"model_name_or_path": model or str(MODEL)},
        "data": {"path": str(folder / "pool.jsonl"), "eval_path": str(folder / "held_out.jsonl"), "keep": keep,
                 "max_length": 1024, "completion_only_loss": True},
        "batching": {"examples_per_step": EXAMPLES, "max_tokens": 2048},
        "objective": {"name": "causal_lm"},
        "lora": lora or LORA,
        "training": {
            "output_dir": str(folder / "run"), "learning_rate": RATE, "lr_scheduler_type": "linear", "warmup_steps": 0.1,
            "num_train_epochs": 1, "logging_steps": 1, "save_strategy": "no", "eval_strategy": "no", "eval_on_start": False,
            "report_to": "none", "use_cpu": True, "seed": seed,
        },
    })  # fmt: skip


def score_pool(folder: Path, seed: int) -> dict[str, Any]:
    """Scores the pool of a seed by the model as it comes; returns its held-out loss, too."""
    recipe = recipe_of(folder, seed, None).model_copy(update={"lora": None})
    began = time.process_time()
    scored = score(recipe, out=folder / "scores.parquet")
    seconds = time.process_time() - began
    return {
        "held_out": build(recipe, console=Console(quiet=True)).evaluate()["eval_loss"], "seconds": seconds,
        "lengths": scored.lengths.tolist(), "scores": {name: scored.scores[name].tolist() for name in SCORES},
    }  # fmt: skip


def train_on(folder: Path, seed: int, keep: Mapping[str, Any] | None) -> dict[str, Any]:
    """Trains one epoch on the rows that are kept; returns the held-out loss and what was trained on."""
    recipe = recipe_of(folder, seed, keep)
    lengths = load_task(recipe).train.lengths
    trainer = build(recipe, console=Console(quiet=True))
    fit(trainer)
    return {
        "held_out": trainer.evaluate()["eval_loss"], "rows": len(lengths), "tokens": int(lengths.sum()),
        "updates": trainer.state.global_step,
    }  # fmt: skip


def one_run(name: str, seed: int, pool: int, keep: Mapping[str, Any] | None, root: Path) -> dict[str, Any]:
    """Does one run in its own process."""
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    folder = root / f"seed-{seed}"
    if name == SCORED:
        write_rows(folder, seed, pool)
        return score_pool(folder, seed)
    chosen = (
        None if keep is None else dict(keep) | ({"scores": str(folder / "scores.parquet")} if "which" in keep else {})
    )
    return train_on(folder, seed, chosen)


def all_runs(seeds: int) -> list[Run]:
    """Returns name, seed and `data.keep` of every run, in their order: scores first, then sizes one after the other."""
    runs: list[Run] = [(name, seed, None) for name in (SCORED, FULL) for seed in range(seeds)]
    for pruned, seed, (by, which) in product(PRUNED, range(seeds), CHOICES):
        keep = {"by": by, "share": 1 - pruned / 100} | ({"which": which} if which else {})
        runs.append((name_of(by, which, pruned), seed, keep))
    return runs


def study(kept: Kept, seeds: int, pool: int, processes: int, minutes: float) -> dict[str, dict[str, Any]]:
    """Runs what is missing until the time is over; returns name -> seed -> figures of all that has run."""
    end, root = time.monotonic() + 60 * minutes, ROOT / "out" / "scores_real_model"
    runs = all_runs(seeds)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), max_tasks_per_child=8) as executor:
        for scores in (True, False):  # the runs need the scores of their pool
            asked = {f"{name}, seed {seed}": partial(one_run, name, seed, pool, keep, root)
                     for name, seed, keep in runs if (name == SCORED) == scores}  # fmt: skip
            waiting = [name for name in asked if name not in kept.found]
            running = {}
            while running or (waiting and time.monotonic() < end):
                while waiting and len(running) < processes and time.monotonic() < end:
                    name = waiting.pop(0)
                    running[executor.submit(asked[name])] = name
                done = next(as_completed(running))
                name = running.pop(done)
                found = done.result()
                kept.measure(name, lambda found=found: found)
                print(f"{name}: {found['held_out']:.4f}", file=sys.stderr, flush=True)
    return {
        name: {str(seed): kept.found[key] for seed in range(seeds) if (key := f"{name}, seed {seed}") in kept.found}
        for name, _, _ in runs
    }


# ------------------------------------------------------------------------------------------------- what came of it


def rank_correlation(scored: Mapping[str, Any], one: str, other: str) -> float:
    """Computes Spearman's rank correlation of two scores, or of one with the length."""
    of = scored["scores"] | {"length": scored["lengths"]}
    return float(spearmanr(of[one], of[other]).statistic)


def summarise(found: Figures) -> dict[str, Any]:
    """Turns the figures of all runs into those of the page; sizes that lack a seed are left out.

    Args:
        found: name of a run -> seed -> its figures.
    """
    full, scored = list(found[FULL].values()), list(found[SCORED].values())

    def losses(name: str) -> list[float]:
        return [of_seed["held_out"] for of_seed in found[name].values()]

    choices: dict[str, dict[str, Any]] = {}
    for pruned in PRUNED:
        names = {choice: name_of(*choice, pruned) for choice in CHOICES}
        if any(len(found.get(name, {})) < len(full) for name in names.values()):
            continue
        for (by, _), name in names.items():
            each = found[name].values()
            row: dict[str, Any] = {key: float(np.mean([one[key] for one in each])) for key in AMOUNTS}
            row |= {"mean": float(np.mean(losses(name))), "to_full": asdict(paired_ratio(losses(name), losses(FULL)))}
            reference = losses(names[RANDOM, None])
            row["ratio"] = None if by == RANDOM else asdict(paired_ratio(losses(name), reference))
            choices[name] = row
    pairs = {
        f"{one} and {other}": [rank_correlation(of_seed, one, other) for of_seed in scored] for one, other in PAIRS
    }
    return {
        "seeds": len(full), "base": float(np.mean([one["held_out"] for one in scored])),
        "full": {key: float(np.mean([one[key] for one in full])) for key in ("held_out", *AMOUNTS)},
        "choices": choices,
        "correlations": {name: [float(np.mean(each)), float(min(each)), float(max(each))] for name, each in pairs.items()},
        "seconds": float(np.median([one["seconds"] / len(one["lengths"]) * 1000 for one in scored])),
    }  # fmt: skip


def markdown(result: Mapping[str, Any]) -> str:
    """Writes the page."""
    found = result["found"]
    full = found["full"]
    lines = [
        "# Pruning a real model's rows by scores",
        "",
        "Does a real model lose less when the rows that are pruned are chosen by a score than when they are drawn?",
        "",
        f"SmolLM2-135M-Instruct, LoRA on the attention of its last {len(LAYERS)} layers, one epoch of "
        f"{full['rows']:.0f} rows of GSM8K ({full['updates']:.0f} updates,",
        f"{full['tokens']:,.0f} tokens): the loss on {HELD_OUT} other rows goes from {found['base']:.4f} to "
        f"{full['held_out']:.4f}. A run on fewer rows makes fewer updates.",
        f"Losses are means of {found['seeds']} seeds, each with rows of its own; differences are paired by seed, with 95% "
        "intervals,",
        "bold where they exclude 0; positive is worse.",
        "",
        "| kept | pruned | rows | tokens | held-out loss | to the random choice | to all rows |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in found["choices"].items():
        kept, _, pruned = name.partition(", ")
        cells = [kept, pruned.split(" ")[0], f"{row['rows']:.0f}", f"{row['tokens']:,.0f}", f"{row['mean']:.4f}"]
        cells += [percent(Ratio(**row["ratio"])) if row["ratio"] else "", percent(Ratio(**row["to_full"]))]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *in_words(found), "", "![held-out losses next to the random choice](choices.png)"]
    ranks = [
        f"{name} {mean:+.2f} ({low:+.2f} to {high:+.2f})" for name, (mean, low, high) in found["correlations"].items()
    ]
    text = f"Rank correlations (Spearman) in a pool, means over seeds and their range: {', '.join(ranks)}."
    lines += ["", *textwrap.wrap(text, width=118)]
    lines += ["", f"Scoring takes {found['seconds']:,.0f} CPU seconds per 1,000 rows, loading included."]
    lines += limits(
        f"A pool of {full['rows']:.0f} rows: a choice among so few differs little from another, most of all with "
        f"10% pruned, and {full['updates']:.0f} updates teach the form of an answer before anything else. One "
        "model, whose weights are those of a four-bit file, read into float32; LoRA, one epoch, one learning rate "
        "that was tuned for none of the runs; scores of the model as it comes, not means over early checkpoints. "
        "All seeds share the model and the held-out rows. One in twenty intervals excludes 0 by chance."
    )
    return "\n".join([*lines, *origin_lines(result, "torch", "transformers", "peft")])


def draw(choices: Figures, path: Path) -> None:
    """Draws what each choice by a score loses or gains next to the random one of its size, with intervals."""
    rows = {name: Ratio(**row["ratio"]) for name, row in choices.items() if row["ratio"]}
    if not rows or (plt := pyplot()) is None:
        return
    figure, axis = plt.subplots(figsize=(6.2, 0.4 * len(rows) + 1.2))
    for place, ratio in enumerate(rows.values()):
        ends = [100 * (end - 1) for end in (ratio.low or ratio.estimate, ratio.high or ratio.estimate)]
        axis.plot(ends, [place, place], color="tab:blue")
        axis.plot(100 * (ratio.estimate - 1), place, marker="o", color="tab:blue")
    axis.axvline(0, color="grey", linewidth=1)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.invert_yaxis()
    axis.set_xlabel("% more loss than a random choice")
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"default {SEEDS}")
    parser.add_argument("--pool", type=int, default=POOL, help=f"rows of a seed (default {POOL})")
    parser.add_argument("--processes", type=int, default=2, help="of one thread each (default 2)")
    parser.add_argument("--minutes", type=float, default=35, help="after which no run begins any more (default 35)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "scores_real_model", help="default results/scores_real_model"
    )
    args = parser.parse_args()
    if (why := missing()) or not GSM8K.exists():
        sys.exit(f"error: {why or f'no {GSM8K}: set PACKTRAIN_GSM8K to the train.jsonl of GSM8K'}")
    torch.set_num_threads(1)
    found = study(Kept("scores_real_model"), args.seeds, args.pool, args.processes, args.minutes)
    if len(found[FULL]) < args.seeds:
        sys.exit(
            "error: not even the runs on all rows are finished\n    fix: the same command goes on where it stopped"
        )
    result = origin("scores_real_model") | {"found": summarise(found), "runs": without_rows(found)}
    store(args.out, result, markdown(result), depth=3)
    draw(result["found"]["choices"], args.out / "choices.png")
    print(markdown(result))


if __name__ == "__main__":
    main()
