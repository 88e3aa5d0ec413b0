"""Measures what packing over the epoch costs a small model once learning rates are tuned: is it packing, or fewer updates?

    python results/epoch_packing/run.py            # about 10 minutes on one core
    python results/epoch_packing/run.py --seeds 2 --minutes 10

Packing the whole epoch into full batches sees the same examples in fewer updates. At an unchanged learning rate it then
learns less, and says nothing about packing: other updates want another rate. Here a small Llama that has already learnt
such text (`results/small_model.py`) is trained further for one epoch, on rows of GSM8K that it has not seen, by

- `balanced`: the examples of every update as with padding, laid out end to end;
- `bfd`: the whole epoch packed, as a recipe does it where only the strategy changes;
- `bfd, small packs`: packed so that there are as many updates as in `balanced`, and so about as many tokens in each;
- `balanced, cut short`: `balanced` until it has made as many updates as `bfd`, its learning rate down to 0 by then.

Every one has its learning rate chosen from the same grid, by as many runs, on other seeds and other held-out rows than those
that count. Another run has `bfd` at the rate of `balanced`. A seed draws the rows and their order, the same for all ways, so
held-out losses are compared seed by seed. Finished runs are kept in `out/`: a study that was stopped goes on behind them.

Writes `results/epoch_packing/bench.json`, `README.md` and, where matplotlib is installed, `losses.png`.
"""

from __future__ import annotations

import argparse
import gc
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
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
from packtrain.packing.plan import Plan, make_plan

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, as results/ is not installed
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

ROWS, EXAMPLES, MAX_TOKENS = 320, 4, 4096  # of the epoch; of an update of `balanced`; of a micro-batch, as in recipes
BALANCED, BFD, SMALL, SHORT = "balanced", "bfd", "bfd, small packs", "balanced, cut short"
ARMS = (BALANCED, BFD, SMALL, SHORT)
UNTUNED = "bfd at the rate of balanced"
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
TUNING_SEEDS = (100, 101)


def plan_of(arm: str, lengths: np.ndarray, seed: int, *, examples: int = EXAMPLES) -> Plan:
    """Plans one epoch of an arm over rows of these lengths, int `[n]`."""
    common: dict[str, Any] = {"seed": seed, "examples_per_step": examples, "max_tokens": MAX_TOKENS}
    if arm == BFD:
        return make_plan(lengths, strategy="bfd", **common)
    balanced = make_plan(lengths, strategy="balanced", **common)
    if arm == BALANCED:
        return balanced
    if arm == SHORT:
        updates = plan_of(BFD, lengths, seed, examples=examples).total_steps
        return make_plan(lengths, strategy="balanced", max_steps=updates, **common)
    assert arm == SMALL, arm
    return small_packs(lengths, balanced.total_steps, seed)


def small_packs(lengths: np.ndarray, updates: int, seed: int) -> Plan:
    """Packs an epoch by the smallest capacity that needs no more than so many updates of one pack."""
    capacity = max(-(-int(lengths.sum()) // updates), int(lengths.max()))
    while True:
        plan = make_plan(lengths, strategy="bfd", seed=seed, max_tokens=capacity, gradient_accumulation_steps=1)
        if plan.total_steps <= updates:
            return plan
        capacity += 1


def run(ground: Ground, arm: str, rate: float, seed: int, part: str, rows: int = ROWS) -> dict[str, Any]:
    """Trains a copy of the base by one arm.

    Args:
        part: the rows whose loss is taken afterwards, "tuning" or "held_out".
    """
    drawn = draw_rows(ground, seed, rows)
    lengths = np.asarray(ground.pool.lengths[drawn], dtype=np.int64)
    plan = plan_of(arm, lengths, seed)
    updates = [plan.examples(step) for step in range(plan.total_steps)]
    seen = np.concatenate(updates)
    assert len(set(seen.tolist())) == len(seen), "no example is seen twice"
    assert arm == SHORT or len(seen) == rows, "every example is seen"
    model = load_base(ground)
    losses = fine_tune(model, updates_of(ground, plan, drawn), count=plan.total_steps, rate=rate)
    return {
        "loss": held_out_loss(model, getattr(ground, part)), "updates": plan.total_steps, "examples": len(seen),
        "tokens": int(lengths[seen].sum()), "deviation": float(np.std([lengths[ids].sum() for ids in updates])),
        "train": [round(loss, 4) for loss in losses],
    }  # fmt: skip


def study(ground: Ground, kept: Kept, seeds: int, minutes: float) -> dict[str, Any]:
    """Runs all that is missing until the time is over: first the tuning, then all arms of one seed after the other.

    Returns:
        tuning: arm -> rate -> a run of each tuning seed; rates: arm -> the one with the lowest mean loss, empty while
        tuning is unfinished; runs: seed -> arm -> run, of finished seeds.
    """
    end = time.monotonic() + 60 * minutes

    def measure(arm: str, rate: float, seed: int, part: str) -> dict[str, Any] | None:
        name = f"{part}: {arm}, {rate:g}, seed {seed}"
        if name not in kept.found:
            if time.monotonic() > end:
                return None
            found = kept.measure(name, partial(run, ground, arm, rate, seed, part))
            print(f"{name}: {found['loss']:.4f} after {found['updates']} updates", file=sys.stderr, flush=True)
        return kept.found[name]

    tuning: dict[str, dict[str, list[Any]]] = {arm: {f"{rate:g}": [] for rate in RATES} for arm in ARMS}
    for seed in TUNING_SEEDS:
        for arm in ARMS:
            for rate in RATES:
                if (found := measure(arm, rate, seed, "tuning")) is None:
                    return {"tuning": tuning, "rates": {}, "runs": {}}
                tuning[arm][f"{rate:g}"].append(found)
    rates, runs = choose_rates(tuning), {}
    for seed in range(seeds):
        of_seed = {arm: measure(arm, rates[arm], seed, "held_out") for arm in ARMS}
        of_seed[UNTUNED] = measure(BFD, rates[BALANCED], seed, "held_out")
        if None in of_seed.values():
            break
        runs[str(seed)] = of_seed
    return {"tuning": tuning, "rates": rates, "runs": runs}


# ------------------------------------------------------------------------------------------------- what came of it


def choose_rates(tuning: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> dict[str, float]:
    """Returns of every arm the learning rate with the lowest mean loss of its runs."""
    return {
        arm: float(min(rates, key=lambda rate: mean([one["loss"] for one in rates[rate]])))
        for arm, rates in tuning.items()
    }


def summarise(found: Mapping[str, Any]) -> dict[str, Any]:
    """Turns the figures of all runs into those of the page; differences are paired by seed."""
    runs = list(found["runs"].values())

    def losses(arm: str) -> list[float]:
        return [of_seed[arm]["loss"] for of_seed in runs]

    arms: dict[str, dict[str, Any]] = {}
    for arm in (*ARMS, UNTUNED):
        arms[arm] = {
            name: mean([of_seed[arm][name] for of_seed in runs])
            for name in ("updates", "tokens", "examples", "deviation")
        }
        arms[arm] |= {
            "rate": found["rates"][BALANCED if arm == UNTUNED else arm],
            "loss": mean(losses(arm)),
            "difference": None if arm == BALANCED else asdict(paired_difference(losses(arm), losses(BALANCED))),
        }
    return {
        "arms": arms, "seeds": len(runs), "tuning_seeds": len(next(iter(found["tuning"][BALANCED].values()))),
        "tuning": {arm: {rate: mean([one["loss"] for one in each]) for rate, each in rates.items()}
                   for arm, rates in found["tuning"].items()},
        "equal_updates": asdict(paired_difference(losses(BFD), losses(SHORT))),
    }  # fmt: skip


def at_edge(tuning: Mapping[str, float], rate: float) -> bool:
    """Whether the chosen learning rate is the lowest or highest of its grid, so that a better one may lie beyond."""
    return f"{rate:g}" in (list(tuning)[0], list(tuning)[-1])


def markdown(result: Mapping[str, Any]) -> str:
    """Writes the page."""
    found, base = result["found"], result["base"]
    arms, curve, grid = found["arms"], list(base["held_out"].values()), len(found["tuning"][BALANCED])
    losses = ", ".join(f"{loss:.3f}" for loss in curve)
    about = (
        f"A Llama of {base['parameters']:,} parameters that has read {base['tokens']:,} tokens of GSM8K "
        f"({base['rows']:,} rows; its held-out loss {losses} as it went on, at one learning rate) trains one epoch further, "
        f"on {arms[BALANCED]['examples']:.0f} rows that it has not seen. Every way has the learning rate that was best of "
        f"{grid} in {found['tuning_seeds']} other seeds, on other held-out rows. Losses are means of {found['seeds']} "
        "seeds, in nats per token; differences are paired by seed, with 95% intervals, bold where they exclude 0; positive "
        "is worse."
    )
    lines = [
        "# Packing over the epoch, with the learning rate tuned",
        "",
        "Does packing the whole epoch cost a model anything, or only the fewer updates that it makes at the same learning "
        "rate?",
        "",
        *textwrap.wrap(about, width=118),
        "",
        "| way | updates | tokens an update (deviation) | learning rate | held-out loss | to balanced |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for arm, row in arms.items():
        tokens = f"{row['tokens'] / row['updates']:,.0f} ({row['deviation']:,.0f})"
        difference = signed(Difference(**row["difference"])) if row["difference"] else ""
        lines.append(
            f"| {arm} | {row['updates']:.0f} | {tokens} | {row['rate']:g} | {row['loss']:.4f} | {difference} |"
        )
    lines += ["", *_words(found, before=curve[-1]), "", "![held-out losses by learning rate](losses.png)", ""]
    lines += ["The grid: mean loss on the rows to tune by, the chosen one bold.", ""]
    rates = list(next(iter(found["tuning"].values())))
    lines += [f"| | {' | '.join(rates)} |", f"|---|{'---:|' * len(rates)}"]
    for arm, tuning in found["tuning"].items():
        chosen = f"{arms[arm]['rate']:g}"
        cells = [f"**{loss:.4f}**" if rate == chosen else f"{loss:.4f}" for rate, loss in tuning.items()]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    lines += limits(
        "The base's learning rate was never lowered, so that part of what every way gains comes from lowering it. One small "
        "model, one kind of text whose lengths have no long tail, one epoch of a few hundred rows, one optimizer with one "
        "schedule, and the learning rate alone tuned: neither beta2 nor warm-up, and on two seeds. All seeds share the base "
        "and the held-out rows, so an interval speaks of other rows to train on, not of other models. Speed is not measured "
        "here. A difference that an interval does not tell from 0 may still be there, within that interval."
    )
    return "\n".join([*lines, *origin_lines(result, "torch", "transformers")])


def _words(found: Mapping[str, Any], before: float) -> list[str]:
    """Says in sentences what the table shows.

    Args:
        before: the held-out loss of the base.
    """
    arms = found["arms"]
    gain = before - arms[BALANCED]["loss"]

    def says(difference: Mapping[str, Any]) -> str:
        one = Difference(**difference)
        share = (
            f"{abs(one.estimate) / gain:.1%} of what `balanced` gained" if gain > 0 else "and `balanced` gained nothing"
        )
        if not one.is_clear:
            return f"can't be told from it: {signed(one)}"
        return f"is {'worse' if one.estimate > 0 else 'better'} by {abs(one.estimate):.4f}, {share}"

    tuned, untuned = (Difference(**arms[arm]["difference"]) for arm in (BFD, UNTUNED))
    lines = [f"- `balanced` lowers the loss of the base by {gain:.4f}, from {before:.4f}."]
    lines.append(
        f"- `bfd` at the learning rate of `balanced`, {arms[BALANCED]['rate']:g}, {says(arms[UNTUNED]['difference'])}."
    )
    lines.append(f"- `bfd` at its own, {arms[BFD]['rate']:g}, {says(arms[BFD]['difference'])}.")
    if arms[BFD]["rate"] == arms[BALANCED]["rate"]:
        lines[-1] = f"- {arms[BFD]['rate']:g} is the best rate of both, so that tuning changes nothing for `bfd`."
    elif untuned.is_clear and untuned.estimate > 0 and not tuned.is_clear:
        lines[-1] += " Tuning closes the gap: it was the rate, as far as these seeds tell."
    elif untuned.estimate > 0 and tuned.is_clear and tuned.estimate > 0:
        lines[-1] += f" Tuning closes {1 - tuned.estimate / untuned.estimate:.0%} of the gap, and leaves the rest."
    lines.append(
        f"- With as many updates as `balanced` and as many tokens in each, `bfd, small packs` "
        f"{says(arms[SMALL]['difference'])}."
    )
    equal = Difference(**found["equal_updates"])
    times = arms[BFD]["tokens"] / arms[SHORT]["tokens"]
    lines.append(
        f"- At equal updates, {arms[BFD]['updates']:.0f}, `bfd` has read {times:.1f} times the tokens of "
        f"`balanced, cut short`; its loss differs by {signed(equal)}."
    )
    if edges := [arm for arm in ARMS if at_edge(found["tuning"][arm], arms[arm]["rate"])]:
        lines.append(f"- At an edge of the grid, so that a better rate may lie beyond: {'; '.join(edges)}.")
    return lines


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Draws the loss of every arm over the learning rates, and the differences to `balanced` with their intervals."""
    if (plt := pyplot()) is None:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    for arm, tuning in found["tuning"].items():
        left.plot([float(rate) for rate in tuning], list(tuning.values()), marker="o", label=arm)
    left.set_xscale("log")
    left.set_xticks([float(rate) for rate in found["tuning"][BALANCED]], list(found["tuning"][BALANCED]))
    left.minorticks_off()
    left.set_xlabel("learning rate")
    left.set_ylabel("loss on the rows to tune by")
    left.legend()
    others = [arm for arm in found["arms"] if arm != BALANCED]
    for place, arm in enumerate(others):
        one = Difference(**found["arms"][arm]["difference"])
        if one.low is not None and one.high is not None:
            right.plot([one.low, one.high], [place, place], color="black")
        right.plot([one.estimate], [place], marker="o", color="black")
    right.axvline(0, color="grey", linestyle=":")
    right.set_yticks(range(len(others)), others)
    right.invert_yaxis()
    right.set_xlabel("held-out loss minus that of balanced")
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="default 5")
    parser.add_argument("--minutes", type=float, default=35, help="after which no run begins any more (default 35)")
    parser.add_argument("--out", type=Path, default=RESULTS / "epoch_packing", help="default results/epoch_packing")
    args = parser.parse_args()
    if why := missing_rows():
        sys.exit(f"error: {why}")
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    gc.freeze()
    ground, kept = prepare_ground(), Kept("epoch_packing")
    if kept.measure("base", lambda: ground.base) != ground.base:
        kept.found = {"base": ground.base}  # runs from another base are no part of this
    found = study(ground, kept, args.seeds, args.minutes)
    if not found["runs"]:
        sys.exit("error: no seed is finished\n    fix: the same command goes on where it stopped")
    result = origin("epoch_packing") | {"base": ground.base, "found": summarise(found), "rates": found["rates"]}
    result |= {"runs": found["runs"], "tuning": found["tuning"]}
    store(args.out, result, markdown(result), depth=3)
    draw(result["found"], args.out / "losses.png")
    if len(found["runs"]) == args.seeds:  # else the same command goes on
        kept.finish()
    print(markdown(result))


if __name__ == "__main__":
    main()
