"""Packers side by side: time, packs, gap to the bound, balance of the ranks; and the data path against its peers.

    python -m packtrain.experiments.bench_packing                       # writes results/packing/; a few minutes
    python -m packtrain.experiments.bench_packing --only sft_100k --only data_path

All packers get the same lengths, in one process on one core, the best of a few repeats. A peer that isn't installed is left
out. Balance is that of updates of eight packs per rank under the cost model of a 7B Llama, over the epoch's shuffle of
packs; `balanced` draws its updates from the shuffle of examples. TRL's packer is given a table of tokens, as it takes no
lengths; making the table isn't timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from packtrain.packing.bounds import lower_bound
from packtrain.packing.cost import Cost
from packtrain.packing.efficiency import describe
from packtrain.packing.lengths import histogram
from packtrain.packing.optimal import near_optimal
from packtrain.packing.plan import make_plan
from packtrain.packing.strategies import STRATEGIES

LLAMA_7B = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
OURS = ("bfd", "ffd", "optimal", "next_fit")
SMALL = 200_000  # examples up to which loops over every example take part
COMMAND = "python -m packtrain.experiments.bench_packing"


def data_sets() -> dict[str, tuple[Callable[[], np.ndarray], int]]:
    """Name -> (lengths, capacity)."""

    def lognormal(mean, sigma, number, longest):
        return lambda: np.clip(np.random.default_rng(0).lognormal(mean, sigma, number), 10, longest).astype(np.int32)

    def uniform(low, high):
        return lambda: np.random.default_rng(0).integers(int(low * 2048), int(high * 2048) + 1, 100_000, dtype=np.int32)

    return {
        "sft_100k": (lognormal(5.5, 0.9, 100_000, 2048), 2048),
        "sft_1m": (lognormal(5.5, 0.9, 1_000_000, 2048), 2048),
        "long_1m": (lognormal(7.0, 1.5, 1_000_000, 32_768), 32_768),
        "uniform_15_55": (uniform(0.15, 0.55), 2048),
        "uniform_26_50": (uniform(0.26, 0.5), 2048),
    }


def bench_packers(name: str, lengths: np.ndarray, capacity: int) -> list[dict]:
    """One row per packer: seconds, packs, gap to the best bound known."""
    counts = histogram(lengths)
    bound = max(lower_bound(counts, capacity), near_optimal(counts, capacity)[1])
    packers = {f"packtrain {own}": lambda own=own: STRATEGIES[own].function(lengths, capacity, 0) for own in OURS}
    packers |= _peers(lengths, capacity)
    rows = []
    for packer, pack in packers.items():
        repeats = 1 if packer in ("TRL bfd", "packtrain optimal") else 3
        seconds, packs = min((_timed(pack) for _ in range(repeats)), key=lambda pair: pair[0])
        row = {"data": name, "packer": packer, "seconds": seconds, "packs": len(packs), "gap": len(packs) / bound - 1}
        rows.append(row)
    return rows


def bench_balance(name: str, lengths: np.ndarray, capacity: int) -> list[dict]:
    """One row per strategy and number of ranks: balance in tokens, attention and modelled time, and the updates' mix."""
    lengths, rows = lengths[:SMALL], []
    per_pack = 0.8 * capacity / lengths.mean()  # micro-batches four fifths full leave room to be level
    for ranks in (8, 64):
        for strategy in ("padding_free", "balanced", "next_fit", "bfd", "optimal", "global_balance"):
            size = {"examples_per_step": max(1, int(per_pack * ranks * 8))}
            if STRATEGIES[strategy].scope == "epoch":
                size = {"tokens_per_step": capacity * ranks * 8}
            plan = {cost: make_plan(lengths, strategy=strategy, max_tokens=capacity, world_size=ranks, cost=cost, **size)
                    for cost in (Cost.of_config(LLAMA_7B), Cost(linear=1e-9, quadratic=1.0))}  # fmt: skip
            whole, attention = (describe(one, sampled_steps=20) for one in plan.values())
            rows.append({
                "data": name, "strategy": strategy, "ranks": ranks, "accumulation": whole.gradient_accumulation_steps,
                "tokens": whole.token_balance, "attention": attention.balance, "efficiency": whole.balance,
                "efficiency_ddp": whole.rank_balance, "examples_per_update": whole.examples_per_update,
                "spread": whole.mean_length_spread, "dropped": whole.tokens_dropped,
            })  # fmt: skip
    return rows


def bench_data_path() -> dict:
    """Interleaved: 106 documents of ~150 tokens by `gather` + our collator, and row by row + transformers' collator;
    then a plan of 100k rows against `trl.pack_dataset`."""
    import datasets
    import trl
    from transformers import DataCollatorWithFlattening

    from packtrain.data.examples import Examples
    from packtrain.packing.collator import PackCollator

    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.8, 0.6, 100_000), 10, 2048).astype(np.int32)
    rows = [rng.integers(0, 32_000, length).tolist() for length in lengths]
    table = datasets.Dataset.from_dict({"input_ids": rows, "labels": rows})
    examples, ours, theirs = Examples.from_dataset(table), PackCollator(), DataCollatorWithFlattening()
    ids = rng.choice(len(table), size=(40, 106), replace=False)

    def fetch(own):
        input_ids, labels = examples.gather(own)
        return ours.collate(input_ids, labels, examples.lengths[own].astype(np.int64), own, examples.supervised[own])

    seconds = {"ours": [], "theirs": []}
    for own in ids:
        seconds["ours"].append(_timed(lambda own=own: fetch(own))[0])
        seconds["theirs"].append(_timed(lambda own=own: theirs([table[int(i)] for i in own]))[0])
    ours_us, theirs_us = (float(np.median(seconds[who]) * 1e6) for who in ("ours", "theirs"))
    plan = min(_timed(lambda: make_plan(lengths, strategy="bfd", max_tokens=2048))[0] for _ in range(3))
    packed, _ = _timed(lambda: trl.pack_dataset(table.select_columns(["input_ids"]), 2048, "bfd"))
    return {
        "fetch_us": ours_us, "flattening_us": theirs_us, "fetch_ratio": theirs_us / ours_us, "documents": 106,
        "tokens": float(np.mean([lengths[own].sum() for own in ids])), "plan_s": plan, "trl_s": packed,
        "plan_ratio": packed / plan,
    }  # fmt: skip


def _peers(lengths: np.ndarray, capacity: int) -> dict[str, Callable]:
    """The other packers that are installed, each as a function without arguments that returns packs."""
    found: dict[str, Callable] = {}
    try:
        import lightbinpack

        found["LightBinPack obfd"] = lambda: lightbinpack.obfd(lengths.tolist(), capacity)
    except (ImportError, OSError):
        pass
    try:
        import seqpacker

        found["seqpacker obfd"] = lambda: seqpacker.pack_sequences(lengths.tolist(), capacity, strategy="obfd").packs
    except (ImportError, OSError):
        pass
    if len(lengths) <= SMALL or capacity <= 2048:
        import datasets
        import pyarrow as pa
        from trl.data_utils import pack_dataset  # noqa: F401  (its loop works on a table of tokens)

        offsets = pa.array(np.append(0, np.cumsum(lengths, dtype=np.int64)))
        tokens = pa.array(np.zeros(int(lengths.sum()), dtype=np.int8))
        table = datasets.Dataset(pa.table({"input_ids": pa.LargeListArray.from_arrays(offsets, tokens)}))
        options = {"map_kwargs": {"batch_size": len(lengths), "keep_in_memory": True, "load_from_cache_file": False}}
        found["TRL bfd"] = lambda: pack_dataset(table, capacity, "bfd", **options)
    return found


def _timed(function: Callable) -> tuple[float, object]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def markdown(found: dict) -> str:
    """The tables of results/packing/README.md."""
    lines = ["# Packing", "", f"`{found['command']}` on {found['machine']}.", ""]
    if found["packers"]:
        lines += ["| data | packer | ms | packs | above the bound |", "|---|---|---:|---:|---:|"]
        lines += [f"| {r['data']} | {r['packer']} | {r['seconds'] * 1e3:,.1f} | {r['packs']:,} | {r['gap']:.3%} |"
                  for r in found["packers"]]  # fmt: skip
    if found["balance"]:
        lines += [
            "",
            "Balance (mean rank / slowest rank of each micro-step; 1 is perfect) and the mix of an update: the spread of",
            "its mean length over that of a random update.",
            "",
            "| data | strategy | ranks | tokens | attention | modelled step | examples per update | spread | dropped |",
            "|---|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        lines += [
            f"| {r['data']} | {r['strategy']} | {r['ranks']} | {r['tokens']:.3f} | {r['attention']:.3f} | "
            f"{r['efficiency']:.4f} | {'{:,} / {:,.0f} / {:,}'.format(*r['examples_per_update'])} | {r['spread']:.2f} | "
            f"{r['dropped']} |" for r in found["balance"]
        ]  # fmt: skip
    if path := found["data_path"]:
        lines += [
            "",
            f"Fetch and collate {path['documents']} documents ({path['tokens']:,.0f} tokens): {path['fetch_us']:,.0f} us; "
            f"row by row with DataCollatorWithFlattening {path['flattening_us']:,.0f} us: {path['fetch_ratio']:.1f}x.",
            "",
            f"Plan of 100,000 rows: {path['plan_s'] * 1e3:,.0f} ms; trl.pack_dataset {path['trl_s']:,.2f} s: "
            f"{path['plan_ratio']:.0f}x.",
        ]
    return "\n".join(lines) + "\n"


def machine() -> str:
    """CPU model and cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=[*data_sets(), "data_path", "none"], help="repeatable")
    parser.add_argument(
        "--lengths", type=Path, help="a further data set: lengths in a .npy file, capacity 2048 (name: own)"
    )
    parser.add_argument("--out", type=Path, default=Path("results/packing"))
    options = parser.parse_args(args)
    only = options.only or [*data_sets(), "data_path"]
    chosen = {name: (make(), capacity) for name, (make, capacity) in data_sets().items() if name in only}
    if options.lengths:
        from packtrain.packing.lengths import load_lengths

        chosen["own"] = (np.asarray(load_lengths(options.lengths)), 2048)
    found: dict = {"command": COMMAND, "machine": machine(), "packers": [], "balance": [], "data_path": None}
    for name, (lengths, capacity) in chosen.items():
        print(name, flush=True)
        found["packers"] += bench_packers(name, lengths, capacity)
        if name in ("sft_100k", "long_1m"):
            found["balance"] += bench_balance(name, lengths, capacity if capacity > 8192 else 8192)
    if "data_path" in only:
        found["data_path"] = bench_data_path()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "packing.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (options.out / "README.md").write_text(markdown(found), encoding="utf-8")
    print(markdown(found))


if __name__ == "__main__":
    main()
