"""What the arms of the study of a real model come to, and its page."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from packtrain.compare.statistics import (
    Difference,
    Ratio,
    largest_relative_difference,
    paired_difference,
    paired_ratio,
)
from packtrain.modeling.audit.report import ISOLATED
from packtrain.objectives.masked_diffusion.pictures import pyplot
from results.page import limits, origin_lines, signed
from results.real_claims.arms import (
    ANSWERS,
    BASE,
    COST,
    GRID_RATES,
    GRID_SEEDS,
    GRID_WAYS,
    HELD_OUT,
    PROOF,
    PROOF_ROWS,
    PROOFS,
    RATES,
    RATES_HELD_OUT,
    SAME_UPDATES,
    TUNINGS,
    WAYS,
    Arm,
)
from results.real_claims.proofs import IMPLEMENTATIONS, LAYOUTS, MODES

Runs = Mapping[str, Mapping[str, Any]]


def summarise(runs: Runs) -> dict[str, Any]:
    """Turns the arms that have run into the figures of the page; every part may lack some.

    Args:
        runs: name of an arm -> its result.
    """
    cost = {tuning: cost_of_ways(runs, tuning) for tuning in TUNINGS}
    answers = {tuning: runs.get(Arm(part=ANSWERS, tuning=tuning).name) for tuning in (BASE, *TUNINGS)}
    return {
        "cost": {tuning: rows for tuning, rows in cost.items() if rows},
        "answers": {tuning: found for tuning, found in answers.items() if found},
        "rates": compare_rates(runs),
        "proof": {way: runs[name] for way in PROOFS if (name := Arm(part=PROOF, tuning=BASE, way=way).name) in runs},
    }


def cost_of_ways(runs: Runs, tuning: str) -> dict[str, dict[str, Any]]:
    """Computes speed, memory and losses of the ways of one tuning; the first update of every run is left out of the speed.

    Ways with the same updates as `pad_longest` are compared with it update by update: the seconds as a paired ratio, the
    losses as the largest relative difference.
    """
    found = {way: runs.get(Arm(part=COST, tuning=tuning, way=way).name) for way in WAYS}
    rows: dict[str, dict[str, Any]] = {}
    reference = found[WAYS[0]]
    for way, run in found.items():
        if run is None:
            continue
        updates = run["updates"]
        timed = updates[1:] or updates
        real, computed = (sum(update[name] for update in updates) for name in ("real_tokens", "computed_tokens"))
        rows[way] = {
            "updates": len(updates), "real_tokens": real, "padding": 1 - real / computed, "held_out": run["held_out"],
            "tokens_per_second": sum(u["real_tokens"] for u in timed) / sum(u["seconds"] for u in timed),
            "peak_memory": run["peak_memory"], "dropped": run["dropped"], "trained": run["trained"],
            "first_loss": updates[0]["loss"], "last_loss": updates[-1]["loss"], "attention": run["attention"],
        }  # fmt: skip
        if reference is not None and way in SAME_UPDATES and way != WAYS[0]:
            theirs = reference["updates"]
            assert [u["real_tokens"] for u in updates] == [u["real_tokens"] for u in theirs], (
                f"{way} makes other updates"
            )
            others = theirs[1:] or theirs
            rows[way]["faster"] = asdict(paired_ratio([u["seconds"] for u in others], [u["seconds"] for u in timed]))
            rows[way]["loss_differs"] = largest_relative_difference(
                [u["loss"] for u in updates], [u["loss"] for u in theirs]
            )
    return rows


def compare_rates(runs: Runs) -> dict[str, Any] | None:
    """Compares `bfd` with `balanced` over the grid of learning rates, on the seeds for which all arms have run.

    Every way gets its best rate by the mean of the other seeds, seed by seed, so that no seed chooses its own rate.

    Returns:
        means: way -> rate -> mean held-out loss; at_rate: rate -> difference of bfd to balanced; tuned: the difference at
        rates chosen by the other seeds, None for a single seed; None where no seed has finished.
    """

    def name(way: str, rate: float, seed: int) -> str:
        return Arm(part=RATES, tuning="lora", way=way, rate=rate, seed=seed).name

    seeds = [s for s in GRID_SEEDS if all(name(way, rate, s) in runs for way in GRID_WAYS for rate in GRID_RATES)]
    if not seeds:
        return None
    losses = {
        way: np.array([[runs[name(way, rate, seed)]["held_out"] for rate in GRID_RATES] for seed in seeds])
        for way in GRID_WAYS
    }  # [seeds, rates]
    tuned = None
    if len(seeds) > 1:
        sides = [leave_one_out(losses[way]) for way in ("bfd", "balanced")]
        tuned = asdict(paired_difference(*sides))
    updates = {
        way: float(np.mean([len(runs[name(way, GRID_RATES[0], s)]["updates"]) for s in seeds])) for way in GRID_WAYS
    }
    return {
        "seeds": len(seeds), "updates": updates, "tuned": tuned,
        "means": {way: {f"{rate:g}": float(losses[way][:, place].mean()) for place, rate in enumerate(GRID_RATES)}
                  for way in GRID_WAYS},
        "at_rate": {f"{rate:g}": asdict(paired_difference(*(losses[way][:, place].tolist() for way in ("bfd", "balanced"))))
                    for place, rate in enumerate(GRID_RATES)},
    }  # fmt: skip


def leave_one_out(losses: np.ndarray) -> list[float]:
    """Returns each seed's loss at the rate that has the lowest mean over the other seeds.

    Args:
        losses: float `[seeds, rates]`.

    >>> leave_one_out(np.array([[1.0, 2.0], [1.0, 3.0], [5.0, 0.0]]))
    [2.0, 3.0, 5.0]
    """
    chosen = [int(np.delete(losses, seed, axis=0).mean(axis=0).argmin()) for seed in range(len(losses))]
    return [float(losses[seed, place]) for seed, place in enumerate(chosen)]


# ------------------------------------------------------------------------------------------------- the page


def markdown(result: Mapping[str, Any]) -> str:
    """Writes the page."""
    found = result["found"]
    lines = [
        "# A real model, real claims",
        "",
        "What do padding and packing cost a real model in speed, memory and losses, does it learn anything, and does",
        "packing over the epoch learn less once the learning rate is tuned?",
        "",
        f"SmolLM2-135M-Instruct in float32 on GSM8K, chats whose answers are supervised; held-out losses and answers on "
        f"{HELD_OUT} rows.",
    ]
    missing = [name for name in result["arms"] if name not in result["runs"]]
    if missing:
        lines += [
            "",
            f"**Not run yet: {len(missing)} of {len(result['arms'])} arms** ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}); the command below goes on with them.",
        ]
    for tuning, rows in found["cost"].items():
        lines += _cost(tuning, rows)
    if found["answers"]:
        lines += _answers(found["answers"])
    if found["proof"]:
        lines += _proofs(found["proof"])
    if found["rates"]:
        lines += _rates(found["rates"], result["grid_tokens"])
    minutes = {part: sum(run.get("minutes", 0.0) for name, run in result["runs"].items() if name.startswith(part))
               for part in (COST, ANSWERS, PROOF, RATES)}  # fmt: skip
    took = ", ".join(f"{spent:.0f} in `{part}`" for part, spent in minutes.items() if spent)
    lines += ["", f"Minutes that the arms took, one after another or two at a time: {took}."] if took else []
    lines += limits(
        "One small model whose weights are those of a four-bit file, read into float32, on a few hundred rows and "
        "a CPU; one run of each way of `cost`, one after the other, with light work of other processes next to it, "
        "so that intervals of speed are those over updates and not over runs. A few thousand tokens of answers "
        f"teach no arithmetic: right answers among {HELD_OUT} tell of large effects alone. Losses of ways that make "
        "other updates are not compared at an equal rate in `cost`; `rates` does that, with few updates and at one "
        "size of pack."
    )
    return "\n".join([*lines, *origin_lines(result, "torch", "transformers", "trl", "peft")])


def _cost(tuning: str, rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    some = next(iter(rows.values()))
    title = {"lora": "LoRA on the attention", "full": "All weights"}[tuning]
    lines = [
        "",
        f"## {title}: {some['trained'] / 1e6:.1f}M trained parameters, {some['real_tokens']:,} tokens",
        "",
        "| way | updates | padding | real tokens/s | to pad_longest | losses differ by | held-out loss | peak memory |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for way, row in rows.items():
        faster = Ratio(**row["faster"]).text() if "faster" in row else ""
        differs = f"{row['loss_differs']:.0e}" if "loss_differs" in row else ""
        lines.append(
            f"| {way} | {row['updates']} | {row['padding']:.1%} | {row['tokens_per_second']:.0f} | {faster} | {differs} "
            f"| {row['held_out']:.4f} | {row['peak_memory'] / 2**30:.2f} GiB |"
        )
    if dropped := {way: row["dropped"] for way, row in rows.items() if row["dropped"]}:
        lines += ["", "Tokens dropped: " + ", ".join(f"{way} {count:,}" for way, count in dropped.items()) + "."]
    return lines


def _answers(answers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    names = {BASE: "before", "lora": "after LoRA, balanced", "full": "after all weights, balanced"}
    lines = [
        "",
        "## Answers",
        "",
        f"The first {next(iter(answers.values()))['prompts']} held-out questions, likeliest token by token. Right by the "
        "number behind `####`, and by",
        "that or else the last number, as a chat model that was not trained on GSM8K does not always write `####`:",
        "",
        "| model | right by `####` | right by the last number | ended by themselves | tokens |",
        "|---|---:|---:|---:|---:|",
    ]
    for tuning, row in answers.items():
        counts = ((row["score"], row["low"], row["high"]), (row["last_number"], *row["last_number_interval"]))
        cells = [f"{share * row['prompts']:.0f} ({low:.0%} to {high:.0%})" for share, low, high in counts]
        cells += [f"{row['ended']:.0%}", f"{row['tokens']:.0f}"]
        lines.append(f"| {names[tuning]} | {' | '.join(cells)} |")
    if (base := answers.get(BASE)) and "held_out" in base:
        lines += ["", f"The held-out loss of the base is {base['held_out']:.4f}."]
    return lines


def _proofs(proof: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = ["", "## Proofs on these weights"]
    if found := proof.get("audit"):
        about = (
            "`packtrain.audit`: the largest difference of a document's logits to those of the document alone, flat; and "
            "with an attention mask of ones, as tokenizers add it, for which transformers sees one document: a leak that "
            "the audit has to find."
        )
        lines += [
            "",
            *textwrap.wrap(about, width=118),
            "",
            f"| | {' | '.join(f'{layout}, {mode}' for layout in LAYOUTS for mode in MODES)} |",
            f"|---|{'---:|' * len(LAYOUTS) * len(MODES)}",
        ]
        cells = {(one["implementation"], one["layout"], one["mode"]): _verdict_of(one) for one in found["findings"]}
        for name in IMPLEMENTATIONS:
            row = [cells.get((name, layout, mode), "") for layout in LAYOUTS for mode in MODES]
            lines.append(f"| {name} | {' | '.join(row)} |")
    if found := proof.get("unpad"):
        about = (
            f"`packtrain.unpad`, {PROOF_ROWS} rows, {found['tokens']:,} tokens and {found['padding']:.0%} padding: the loss "
            f"is {found['loss_unpadded']:.6f}, padded {found['loss']:.6f}; the gradients of all parameters differ by at "
            f"most {found['differs']:.0e} (relative). Control: the same documents end to end, with attention between them, "
            f"have a loss of {found['loss_leaking']:.6f} and gradients that differ by up to {found['leaking']:.0e}."
        )
        lines += ["", *textwrap.wrap(about, width=118)]
    return lines


def _verdict_of(finding: Mapping[str, Any]) -> str:
    if finding["verdict"] == ISOLATED:
        return f"{max(finding['difference'] or 0.0, finding['leak'] or 0.0):.0e} of {finding['scale']:.0f}"
    return f"{finding['verdict']}" + (f" {finding['leak']:.2g}" if finding["leak"] else "")


def _rates(rates: Mapping[str, Any], tokens: int) -> list[str]:
    updates = " and ".join(f"{count:.0f} by `{way}`" for way, count in rates["updates"].items())
    lines = [
        "",
        "## Packing over the epoch, by learning rate",
        "",
        f"LoRA, about {tokens:,} tokens, updates: {updates}; {rates['seeds']} seeds, each with rows of its own. Losses on "
        f"{RATES_HELD_OUT} held-out rows,",
        "and the difference paired by seed with its 95% interval, bold where it excludes 0; positive is worse for `bfd`:",
        "",
        f"| learning rate | {' | '.join(rates['means'])} | difference |",
        f"|---:|{'---:|' * len(rates['means'])}---:|",
    ]
    for rate, difference in rates["at_rate"].items():
        cells = " | ".join(f"{of_way[rate]:.4f}" for of_way in rates["means"].values())
        lines.append(f"| {rate} | {cells} | {signed(Difference(**difference))} |")
    if rates["tuned"] is not None:
        tuned = Difference(**rates["tuned"])
        lines += [
            "",
            f"With each way's rate chosen by the other seeds `bfd` differs by {signed(tuned)}: {_verdict(tuned)}.",
        ]
    edges = [
        way
        for way, means in rates["means"].items()
        if min(means, key=means.__getitem__) in (list(means)[0], list(means)[-1])
    ]
    if edges:
        lines.append(
            f"The best rate is at an edge of the grid, so that a better one may lie beyond: {', '.join(edges)}."
        )
    about = (
        "For comparison, Mistral-7B on FLAN, eight A100, one learning rate (Kundu et al. 2024, arXiv 2407.09105): "
        "validation losses of 1.129 padded, 1.127 padding-free and 1.284 packed over the epoch, at 742, 1,408 and 3,010 "
        "tokens/s."
    )
    lines += ["", *textwrap.wrap(about, width=118)]
    return [*lines, "", "![held-out losses by learning rate](rates.png)"]


def _verdict(tuned: Difference) -> str:
    if not tuned.is_clear:
        return "these seeds can't tell the two apart"
    return "tuning does not close the gap" if tuned.estimate > 0 else "it learns more"


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Draws the mean held-out losses over the learning rates, once there are any."""
    if not found["rates"] or (plt := pyplot()) is None:
        return
    figure, axis = plt.subplots(figsize=(5.2, 3.4))
    for way, means in found["rates"]["means"].items():
        axis.plot([float(rate) for rate in means], list(means.values()), marker="o", label=way)
    axis.set_xscale("log")
    axis.set_xticks(GRID_RATES, [f"{rate:g}" for rate in GRID_RATES])
    axis.minorticks_off()
    axis.set_xlabel("learning rate")
    axis.set_ylabel("held-out loss")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
