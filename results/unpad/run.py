"""Shows that `attach` changes nothing but the time of trainers and tasks beyond supervised fine-tuning.

    python results/unpad/run.py                        # all three parts, about twenty minutes on two cores
    python results/unpad/run.py --only equality        # or speed, ranks; the others stay as they are stored
    python results/unpad/run.py --only equality --resume   # the rows that are not stored yet

- equality: trainers of transformers and TRL with tiny models of many architectures, as they are and attached: the loss and
  all gradients of the first update, and the losses of 20; of vision-language models the cosine of the vision tower's
  gradient, too. A control attends across the documents of a flat row.
- speed: the same for larger models, timed in interleaved rounds on ragged texts, with peak memory.
- ranks: two processes over gloo, transformers' own samplers against `attach`, over the same examples.

Writes `results/unpad/bench.json` and `results/unpad/README.md` after every part, and after every row of the first.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import datasets

from packtrain.compare.statistics import Ratio

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, as results/ is not installed
from results.page import RESULTS, limits, origin, origin_lines, store
from results.unpad import equality, ranks, speed

PARTS = ("equality", "speed", "ranks")
NAMES = {
    "llama": "Llama",
    "qwen3": "Qwen3",
    "gemma3_text": "Gemma 3",
    "gpt2": "GPT-2",
    "mixtral": "Mixtral",
    "qwen3_moe": "Qwen3-MoE",
    "bert": "BERT",
    "roberta": "RoBERTa",
    "modernbert": "ModernBERT",
    "distilbert": "DistilBERT",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "llava": "LLaVA",
}


def markdown(result: dict[str, Any]) -> str:
    parts = {"equality": equality_lines, "speed": speed_lines, "ranks": ranks_lines}
    return "\n".join(
        [
            "# Without padding, inside any trainer",
            "",
            "Does `packtrain.attach` keep losses and gradients of trainers that take no flat batches, and how much faster",
            "do they become?",
            *(line for part, lines in parts.items() if part in result for line in lines(result[part])),
            *limits(
                "Random weights, texts and pixels, small models, one distribution of lengths each, and a CPU; the more even "
                "the lengths, the smaller the gain. Dropout is off: its random numbers fall on other tokens once padding is "
                "gone. The heads of question answering take a softmax over padding, too, so their loss depends on it, and "
                "they are refused."
            ),
            *origin_lines(result, "torch", "transformers", "trl"),
        ]
    )


def equality_lines(found: list[dict]) -> list[str]:
    held, refused = [one for one in found if not one["refused"]], [one for one in found if one["refused"]]
    most = {name: max(one[name] for one in held) for name in ("loss", "gradient", "curve")}
    least = min(one["leaking"] for one in held)
    tasks, families = {one["trainer"] for one in held}, {one["family"] for one in held}
    lines = [
        "",
        "## The same updates",
        "",
        f"{len(held)} pairs of {len(tasks)} trainers and tasks with {len(families)} architectures (tiny, float32):",
        f"in the first update losses differ by at most {most['loss']:.0e} and gradients by {most['gradient']:.0e}, the",
        f"losses of {equality.UPDATES} updates by {most['curve']:.0e}, relative to the trainer untouched. With attention",
        f"that does not tell documents apart, the control, gradients differ by at least {least:.0e}.",
        "",
        "| trainer and task | architecture | way | first loss | gradients | losses of 20 | margins | accuracies | control |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in held:
        figures = [one[name] for name in ("loss", "gradient", "curve", "margins", "accuracies", "leaking")]
        shown = ["" if figure is None else f"{figure:.0e}" for figure in figures]
        lines.append(f"| {' | '.join([one['trainer'], NAMES[one['family']], one['way'], *shown])} |")
    lines += [
        "",
        "Margins and accuracies are those that preference trainers log, and differ in their own unit; all else relatively.",
        "Losses of trainers that sample are around 0, and relative to the largest of 20.",
    ]
    pictured = [one for one in held if one["vision"] is not None]
    if pictured:
        cosines = ", ".join(
            f"{NAMES[one['family']]} {one['vision']:.9f} ({one['leaking_vision']:.3f})" for one in pictured
        )
        lines += ["", f"Cosine of the vision tower's gradient in the first update (and of the control): {cosines}."]
    for trainer in dict.fromkeys(one["trainer"] for one in refused):
        names = [NAMES[one["family"]] for one in refused if one["trainer"] == trainer]
        why = next(one["refused"] for one in refused if one["trainer"] == trainer).rpartition("either (")[2]
        lines += ["", f"Refused: {trainer} ({', '.join(names)}).", f"The first says why: {why.rstrip(')')}."]
    return lines


def speed_lines(found: list[dict]) -> list[str]:
    rounds = " or ".join(sorted({str(len(one["seconds"]["untouched"])) for one in found}))
    lines = [
        "",
        "## Faster",
        "",
        f"Small batches of ragged texts in float32; {rounds} interleaved rounds of {speed.UPDATES - 1} timed",
        "updates: medians, and ratios of whole rounds with their 95% intervals. Memory is the growth of the resident set",
        "while training, each in a process of its own; `attach` itself computes two padded batches before. Rows (of an",
        "update) of preference trainers are pairs.",
        "",
        "| trainer | weights | rows | padding | seconds per update | attached | faster | peak memory | losses differ |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        memory = " -> ".join(f"{size / 2**20:,.0f}" for size in one["peak"].values())
        cells = [one["trainer"], f"{one['parameters'] / 1e6:.1f}M", str(one["per_device"]), f"{one['padding']:.0%}"]
        cells += [f"{seconds:.2f}" for seconds in one["per_update"].values()]
        cells += [f"**{Ratio(**one['faster']).text()}**", f"{memory} MiB" if memory else ""]
        cells.append(f"{one['largest_relative_loss_difference']:.0e}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def ranks_lines(found: dict) -> list[str]:
    rounds = len(found["seconds"]["random"])
    lines = [
        "",
        "## Two ranks",
        "",
        f"Two processes over gloo, one thread each: transformers' Trainer with a Llama, {ranks.PER_DEVICE} x",
        f"{ranks.ACCUMULATION} examples per rank and update, one epoch of {found['examples']} lognormal examples with",
        f"{found['tokens']:,} tokens; {rounds} interleaved rounds, 95% intervals. `group_by_length` makes other updates.",
        "",
        "| order | seconds, median | range | as fast as `random` | attached is faster | held-out loss |",
        "|---|---|---|---|---|---|",
    ]
    for way, times in found["seconds"].items():
        name = "`attach`, balanced" if way == "attached" else f"`{way}`"
        ours = "" if way == "attached" else f"**{Ratio(**found['ours'][way]).text()}**"
        first = "" if way == "random" else Ratio(**found["faster"][way]).text()
        cells = [name, f"{found['medians'][way]:.1f}", f"{min(times):.1f}-{max(times):.1f}", first, ours]
        cells.append(f"{found['held_out'][way]:.4f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=PARTS, help="one part (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds of speed and ranks (default 5)")
    parser.add_argument("--trainer", choices=speed.CASES, help="one row of speed; the others stay as they are stored")
    parser.add_argument("--resume", action="store_true", help="keep the rows of equality that are stored")
    parser.add_argument("--out", type=Path, default=RESULTS / "unpad", help="default results/unpad")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    datasets.disable_progress_bars()
    stored = arguments.out / "bench.json"
    result = json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else {}
    result |= origin("unpad") | {"command": "python results/unpad/run.py"}

    def keep(part: str, found: Any) -> None:
        result[part] = found
        store(arguments.out, result, markdown(result))

    if arguments.only in (None, "ranks"):
        keep("ranks", ranks.compare(arguments.rounds))
    if arguments.only in (None, "speed"):
        done = {one["trainer"]: one for one in result.get("speed", [])}
        for name in [arguments.trainer] if arguments.trainer else speed.CASES:
            done[name] = speed.compare(name, arguments.rounds) | {"peak": speed.peaks(name)}
            keep("speed", list(done.values()))
    if arguments.only in (None, "equality"):
        done = result.get("equality", []) if arguments.resume else []
        equality.examine_all(lambda found: keep("equality", found), done)
    print(markdown(result))


if __name__ == "__main__":
    main()
