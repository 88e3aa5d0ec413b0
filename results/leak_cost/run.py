"""Measures what it costs a small model to train on packs in which attention leaks from one document to the next.

    python results/leak_cost/run.py                # about six minutes on one core
    python results/leak_cost/run.py --seeds 2 --minutes 5

The same packs, in the same order, at the same learning rate, twice: with documents isolated, and with every token attending
to all before it in the pack. Positions restart at every document in both, as they do in the trainers that pack, and the
first token of a document is supervised in neither: attention is all that differs. The packs are those of two ways of
`results/epoch_packing`, at the learning rates that were tuned there without a leak: that page's `bench.json` must be there.
The model and its rows are those of `results/small_model.py`.

Held-out losses are those of single documents, which is how a model is used, and those of packs that leak, which is what a
trainer with a leak would report. Finished runs are kept in `out/`: a study that was stopped goes on behind them.

Writes `results/leak_cost/bench.json`, `README.md` and, where matplotlib is installed, `losses.png`.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from packtrain.compare.statistics import Difference, paired_difference
from packtrain.objectives.masked_diffusion.pictures import pyplot
from packtrain.packing.bounds import KEY as BOUNDS
from packtrain.packing.bounds import Bounds
from packtrain.packing.collator import Batch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, as results/ is not installed
from results.epoch_packing.run import BFD, ROWS, SMALL, plan_of
from results.page import RESULTS, Kept, limits, origin, origin_lines, signed, store
from results.small_model import (
    Ground,
    draw_rows,
    fine_tune,
    held_out_loss,
    load_base,
    mean,
    missing_rows,
    prepare_ground,
    updates_of,
)

TUNED = RESULTS / "epoch_packing" / "bench.json"
PACKS = (BFD, SMALL)
ISOLATED, LEAKING = "isolated", "leaking"
FIGURES = {
    "train": "training, last quarter",
    "single": "held out, single documents",
    "packs": "held out, leaking packs",
}


def leak(batch: Batch) -> Batch:
    """Returns a flat batch whose documents are one to the attention; positions, labels and weights stay as they are."""
    length = batch["input_ids"].shape[1]
    offsets = torch.tensor([0, length], dtype=torch.int32)
    return batch | {
        "cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": length, "max_length_k": length,
        BOUNDS: Bounds(offsets),
    }  # fmt: skip


def run(ground: Ground, packs: str, way: str, rate: float, seed: int, rows: int = ROWS) -> dict[str, Any]:
    """Trains a copy of the base on one epoch of packs, with or without a leak; returns losses in nats per token."""
    drawn = draw_rows(ground, seed, rows)
    plan = plan_of(packs, np.asarray(ground.pool.lengths[drawn], dtype=np.int64), seed)
    model, change = load_base(ground), leak if way == LEAKING else None
    losses = fine_tune(model, updates_of(ground, plan, drawn, change), count=plan.total_steps, rate=rate)
    documents = mean([len(part) for step in range(plan.total_steps) for part in plan.layout_of(step)])
    return {
        "train": mean(losses[-max(1, len(losses) // 4) :]), "single": held_out_loss(model, ground.held_out),
        "packs": held_out_loss(model, ground.held_out, leak, max_tokens=plan.scope.max_tokens),
        "updates": plan.total_steps, "capacity": plan.scope.max_tokens, "documents": documents,
    }  # fmt: skip


def look_at_base(ground: Ground, capacity: int) -> dict[str, float]:
    """Returns the base's held-out losses, before it is trained on packs."""
    model = load_base(ground)
    return {
        "single": held_out_loss(model, ground.held_out),
        "packs": held_out_loss(model, ground.held_out, leak, max_tokens=capacity),
    }


def study(ground: Ground, kept: Kept, rates: Mapping[str, float], seeds: int, minutes: float) -> dict[str, Any]:
    """Runs all that is missing until the time is over; ways take turns at going first.

    Returns:
        packs -> way -> a run of each finished seed.
    """
    end = time.monotonic() + 60 * minutes
    runs: dict[str, dict[str, list[Any]]] = {packs: {ISOLATED: [], LEAKING: []} for packs in PACKS}
    for seed in range(seeds):
        for packs in PACKS:
            found: dict[str, Any] = {}
            for way in (ISOLATED, LEAKING)[:: -1 if seed % 2 else 1]:
                name = f"{packs}, {way}, {rates[packs]:g}, seed {seed}"
                if name not in kept.found and time.monotonic() > end:
                    return runs
                found[way] = kept.measure(name, partial(run, ground, packs, way, rates[packs], seed))
                print(f"{name}: {found[way]['single']:.4f}", file=sys.stderr, flush=True)
            for way, one in found.items():
                runs[packs][way].append(one)
    return runs


# ------------------------------------------------------------------------------------------------- what came of it


def compare_ways(runs: Mapping[str, Mapping[str, list[Mapping[str, Any]]]]) -> dict[str, Any]:
    """Compares the losses with a leak to those without, seed by seed, for packs of each kind that has finished seeds."""
    found: dict[str, Any] = {}
    for packs, ways in runs.items():
        if not ways[LEAKING]:
            continue
        losses = {name: {way: [one[name] for one in ways[way]] for way in ways} for name in FIGURES}
        found[packs] = {
            "seeds": len(ways[LEAKING]),
            "means": {name: {way: mean(values) for way, values in each.items()} for name, each in losses.items()},
            "differences": {
                name: asdict(paired_difference(each[LEAKING], each[ISOLATED])) for name, each in losses.items()
            },
        }
        # what the model that leaks shows of itself in packs, less what it does on single documents
        found[packs]["hidden"] = asdict(paired_difference(losses["packs"][LEAKING], losses["single"][LEAKING]))
        for figure in ("updates", "capacity", "documents"):
            found[packs][figure] = mean([one[figure] for one in ways[ISOLATED]])
    return found


def markdown(result: Mapping[str, Any]) -> str:
    """Writes the page."""
    base, found = result["base"], result["found"]
    seeds = min(row["seeds"] for row in found.values())
    lines = [
        "# What a leak costs",
        "",
        "What does it cost to train on packs in which attention leaks between documents, and does the loss show it?",
        "",
        f"A Llama of {base['parameters']:,} parameters that has learnt such text with documents isolated "
        "([`epoch_packing`](../epoch_packing/README.md))",
        f"trains one epoch on packs of GSM8K, {seeds} seeds. Same packs, same updates, positions that restart at every "
        "document;",
        "the one difference is whether a token attends to the whole pack before it. Losses in nats per token; differences",
        "are paired by seed, with 95% intervals, bold where they exclude 0; positive is higher with the leak.",
        "",
        "| packs | loss | isolated | leaking | difference |",
        "|---|---|---:|---:|---:|",
    ]
    for row in found.values():
        name = f"{row['capacity']:,.0f} tokens, {row['documents']:.1f} documents"
        for figure, label in FIGURES.items():
            ours, theirs = (row["means"][figure][way] for way in (ISOLATED, LEAKING))
            lines.append(
                f"| {name} | {label} | {ours:.4f} | {theirs:.4f} | {signed(Difference(**row['differences'][figure]))} |"
            )
    lines += ["", *(_words(row) for row in found.values())]
    untrained = "; ".join(
        f"{one['packs'] - one['single']:+.4f} in packs of {capacity} tokens"
        for capacity, one in result["untrained"].items()
    )
    rates = ", ".join(f"{result['rates'][packs]:g} (`{packs}`)" for packs in found)
    lines += [
        f"- Before any training on packs the leak changes the base's held-out loss by {untrained}.",
        "",
        f"Learning rates were tuned without a leak: {rates}.",
        "",
        "![losses with a leak and without](losses.png)",
    ]
    lines += limits(
        "One small model, rows of one kind, which are no misleading context for one another, one epoch, and a base that "
        "never saw a leak; a long training run from scratch on packs that leak may differ, as may packs of hundreds of "
        "documents. The learning rate was tuned without a leak, and not again with it. A difference that an interval does "
        "not tell from 0 may still be there, within that interval."
    )
    return "\n".join([*lines, *origin_lines(result, "torch", "transformers")])


def _words(row: Mapping[str, Any]) -> str:
    """Says in a sentence what packs of one kind show."""
    single, train, hidden = (
        Difference(**each) for each in (row["differences"]["single"], row["differences"]["train"], row["hidden"])
    )
    text = f"- Packs of {row['capacity']:,.0f} tokens, {row['updates']:.0f} updates: "
    text += "on single documents the model that leaked "
    if single.is_clear:
        text += f"is {'worse' if single.estimate > 0 else 'better'} by {abs(single.estimate):.4f}. "
    else:
        text += f"can't be told from the other ({signed(single)}). "
    if train.is_clear:
        text += f"Its training loss is {'higher' if train.estimate > 0 else 'lower'} by {abs(train.estimate):.4f}. "
    else:
        text += (
            f"Neither can its training loss ({signed(train)}). "
            if not single.is_clear
            else (f"Its training loss does not show it ({signed(train)}). ")
        )
    return text + f"Its own packs show it a loss that differs from that of single documents by {signed(hidden)}."


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Draws the differences with their intervals."""
    if (plt := pyplot()) is None:
        return
    figure, axes = plt.subplots(1, len(found), figsize=(5.2 * len(found), 2.4), squeeze=False)
    for axis, row in zip(axes[0], found.values(), strict=True):
        for place, name in enumerate(FIGURES):
            one = Difference(**row["differences"][name])
            if one.low is not None and one.high is not None:
                axis.plot([one.low, one.high], [place, place], color="black")
            axis.plot([one.estimate], [place], marker="o", color="black")
        axis.axvline(0, color="grey", linestyle=":")
        axis.set_yticks(range(len(FIGURES)), list(FIGURES.values()))
        axis.invert_yaxis()
        axis.set_title(f"packs of {row['capacity']:,.0f} tokens", fontsize=10)
        axis.set_xlabel("loss with the leak minus without")
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="default 5")
    parser.add_argument("--minutes", type=float, default=35, help="after which no run begins any more (default 35)")
    parser.add_argument("--out", type=Path, default=RESULTS / "leak_cost", help="default results/leak_cost")
    args = parser.parse_args()
    if why := missing_rows():
        sys.exit(f"error: {why}")
    if not TUNED.exists():
        sys.exit(
            f"error: no {TUNED}, which has the tuned learning rates\n    fix: run results/epoch_packing/run.py first"
        )
    rates = json.loads(TUNED.read_text(encoding="utf-8"))["rates"]
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    gc.freeze()
    ground, kept = prepare_ground(), Kept("leak_cost")
    if kept.measure("base", lambda: ground.base) != ground.base:
        kept.found = {"base": ground.base}  # runs from another base are no part of this
    runs = study(ground, kept, rates, args.seeds, args.minutes)
    found = compare_ways(runs)
    if len(found) < len(PACKS):
        sys.exit("error: no seed is finished\n    fix: the same command goes on where it stopped")
    capacities = [round(row["capacity"]) for row in found.values()]
    untrained = {
        f"{each:,}": kept.measure(f"base in {each}", partial(look_at_base, ground, each)) for each in capacities
    }
    result = origin("leak_cost") | {"base": ground.base, "rates": rates, "untrained": untrained, "found": found}
    result |= {"runs": runs}
    store(args.out, result, markdown(result), depth=3)
    draw(found, args.out / "losses.png")
    if all(len(ways[LEAKING]) == args.seeds for ways in runs.values()):  # else the same command goes on
        kept.finish()
    print(markdown(result))


if __name__ == "__main__":
    main()
