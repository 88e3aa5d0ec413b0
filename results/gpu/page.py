"""Writes the page of the study: what was measured, on which device, what a part may cost, and how to run it elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from packtrain.training.summary import name_machine
from results.gpu.parts import IBM, LOGIT_WAYS, PAPER, PARTS, SHAPES, UPSTREAM, WAYS, weights_part
from results.gpu.schedule import FINISHED
from results.page import limits

MINUTES = 8
Outcomes = Mapping[str, Mapping[str, Any]]
GIB = 2**30


def markdown(record: Mapping[str, Any]) -> str:
    """Write the page of all devices in the record; without any, it says that nothing was measured."""
    devices = record["devices"]
    rehearsed = [name for name in devices if name.startswith("cpu")]
    lines = [
        "# On a GPU",
        "",
        "Do the kernels that CUDA has compute attention exactly, do layouts stay equal in bfloat16, and how fast are they",
        "on models that people train?",
        "",
        f"    python results/gpu/run.py --minutes {MINUTES}",
        "",
    ]
    if not devices:
        lines += [
            "**Nothing was measured on a GPU yet.** No machine with one was at hand when this was written; this page has",
            "no figures. What is known without one: every part runs to its end at tiny shapes on a CPU (`--cpu-rehearsal`),",
            "and CUDA's branches of attention were traced without a device, their calls checked against the signatures of",
            "torch 2.11 and 2.13 and of flash-attn 2.8 (`tests/modeling/attention/test_signatures.py`).",
            "",
        ]
    for name in rehearsed:
        lines += [f"**{name}: a rehearsal at tiny shapes. Its figures say nothing about speed.**", ""]
    for name, device in devices.items():
        lines += _device(name, device)
    lines += _costs(devices) + _elsewhere()
    lines += limits(
        "Random weights and tokens: losses are there to be compared with each other. One round per part, on one card, so "
        "that there are no intervals; the device's clock and temperature are not controlled. Other trainers run with the "
        "attention that is installed: without flash-attn TRL's flat layouts take sdpa and its block mask."
    )
    return "\n".join([*lines, ""])


# ---------------------------------------------------------------------------------------------------- one device


def _device(name: str, device: Mapping[str, Any]) -> list[str]:
    parts = device["parts"]
    packages = device["packages"]
    versions = ", ".join(
        f"{each} {packages[each]}" for each in ("torch", "cuda", "transformers", "trl") if each in packages
    )
    lines = [f"## {name}", "", f"{name_machine(device['machine'], device['threads'])}; {versions}.", ""]
    lines += [f"    {command}" for command in dict.fromkeys(device["commands"])] + [""]
    lines += _kernels(parts) + _equivalence(parts)
    for shape in SHAPES:
        names = IBM if shape == "Mistral-7B" else WAYS
        prefix = "Mistral-7B LoRA" if shape == "Mistral-7B" else shape
        found = {way: parts[f"{prefix} {way}"]["found"] for way in names if f"{prefix} {way}" in parts}
        lines += _speeds(prefix, {way: one for way, one in found.items() if one.get("real_tokens_per_second")})
    lines += _logits(parts)
    failed = {name: part for name, part in parts.items() if part["status"] != FINISHED}
    if failed:
        lines += ["| not finished | | after | reason |", "|---|---|---:|---|"]
        for name, part in failed.items():
            lines.append(f"| {name} | {part['status']} | {part['seconds']:.0f} s | {_cell(part['reason'])} |")
        lines.append("")
    return lines


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|")


def _kernels(parts: Outcomes) -> list[str]:
    found = parts.get("attention kernels", {}).get("found")
    if not found or not found["errors"]:
        return []
    chosen = ", ".join(f"{name} {count}x" for name, count in found["chosen"].items())
    lines = [
        f"Attention over documents next to float64, outputs and gradients, {found['cases']} cases (chosen: {chosen}):",
        "",
        "| kernel, dtype | largest relative error | allowed | in the case |",
        "|---|---:|---:|---|",
    ]
    for name, row in found["errors"].items():
        lines.append(f"| {name} | {row['worst']:.1e} | {row['tolerance']:.0e} | {row['case']} |")
    if found["control"] is not None:
        lines.append(f"| control: documents attend to each other | {found['control']:.1e} | | |")
    return [*lines, ""]


def _equivalence(parts: Outcomes) -> list[str]:
    found = parts.get("equivalence in bf16", {}).get("found") or {}
    lines: list[str] = []
    if found.get("ways"):
        lines += [
            f"One step of Qwen2.5-0.5B on {found['documents']} documents, {found['tokens']:,} tokens, in bfloat16, next to",
            "the padded batch in float32. The gradient counts in multiples of what bfloat16 does to the padded batch:",
            "",
            "| layout | loss differs by | gradient differs by | times rounding |",
            "|---|---:|---:|---:|",
        ]
        for name, row in found["ways"].items():
            times = f"{row['times rounding']:.2f}" if "times rounding" in row else ""
            lines.append(f"| {name} | {row['loss differs by']:.1e} | {row['gradient differs by']:.1e} | {times} |")
        lines.append("")
    found = parts.get("unpad", {}).get("found")
    if found:
        lines += [
            f"`packtrain.unpad` on a padded batch ({found['padding']:.0%} padding): {found['faster']:.2f}x as fast, losses "
            f"differ by {found['loss differs by']:.1e}.",
            "",
        ]
    return lines


def _speeds(name: str, found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    if not found:
        return []
    reference = found.get("pad_longest") or found.get("padding")
    lines = [f"### {name}", ""]
    if name == "Qwen2.5-0.5B":
        rates = ", ".join(f"{way} {rate:,}" for way, rate in UPSTREAM.items())
        lines += [f"For comparison, real tokens/s upstream on these lengths, on 2x RTX 5090: {rates}.", ""]
    if "LoRA" in name:
        rates = ", ".join(f"{row} {rate:,}" for row, rate in PAPER.items())
        lines += [f"For comparison, tokens/s in the paper, on 8 A100: {rates}.", ""]
    lines += [
        "| way | real tokens/s | to padding | MFU | peak memory | padding | s per update (p90) | % of it in data, forward, "
        "backward, optimizer | loss, first and last | from padding | attention |",
        "|---|---:|---:|---:|---:|---:|---:|---|---|---:|---|",
    ]
    for way, one in found.items():
        times = f"{one['real_tokens_per_second'] / reference['real_tokens_per_second']:.2f}x" if reference else ""
        mfu = "" if one["mfu"] is None else f"{one['mfu']:.1%}"
        memory = "" if one["peak_memory"] is None else f"{one['peak_memory'] / GIB:.1f} GiB"
        losses, shares = one["losses"], ", ".join(f"{100 * share:.0f}" for share in one["shares"].values())
        lines.append(
            f"| {way} | {one['real_tokens_per_second']:,.0f} | {times} | {mfu} | {memory} | {one['padding']:.1%} "
            f"| {one['seconds_median']:.3f} ({one['seconds_p90']:.3f}) | {shares} | {losses[0]:.4f}, {losses[-1]:.4f} "
            f"| {_apart(way, losses, reference)} | {one['attention'] or ''} |"
        )
    others = "`dense`: rows of equal length without padding, the speed that is to be had. "
    return [
        *lines,
        "",
        ("" if "LoRA" in name else others) + "From padding: the largest relative difference of an update's loss, where "
        "updates see the same examples.",
        "",
    ]


SAME_UPDATES = ("balanced", "balanced, compiled", "trl:padding_free", "trl:padding", "batch_rebalance", "padding-free")


def _apart(way: str, losses: list[float], reference: Mapping[str, Any] | None) -> str:
    if reference is None or way not in SAME_UPDATES or len(losses) != len(reference["losses"]):
        return ""
    return f"{max(abs(one / other - 1) for one, other in zip(losses, reference['losses'], strict=True)):.1e}"


def _logits(parts: Outcomes) -> list[str]:
    found = {name: parts.get(f"128k vocabulary {name}", {}).get("found") for name in LOGIT_WAYS}
    found = {name: one for name, one in found.items() if one}
    if not found:
        return []
    tokens = next(iter(found.values()))["tokens"]
    lines = [
        f"### A vocabulary of 128,256, {tokens:,} supervised tokens per update",
        "",
        "| way | peak memory | s per update | loss, first and last |",
        "|---|---:|---:|---|",
    ]
    for name, one in found.items():
        losses = one["losses"]
        shown = f"{losses[0]:.4f}, {losses[-1]:.4f}"
        lines.append(f"| {name} | {one['peak_memory'] / GIB:.2f} GiB | {one['seconds_median']:.3f} | {shown} |")
    return [*lines, ""]


# --------------------------------------------------------------------------------------- costs, and how to run it


def _costs(devices: Mapping[str, Any]) -> list[str]:
    total = sum(part.seconds for part in PARTS)
    lines = [
        "## What a part may cost",
        "",
        "In order of worth. A part runs in its own process and is cut off after these seconds; one that fails, hangs or",
        "runs out of memory is a line above, and the next begins. With less than half of its share left a part is",
        "skipped, and a second call goes on with what is missing, then with what failed. All shares add up to "
        f"{total:,.0f} s:",
        "budgets, not measurements.",
        "",
        "| part | seconds at most |" + "".join(f" {name} |" for name in devices),
        "|---|---:|" + "---|" * len(devices),
    ]
    for part in PARTS:
        cells = [device["parts"].get(part.name) for device in devices.values()]
        shown = "".join(f" {one['status']}, {one['seconds']:.0f} s |" if one else " |" for one in cells)
        lines.append(f"| {part.name} | {part.seconds:.0f} |{shown}")
    makers = "; ".join(f"{shape} {weights_part(shape).seconds:.0f}" for shape in SHAPES)
    before = f"Before the first part of a shape its random weights are made, in at most so many seconds: {makers}."
    return [*lines, "", before, ""]


def _elsewhere() -> list[str]:
    return [
        "## How to run it",
        "",
        "One card (Ampere or newer; 80 GB for all parts), a checkout, no network:",
        "",
        "```bash",
        f"python results/gpu/run.py --minutes {MINUTES}                 # again: continues with the missing parts",
        f"python results/gpu/run.py --minutes {MINUTES} --wheels wheels # installs what is missing from a folder of wheels",
        "python results/gpu/run.py --only 'attention kernels' 'Qwen2.5-0.5B balanced'",
        "python results/gpu/run.py --cpu-rehearsal             # tiny shapes on a CPU, into out/gpu",
        "```",
        "",
        "It needs torch 2.11 or newer for CUDA, transformers 5.17, accelerate and peft. Where there is no network, what",
        "else packtrain needs is fetched for the target's Python elsewhere and carried along, for example:",
        "",
        "```bash",
        "pip download -c launch/constraints.txt --no-deps --only-binary=:all: --python-version 3.12 -d wheels \\",
        "  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \\",
        "  pydantic pydantic-core annotated-types typing-inspection datasets dill multiprocess trl",
        "```",
        "",
        "Weights and rows are drawn on the spot, 18 GiB in a temporary folder that is removed at the end; `--scratch DIR`",
        "keeps them. Results go to `bench.json` and this page (`--out DIR`), device by device.",
        "",
        "Several rounds of one shape, with intervals: `packtrain compare recipes/compare/gpu_sft.yaml --out out/gpu_sft`.",
        "",
        "Eight cards: equal losses of DDP, ZeRO-1 to 3 and FSDP2 next to one process, then real tokens per second of each",
        "engine, padded and flat, in the summary that a run prints:",
        "",
        "```bash",
        "python results/zero/run.py losses --ranks 8 --out out/zero",
        "for engine in ddp zero2 zero3 fsdp2; do",
        "  for strategy in pad_longest balanced; do",
        "    packtrain train results/gpu/ranks.yaml --launch $engine --set batching.strategy=$strategy \\",
        "      --set training.output_dir=out/ranks/$engine-$strategy",
        "  done",
        "done",
        "```",
        "",
        "The same by `torchrun`, here with ZeRO-2; without the last option it is DDP:",
        "",
        "```bash",
        "torchrun --standalone --nproc_per_node 8 -m packtrain train results/gpu/ranks.yaml \\",
        "  --set training.output_dir=out/ranks/torchrun --set deepspeed=launch/deepspeed/zero2.json",
        "```",
        "",
        "Tests that need a device: `pytest -m gpu`.",
    ]
