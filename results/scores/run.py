"""Measures what pruning by scores does to a small model on GSM8K: the experiment of Data Diet, on fine-tuning rows.

    python results/scores/run.py                   # about half an hour on one core
    python results/scores/run.py --seeds 1 --updates 4 --real-rows 0

A small Llama is trained on some rows: the base. Each seed then trains it on other rows, all of them first; that run's
early checkpoints score every row, EL2N and loss being means over them (Paul, Ganguli and Dziugaite 2021,
https://arxiv.org/abs/2107.07075). Then the same seed trains the base again on the rows that `data.keep` keeps: the highest
or lowest scores, or a random choice, without 10, 30 and 50% of the rows. All runs of a seed see as many tokens, so that
one with fewer rows sees them more often, and what they reach on held-out rows is compared pair by pair with the run on
the random choice of the same size. Perplexity orders rows as the loss does, so that it would keep the same ones.

SmolLM2-135M-Instruct, where `results/real_model/prepare.py` has made it, scores some of the rows too, untrained on them.
Costs are CPU seconds of one thread, those of scoring also over those of training in the same seed, and computed FLOPs.
Finished runs are kept in `out/`: a study that was stopped goes on behind them. Sizes that `--minutes` leaves no time for
are not on the page.

Writes `results/scores/bench.json` and `results/scores/README.md`.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from scipy.stats import spearmanr
from transformers import AutoConfig, Trainer, TrainerCallback

from packtrain.compare.flops import training_flops
from packtrain.compare.statistics import Ratio, paired_ratio
from packtrain.data.pruning import choose
from packtrain.objectives.task import load_task
from packtrain.packing.plan import plan_evaluation
from packtrain.recipe.recipe import Recipe
from packtrain.recipe.sections import SCORES
from packtrain.training.run import build, fit, train
from packtrain.training.scoring import score, score_examples

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, as results/ is not installed
from results.page import RESULTS, Kept, limits, origin, origin_lines, percent, store
from results.real_model.prepare import MODEL, ROOT, missing

GSM8K = Path(os.environ.get("PACKTRAIN_GSM8K", ROOT.parent / "shared/data/gsm8k/train.jsonl"))
PARTS = {
    "held_out": (0, 100),
    "pool": (100, 740),
    "base": (740, 3940),
}  # rows to evaluate on, choose from, and start with
VOCABULARY, EXAMPLES, UPDATES = 1024, 16, 40  # entries; examples and updates of a run on all rows
LLAMA = {
    "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "tie_word_embeddings": True,
}  # fmt: skip
RATE, EARLY = 3e-3, (0.1, 0.2, 0.3)  # learning rate; shares of the run after which a checkpoint scores
FULL, RANDOM = "all rows", "random"
PRUNED, CHOICES = (50, 30, 10), (("loss", "high"), ("loss", "low"), ("el2n", "high"), ("el2n", "low"), (RANDOM, None))


def name_of(by: str, which: str | None, pruned: int) -> str:
    """Names a run by its choice: `el2n high, 30% pruned`."""
    return f"{by}{f' {which}' if which else ''}, {pruned}% pruned"


def write_rows(folder: Path) -> None:
    """Writes the rows of the three parts, in GSM8K's order."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = GSM8K.read_text(encoding="utf-8").splitlines()
    for name, (start, stop) in PARTS.items():
        (folder / f"{name}.jsonl").write_text("\n".join(lines[start:stop]) + "\n", encoding="utf-8")


def recipe_of(folder: Path, rows: str, model: Mapping[str, Any], **training: Any) -> Recipe:
    """A recipe over one part of the rows; `data.keep` is in `training["keep"]`."""
    keep = training.pop("keep", None)
    fixed = {
        "learning_rate": RATE, "lr_scheduler_type": "cosine", "warmup_steps": 0.1, "logging_steps": 5, "seed": 0,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "eval_on_start": False,
    }  # fmt: skip
    return Recipe.model_validate({
        "model": dict(model),
        "data": {"path": str(folder / f"{rows}.jsonl"), "eval_path": str(folder / "held_out.jsonl"), "keep": keep,
                 "max_length": 1024},
        "batching": {"examples_per_step": EXAMPLES, "max_tokens": 8192},
        "objective": {"name": "causal_lm"},
        "training": fixed | {"output_dir": str(folder / "run")} | training,
    })  # fmt: skip


def train_base(folder: Path) -> dict[str, Any]:
    """Trains the base from scratch, one epoch; returns its held-out loss before and after."""
    model = {"config": LLAMA, "tokenizer_vocab_size": VOCABULARY}
    summary = train(
        recipe_of(folder, "base", model, output_dir=str(folder / "base"), num_train_epochs=1, eval_on_start=True),
        overwrite=True,
    )
    return {"before": summary.held_out_loss_before, "after": summary.held_out_loss_after, "tokens": summary.real_tokens}


class SaveEarly(TrainerCallback):
    """Saves the model after some updates, and counts the CPU seconds that this takes."""

    def __init__(self, trainer: Trainer, steps: Sequence[int], folder: Path):
        self.trainer, self.steps, self.folder, self.seconds = trainer, steps, folder, 0.0

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step in self.steps:
            began = time.process_time()
            self.trainer.save_model(str(self.folder / f"early-{state.global_step}"))
            self.seconds += time.process_time() - began


def run(folder: Path, seed: int, updates: int, keep: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Trains the base on all rows of the pool, or on those kept; returns the held-out loss, tokens and CPU seconds.

    Args:
        updates: of a run on all rows, which is scored, too; on those kept there are as many as have the same tokens on
            average.
    """
    recipe = partial(recipe_of, folder, "pool", {"model_name_or_path": str(folder / "base" / "model")}, seed=seed)
    everything, kept = (load_task(recipe(keep=each)).train.lengths for each in (None, keep))
    equal = round(updates * everything.mean() / kept.mean())
    asked = recipe(keep=keep, max_steps=equal)
    trainer = build(asked)
    early = SaveEarly(trainer, sorted({max(1, round(share * updates)) for share in EARLY}), folder)
    if keep is None:
        trainer.add_callback(early)
    began = time.process_time()
    fit(trainer)
    seconds = time.process_time() - began - early.seconds
    tokens = sum(int(kept[trainer.plan.examples(step)].sum()) for step in range(equal))
    found = {"held_out": trainer.evaluate()["eval_loss"], "rows": len(kept), "updates": equal, "tokens": tokens}
    found |= {"mean_length": float(kept.mean()), "cpu_seconds": seconds}
    return found if keep is not None else found | score_pool(asked, trainer, early, folder / f"scores-{seed}.parquet")


def score_pool(recipe: Recipe, trainer: Trainer, early: SaveEarly, file: Path) -> dict[str, Any]:
    """Scores all rows of the pool by the early checkpoints of a run, and times one pass of its model over them."""
    models = [str(early.folder / f"early-{step}") for step in early.steps]
    scored = score(recipe, out=file, models=models)
    task = load_task(recipe)
    plan = plan_evaluation(recipe.batching, task.train.lengths, layout="flat", max_length=recipe.data.max_length)
    trainer.model.eval()
    began = time.process_time()
    score_examples(trainer.model, task, plan, trainer.args, max_length=recipe.data.max_length)
    return {
        "scoring_seconds": time.process_time() - began, "early": list(early.steps), "lengths": scored.lengths.tolist(),
        "supervised": task.train.supervised.tolist(),
        "scores": {name: np.round(values, 6).tolist() for name, values in scored.scores.items()},
    }  # fmt: skip


def score_real(folder: Path, rows: int) -> dict[str, Any] | None:
    """Scores the first rows of the pool by the real model; None where it isn't there."""
    if missing() or not rows:
        return None
    lines = (folder / "pool.jsonl").read_text(encoding="utf-8").splitlines()[:rows]
    (folder / "real.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    recipe = recipe_of(folder, "real", {"model_name_or_path": str(MODEL)})
    began = time.process_time()
    scored = score(recipe, out=folder / "real.parquet")
    return {
        "scoring_seconds": time.process_time() - began,
        "lengths": scored.lengths.tolist(),
        "scores": {name: values.tolist() for name, values in scored.scores.items()},
    }


def study(folder: Path, kept: Kept, seeds: int, updates: int, real_rows: int, minutes: float) -> dict[str, Any]:
    """Runs all that is missing, the choices of one size after those of another, until the time is over."""
    if not kept.found:
        shutil.rmtree(folder, ignore_errors=True)
    write_rows(folder)
    end = time.monotonic() + 60 * minutes
    base = kept.measure("base", partial(train_base, folder))
    runs: dict[str, dict[str, Any]] = {
        str(seed): {FULL: kept.measure(f"{FULL}, seed {seed}", partial(run, folder, seed, updates))}
        for seed in range(seeds)
    }
    for pruned, seed, (by, which) in product(PRUNED, range(seeds), CHOICES):
        keep = {"by": by, "share": 1 - pruned / 100}
        keep |= {"which": which, "scores": str(folder / f"scores-{seed}.parquet")} if which else {}
        name = name_of(by, which, pruned)
        if time.monotonic() > end and f"{name}, seed {seed}" not in kept.found:
            break
        runs[str(seed)][name] = kept.measure(f"{name}, seed {seed}", partial(run, folder, seed, updates, keep))
        print(f"seed {seed}: {name}: {runs[str(seed)][name]['held_out']:.4f}", file=sys.stderr, flush=True)
    return {"base": base, "runs": runs, "real": kept.measure("real", partial(score_real, folder, real_rows))}


# ------------------------------------------------------------------------------------------------- what came of it


def compare_runs(runs: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Compares held-out losses, paired by seed: each choice with the random one of its size, and with all rows.

    Args:
        runs: seed -> name of the run -> its figures; sizes that a seed has not finished are left out.
    """

    def losses(name: str) -> list[float]:
        return [of_seed[name]["held_out"] for of_seed in runs.values()]

    found: dict[str, dict[str, Any]] = {}
    for pruned in PRUNED:
        if not all(name_of(*choice, pruned) in of_seed for of_seed in runs.values() for choice in CHOICES):
            continue
        for by, which in CHOICES:
            name, reference = name_of(by, which, pruned), name_of(RANDOM, None, pruned) if which else FULL
            ratio = paired_ratio(losses(name), losses(reference))
            found[name] = {"against": reference, "mean": float(np.mean(losses(name))), "ratio": asdict(ratio)}
            found[name]["to_full"] = asdict(paired_ratio(losses(name), losses(FULL)))
            for figure in ("rows", "tokens", "mean_length", "updates"):
                found[name][figure] = float(np.mean([of_seed[name][figure] for of_seed in runs.values()]))
    return found


def correlations(scores: Mapping[str, Sequence[float]], lengths: Sequence[int]) -> dict[str, float]:
    """Computes Spearman's rank correlations of each score with the length, and of the loss with EL2N."""
    found = {f"{name} and length": float(spearmanr(scores[name], lengths).statistic) for name in SCORES}
    return found | {"loss and el2n": float(spearmanr(scores["loss"], scores["el2n"]).statistic)}


def overlap(scores: Sequence[Sequence[float]], pruned: int, which: str) -> float:
    """Returns the share of kept examples that two sets of scores have in common, a mean over all pairs of sets."""
    count = round((1 - pruned / 100) * len(scores[0]))
    sets = [set(choose(np.array(each), count, which).tolist()) for each in scores]
    pairs = [(one, other) for place, one in enumerate(sets) for other in sets[place + 1 :]]
    return float(np.mean([len(one & other) / count for one, other in pairs])) if pairs else 1.0


def summarise(found: Mapping[str, Any]) -> dict[str, Any]:
    """Turns the figures of all runs into those of the page."""
    runs, real = found["runs"], found["real"]
    full = [of_seed[FULL] for of_seed in runs.values()]
    each = [correlations(one["scores"], one["lengths"]) for one in full]
    mean = {name: np.mean([one["scores"][name] for one in full], axis=0) for name in SCORES}
    config = AutoConfig.for_model(**LLAMA)
    flops = training_flops(config, frozen=False)
    passes = [
        sum(flops(np.array([length]), count) for length, count in zip(one["lengths"], one["supervised"], strict=True))
        / 3
        for one in full
    ]
    relative = paired_ratio(
        [one["scoring_seconds"] / sum(one["lengths"]) for one in full],
        [one["cpu_seconds"] / one["tokens"] for one in full],
    )
    summary = {
        "base": found["base"],
        "full": {"mean": float(np.mean([one["held_out"] for one in full])), "updates": full[0]["updates"],
                 "tokens": float(np.mean([one["tokens"] for one in full])), "rows": full[0]["rows"]},
        "seeds": len(full), "early": full[0]["early"], "choices": compare_runs(runs),
        "correlations": {name: [float(np.mean([one[name] for one in each])), float(np.min([one[name] for one in each])),
                                float(np.max([one[name] for one in each]))] for name in each[0]},
        "overlap": {f"{name}, {pruned}%": overlap([one["scores"][name] for one in full], pruned, "high")
                    for name in ("loss", "el2n") for pruned in PRUNED},
        "cost": {"relative": asdict(relative), "gflops": float(np.mean(passes)) / len(full[0]["lengths"]) * 1000 / 1e9,
                 "seconds": float(np.median([one["scoring_seconds"] / len(one["lengths"]) * 1000 for one in full]))},
        "real": None,
    }  # fmt: skip
    if real is not None:
        rows = len(real["lengths"])
        summary["real"] = {"rows": rows, "correlations": correlations(real["scores"], real["lengths"])}
        summary["real"]["seconds"] = real["scoring_seconds"] / rows * 1000
        summary["real"]["small model"] = {
            name: float(spearmanr(real["scores"][name], mean[name][:rows]).statistic) for name in SCORES
        }
    return summary


def markdown(result: Mapping[str, Any]) -> str:
    """Writes the page."""
    found = result["found"]
    base, full, real = found["base"], found["full"], found["real"]
    before_after = f"{base['before']:.3f} to {base['after']:.3f}"
    lines = [
        "# Pruning by scores",
        "",
        "Does a small model learn more from the rows of GSM8K that score high or low than from as many at random?",
        "",
        f"The base is a Llama of two layers (hidden 64), {base['tokens']:,} tokens from scratch: held-out loss "
        f"{before_after}.",
        f"Trained further on all {full['rows']} rows of a pool ({full['updates']} updates, {full['tokens']:,.0f} tokens) it "
        f"reaches {full['mean']:.4f}. Every other run has",
        "about as many tokens, and sees the rows that are left more often. Held-out losses are means of "
        f"{found['seeds']} seeds; differences",
        "are paired by seed, with 95% intervals, bold where they exclude 0; positive is worse.",
        "",
        "| kept | pruned | tokens a row | held-out loss | to the random choice | to all rows |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in found["choices"].items():
        kept, _, pruned = name.partition(", ")
        cells = [kept, f"{pruned.split('%')[0]}%", f"{row['mean_length']:.0f}", f"{row['mean']:.4f}"]
        cells += ["" if kept == RANDOM else percent(Ratio(**row["ratio"])), percent(Ratio(**row["to_full"]))]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *in_words(found), "", "Rank correlations (Spearman) over the pool, a mean over seeds and their range"]
    lines[-1] += f"; SmolLM2-135M-Instruct over {real['rows']} rows of it:" if real else ":"
    lines += ["", "| | small model | SmolLM2-135M-Instruct |", "|---|---:|---:|"]
    for name, (mean, low, high) in found["correlations"].items():
        other = f"{real['correlations'][name]:+.2f}" if real else "not scored"
        lines.append(f"| {name} | {mean:+.2f} ({low:+.2f} to {high:+.2f}) | {other} |")
    if real:
        lines += [f"| {name} of both models | | {value:+.2f} |" for name, value in real["small model"].items()]
    shared = ", ".join(f"{share:.0%} ({name} pruned)" for name, share in found["overlap"].items())
    early = ", ".join(map(str, found["early"]))
    lines += [
        "",
        f"The highest scores of two seeds have in common: {shared}.",
        "",
        f"Scores are means over the checkpoints after updates {early}. One of these passes costs "
        f"{Ratio(**found['cost']['relative']).text()} the CPU seconds of",
        f"training on the same tokens (a third by FLOPs: {found['cost']['gflops']:.1f} GFLOPs per 1,000 rows), and "
        f"{found['cost']['seconds']:.1f} CPU seconds",
        "per 1,000 rows" + (f"; of SmolLM2-135M-Instruct, loading included, {real['seconds']:,.0f}." if real else "."),
    ]
    lines += limits(
        "A model that has hardly learnt arithmetic, a pool of 640 rows, one epoch's worth of tokens, one base for all seeds "
        "and a learning rate that was not tuned for any choice; Data Diet pruned images, and trained for many epochs. One "
        "in twenty intervals excludes 0 by chance. The machine was shared: CPU seconds are those of one thread."
    )
    return "\n".join([*lines, *origin_lines(result, "torch", "transformers")])


def in_words(found: Mapping[str, Any]) -> list[str]:
    """Says how many choices beat a random one, how many lose to it, and which sizes are missing."""
    ratios = [Ratio(**row["ratio"]) for name, row in found["choices"].items() if not name.startswith(RANDOM)]
    better, worse = sum(ratio.below_one for ratio in ratios), sum(ratio.above_one for ratio in ratios)
    missing = [f"{pruned}%" for pruned in PRUNED if name_of(RANDOM, None, pruned) not in found["choices"]]
    unfinished = [f"Not finished yet: the choices without {' and '.join(missing)} of the rows."]
    text = (
        f"Of {len(ratios)} choices by a score, {better} are better than the random one of their size and {worse} worse."
    )
    return [text, *(unfinished if missing else [])]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="default 5")
    parser.add_argument("--updates", type=int, default=UPDATES, help=f"of a run on all rows (default {UPDATES})")
    parser.add_argument("--real-rows", type=int, default=150, help="that the real model scores (default 150)")
    parser.add_argument("--minutes", type=float, default=60, help="after which no run begins any more (default 60)")
    parser.add_argument("--out", type=Path, default=RESULTS / "scores", help="default results/scores")
    args = parser.parse_args()
    if not GSM8K.exists():
        sys.exit(f"error: no {GSM8K}: set PACKTRAIN_GSM8K to the train.jsonl of GSM8K")
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    gc.freeze()  # every run collects garbage when it begins, among all modules otherwise
    kept = Kept("scores")
    found = study(ROOT / "out" / "scores", kept, args.seeds, args.updates, args.real_rows, args.minutes)
    if not compare_runs(found["runs"]):
        sys.exit("error: no size is finished\n    fix: the same command goes on where it stopped")
    result = origin("scores") | {"found": summarise(found), "runs": without_rows(found["runs"])}
    store(args.out, result, markdown(result), depth=3)
    if len(result["found"]["choices"]) == len(PRUNED) * len(CHOICES):  # else the same command goes on
        kept.finish()
        shutil.rmtree(ROOT / "out" / "scores", ignore_errors=True)
    print(markdown(result))


def without_rows(runs: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Leaves out what is of single rows."""
    return {
        seed: {
            name: {key: value for key, value in figures.items() if not isinstance(value, list | dict)}
            for name, figures in of_seed.items()
        }
        for seed, of_seed in runs.items()
    }


if __name__ == "__main__":
    main()
