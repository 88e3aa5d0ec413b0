"""Measures packers next to each other: time, packs, gap to the bound, balance of the ranks; and the data path.

    python results/packing/run.py                       # writes results/packing/; a few minutes
    python results/packing/run.py --only sft_100k --only data_path
    python results/packing/run.py --only billion        # a 2 GB temporary file, 6 GiB of memory

With `--only`, results that are already stored are kept. All packers get the same lengths, in one process, and the
best of a few repeats counts; those that take a list get one, and making it is not timed. A peer that is not installed
is left out, which is printed and stands on the page; stored results that have it are not replaced by ones without.
TRL's packer takes no lengths and is given rows of nulls, once all in one batch, once its default of 1,000 rows at a
time. Balance is that of updates of eight packs per rank under the cost model of a 7B Llama, over the epoch's shuffle
of packs; `balanced` draws its updates from the shuffle of examples, as many as fill eight micro-batches per rank to
three quarters.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from packtrain.packing.cost import Cost
from packtrain.packing.lengths import histogram, load_lengths
from packtrain.packing.optimal import lower_bound, near_optimal
from packtrain.packing.packs import PatternPacks
from packtrain.packing.plan import Plan, make_plan
from packtrain.packing.report import describe
from packtrain.packing.strategies import STRATEGIES
from packtrain.training.summary import describe_machine, name_machine

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, as results/ is not installed
from results.page import RESULTS, limits, store

OURS = ("bfd", "ffd", "optimal", "next_fit")
COMPILED = "packtrain bfd, compiled"  # among the stored rows
LARGE_ROWS = 32_768  # tokens; TRL is not asked to fill these, as a million documents take it many minutes
COMMAND = "python results/packing/run.py"
BILLION = 1_000_000_000
PACKAGES = ("numpy", "scipy", "trl", "transformers", "datasets", "lightbinpack", "seqpacker")
PEERS = {"LightBinPack obfd": "lightbinpack", "seqpacker obfd": "seqpacker"}  # packer -> module


def lognormal(mean: float, sigma: float, number: int, longest: int, seed: int = 0) -> np.ndarray:
    draws = np.random.default_rng(seed).lognormal(mean, sigma, number)
    return np.clip(draws, 10, longest).astype(np.int32)


def uniform(low: float, high: float) -> np.ndarray:
    return np.random.default_rng(0).integers(int(low * 2048), int(high * 2048) + 1, 100_000, dtype=np.int32)


PACKING: dict[str, tuple[Callable[[], np.ndarray], int]] = {  # lengths, capacity
    "sft_100k": (partial(lognormal, 5.5, 0.9, 100_000, 2048), 2048),
    "sft_1m": (partial(lognormal, 5.5, 0.9, 1_000_000, 2048), 2048),
    "long_1m": (partial(lognormal, 7.0, 1.5, 1_000_000, 32_768), 32_768),
    "uniform_15_55": (partial(uniform, 0.15, 0.55), 2048),
    "uniform_26_50": (partial(uniform, 0.26, 0.5), 2048),
}

LLAMA_7B = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
ACCUMULATION = 8  # micro-batches of a rank in an update
STEPS = 20  # updates looked at for the balance

BALANCE: dict[str, tuple[Callable[[], np.ndarray], int]] = {
    "long_32k": (partial(lognormal, 7.0, 1.5, 200_000, 32_768), 32_768),
    "sft_8k_upto_2k": (partial(lognormal, 5.5, 0.9, 200_000, 2048), 8192),
    "sft_8k_upto_4k": (partial(lognormal, 5.5, 0.9, 200_000, 4096), 8192),
    "sft_8k_upto_8k": (partial(lognormal, 5.5, 0.9, 200_000, 8192), 8192),
}


# -------------------------------------------------------------------------------------------------------------- packers


def bench_packers(name: str, lengths: np.ndarray, capacity: int) -> list[dict]:
    """Time every packer; one row each: seconds, packs, and the gap to the bound that `optimal` proves.

    Rows of packtrain also have the seconds that writing down every pack's ids takes, which the others have done.
    """
    packers = {f"packtrain {own}": partial(STRATEGIES[own].function, lengths, capacity, 0) for own in OURS}
    rows, bound = [], 0
    for packer, pack in (packers | _peers(lengths, capacity)).items():
        repeats = 1 if packer.startswith("TRL") or packer == "packtrain optimal" else 3
        seconds, packs = min((_timed(pack) for _ in range(repeats)), key=lambda pair: pair[0])
        row = {"data": name, "packer": packer, "seconds": seconds, "packs": len(packs)}
        if isinstance(packs, PatternPacks):
            bound = max(bound, packs.bound)
            row["listing_seconds"] = _timed(lambda packs=packs: packs.take(np.arange(len(packs))))[0]
        rows.append(row)
    return [row | {"gap": row["packs"] / bound - 1} for row in rows]


def bench_scale(number: int = BILLION, world_size: int = 64) -> dict:
    """Plan many lengths from a memory-mapped file; seconds of each stage and the process's peak memory after it.

    The peak includes the pages of the file that were read, which the system may take back.
    """
    found: dict = {"examples": number, "world_size": world_size, "seconds": {}, "peak_gib": {}}

    def stage(name: str, function: Callable):
        found["seconds"][name], result = _timed(function)
        found["peak_gib"][name] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
        print(name, f"{found['seconds'][name]:.2f} s, {found['peak_gib'][name]:.2f} GiB", flush=True)
        return result

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lengths.npy"
        stage("write the file", lambda: _write_lengths(path, number))
        lengths = stage("map and check", lambda: load_lengths(path))
        counts = stage("histogram", lambda: histogram(lengths))
        proved = stage("optimal on the histogram", lambda: near_optimal(counts, 2048)[1])
        size = {"max_tokens": 2048, "tokens_per_step": 2048 * 4 * world_size, "world_size": world_size}
        plan = stage("plan bfd", lambda: make_plan(lengths, strategy="bfd", **size))
        steps = np.linspace(0, plan.total_steps - 1, 100).astype(np.int64).tolist()
        stage("one rank's part of 100 updates", lambda: [plan.micro_batches(step, world_size // 2) for step in steps])
        packs, bound = len(plan.scope.packs(0)), max(lower_bound(counts, 2048), proved)
        found |= {"packs": packs, "gap": packs / bound - 1, "updates": plan.total_steps}
    return found


def _write_lengths(path: Path, number: int, chunk: int = 1 << 24) -> None:
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint16, shape=(number,))
    for seed, start in enumerate(range(0, number, chunk)):
        out[start : start + chunk] = lognormal(5.5, 0.9, min(chunk, number - start), 2048, seed)
        out.flush()


def bench_data_path() -> dict:
    """Time the data path against its peers.

    Interleaved: 106 documents of ~150 tokens by `gather` and packtrain's collator, and row by row with transformers'
    collator; then a plan of 100,000 rows against `trl.pack_dataset`.
    """
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
    """Collect the other packers that are installed, each as a function without arguments that returns packs."""
    found: dict[str, Callable] = {}
    listed = lengths.tolist()
    try:
        import lightbinpack

        found["LightBinPack obfd"] = lambda: lightbinpack.obfd(listed, capacity)
    except (ImportError, OSError):
        pass
    try:
        import seqpacker

        found["seqpacker obfd"] = lambda: seqpacker.pack_sequences(listed, capacity, strategy="obfd").packs
    except (ImportError, OSError):
        pass
    if capacity < LARGE_ROWS:
        import datasets
        import pyarrow as pa
        from trl.data_utils import pack_dataset  # noqa: F401  (its loop works on a table of tokens)

        offsets = pa.array(np.append(0, np.cumsum(lengths, dtype=np.int64)))
        tokens = pa.nulls(int(lengths.sum()))  # there are none to copy
        table = datasets.Dataset(pa.table({"input_ids": pa.LargeListArray.from_arrays(offsets, tokens)}))
        for name, rows in (("TRL bfd", len(lengths)), ("TRL bfd, 1,000 rows at a time", 1000)):
            options = {"batch_size": rows, "keep_in_memory": True, "load_from_cache_file": False}
            found[name] = partial(pack_dataset, table, capacity, "bfd", map_kwargs=options)
    return found


def left_out() -> list[str]:
    """Name the packers that are not installed here, or cannot be loaded."""
    missing = []
    for packer, module in PEERS.items():
        try:
            importlib.import_module(module)
        except (ImportError, OSError):
            missing.append(packer)
    return missing


def lost(found: dict, names: list[str], missing: list[str]) -> list[str]:
    """Say which stored rows `(data, packer)` measuring these data sets again without some packers would lose."""
    rows = (row for name in names for row in found["packers"].get(name, {}).get("rows", ()))
    return [f"{row['data']}: {row['packer']}" for row in rows if row["packer"] in missing]


def _versions() -> dict[str, str]:
    installed = (name for name in PACKAGES if importlib.util.find_spec(name))
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in installed}


def _timed(function: Callable) -> tuple[float, object]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


# -------------------------------------------------------------------------------------------------------------- balance


def bench_balance(name: str, lengths: np.ndarray, capacity: int) -> list[dict]:
    """Plan with every strategy and number of ranks; one row each: balance in tokens, attention and modelled time, and the
    mix of the updates."""
    rows = []
    per_pack = 0.75 * capacity / lengths.mean()  # micro-batches three quarters full leave room to be level
    for ranks in (8, 64):
        for strategy in ("padding_free", "balanced", "next_fit", "bfd", "optimal", "global_balance"):
            size = {"examples_per_step": max(1, int(per_pack * ranks * ACCUMULATION))}
            if strategy == "balanced":
                size["gradient_accumulation_steps"] = ACCUMULATION
            if STRATEGIES[strategy].scope == "epoch":
                size = {"tokens_per_step": capacity * ranks * ACCUMULATION}
            cost = Cost.of_config(LLAMA_7B)
            plan = make_plan(lengths, strategy=strategy, max_tokens=capacity, world_size=ranks, cost=cost, **size)
            found = describe(plan, sampled_steps=STEPS)
            rows.append({
                "data": name, "strategy": strategy, "ranks": ranks, "accumulation": found.gradient_accumulation_steps,
                "tokens": found.token_balance, "attention": _attention_balance(plan), "efficiency": found.balance,
                "possible": _possible(plan),
                "efficiency_ddp": found.rank_balance, "examples_per_update": found.examples_per_update,
                "spread": found.mean_length_spread, "dropped": found.tokens_dropped,
            })  # fmt: skip
    return rows


def _steps(plan: Plan) -> list[int]:
    return np.unique(np.linspace(0, plan.total_steps - 1, STEPS).round().astype(np.int64)).tolist()


def _attention_balance(plan: Plan) -> float:
    """Compute the mean / largest sum of squared lengths in each micro-step, over updates spaced evenly."""
    tables = [np.array([np.square(part.lengths, dtype=np.float64).sum() for part in plan.layout_of(step)])
              for step in _steps(plan)]  # fmt: skip
    table = np.concatenate(tables).reshape(-1, plan.world_size)
    return float(table.mean(axis=1).sum() / table.max(axis=1).sum())


def _possible(plan: Plan) -> float:
    """Bound the efficiency of any layout of the same updates from above.

    The micro-step with the most expensive document lasts at least as long as that. Its ranks hold `max_tokens` each, so
    their work is at most that of the longest documents that fit into as many tokens together; the rest takes its mean.
    """
    busy = needed = 0.0
    for step in _steps(plan):
        lengths = np.sort(plan.lengths[plan.examples(step)])[::-1].astype(np.float64)
        costs, ranks = plan.scope.cost(lengths), plan.world_size
        longest = np.searchsorted(np.cumsum(lengths), ranks * plan.scope.max_tokens) + 1
        first = max(costs[0], costs.sum() / ranks / plan.gradient_accumulation_steps)
        busy += costs.sum() / ranks
        needed += first + max(0.0, costs.sum() - min(costs[:longest].sum(), ranks * first)) / ranks
    return float(busy / needed)


# ------------------------------------------------------------------------------------------------------------- the page


def markdown(found: dict) -> str:
    """Write results/packing/README.md from the contents of bench.json."""
    lines = [
        "# Packing",
        "",
        "How long does packing an epoch take, how many packs does it make of the fewest possible, and how evenly do the",
        "packs of an update load the ranks?",
        "",
    ]
    if found["packers"]:
        lines += [*_packers([row for part in found["packers"].values() for row in part["rows"]])]
        for name, part in found["packers"].items():
            if missing := part.get("left_out"):
                lines.append(f"- {name}: measured without {' and '.join(missing)} (not installed).")
        lines.append("")
    if found["balance"]:
        lines += [*_balance([row for part in found["balance"].values() for row in part["rows"]]), ""]
    if path := found.get("data_path"):
        lines += [
            "## Data path",
            "",
            f"Fetch and collate {path['documents']} documents ({path['tokens']:,.0f} tokens): {path['fetch_us']:,.0f} us;",
            f"row by row with DataCollatorWithFlattening {path['flattening_us']:,.0f} us: {path['fetch_ratio']:.1f}x.",
            f"A plan of 100,000 rows: {path['plan_s'] * 1e3:,.1f} ms; `trl.pack_dataset` (bfd) of the same rows",
            f"{path['trl_s']:,.2f} s: {path['plan_ratio']:.0f}x.",
            "",
        ]
    if scale := found.get("billion"):
        lines += [*_scale(scale), ""]
    lines += limits(LIMITS)[1:] + [""]
    return "\n".join(lines + list(_commands(found))) + "\n"


LIMITS = (
    "Packing is a small part of a run: the seconds here matter when millions of documents are "
    "planned, not for how fast a model trains (`results/compare_long_tail`). Balance is that of a cost model, not measured "
    "on ranks. All lengths but those of gsm8k are drawn from a distribution."
)


def _packers(rows: list[dict]) -> Iterator[str]:
    yield "One epoch into packs. *Above the bound*: over the fewest packs that `optimal` proves possible. *Ids*: packtrain"
    yield "answers with patterns, from which an update's packs are computed; writing all ids down takes this much more."
    if any(row["packer"] == COMPILED for row in rows):
        yield "*Compiled* is a loop in numba that has been removed since (`results/LOG.md`); it also ran in `bfd` and"
        yield "`optimal` on long_1m, which take about 0.6 s without it."
    yield "TRL's time is that of `pack_dataset`, on rows whose tokens are nulls, so that it has none to copy; it was"
    yield "not asked for long_1m, which takes it many minutes. Ratios include writing down packtrain's ids, as all others"
    yield "write theirs; in brackets without."
    yield "gsm8k: the `lengths.npy` that `packtrain plan recipes/gsm8k_local.yaml` leaves in the cache."
    yield ""
    yield "| data | packer | ms | ids, ms | packs | above the bound |"
    yield "|---|---|---:|---:|---:|---:|"
    for row in rows:
        ids = f"{row['listing_seconds'] * 1e3:,.1f}" if "listing_seconds" in row else ""
        yield (
            f"| {row['data']} | {row['packer']} | {row['seconds'] * 1e3:,.1f} | {ids} | {row['packs']:,} | "
            f"{row['gap']:.3%} |"
        )
    yield ""
    for data in dict.fromkeys(row["data"] for row in rows):
        own = {row["packer"]: row for row in rows if row["data"] == data}
        peers = [name for name in own if not name.startswith("packtrain")]
        parts = [
            f"{ours.removeprefix('packtrain ')} {_times(own[peer], own[ours])} as fast as {peer}"
            for peer in peers
            for ours in ("packtrain bfd", COMPILED)
            if ours in own
        ]
        if peers:
            fewest = min(own[peer]["packs"] for peer in peers)
            more = own["packtrain optimal"]["packs"] - fewest
            yield f"- {data}: {'; '.join(parts)}. `optimal` against the best peer: {more:+,} packs."


def _times(peer: dict, ours: dict) -> str:
    listed = ours["seconds"] + ours["listing_seconds"]
    return f"{peer['seconds'] / listed:,.1f}x ({peer['seconds'] / ours['seconds']:,.1f}x)"


def _balance(rows: list[dict]) -> Iterator[str]:
    yield "## Balance"
    yield ""
    yield "Mean rank / slowest rank of each micro-step (1 is perfect), accumulation in brackets; *step*: modelled time of a"
    yield "7B Llama whose ranks meet in every micro-step. *Spread*: how much the mean length of an update varies, over what"
    yield "random updates would (1 is the mix of a shuffle). *Possible*: no layout of these"
    yield "updates does better: the longest document takes its time, and the other ranks lack the memory for more work."
    yield ""
    yield "| data | strategy | ranks | tokens | attention | step | possible | examples per update | spread | dropped |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    for row in rows:
        examples = "{:,} / {:,.0f} / {:,}".format(*row["examples_per_update"])
        shares = f"{row['tokens']:.3f} | {row['attention']:.3f} | {row['efficiency']:.4f} | {row['possible']:.4f}"
        yield (
            f"| {row['data']} | {row['strategy']} | {row['ranks']} ({row['accumulation']}) | {shares} | {examples} | "
            f"{row['spread']:.2f} | {row['dropped']} |"
        )


def _scale(found: dict) -> Iterator[str]:
    yield "## Scale"
    yield ""
    yield f"{found['examples']:,} lengths in a memory-mapped file of 16-bit integers, packs of 2,048 tokens:"
    yield f"{found['packs']:,} packs, {found['gap']:.3%} above the bound;"
    yield f"{found['updates']:,} updates of {found['world_size']} ranks."
    yield ""
    yield "| stage | seconds | peak memory so far, GiB |"
    yield "|---|---:|---:|"
    for stage, seconds in found["seconds"].items():
        yield f"| {stage} | {seconds:,.2f} | {found['peak_gib'][stage]:.2f} |"


def _commands(found: dict) -> Iterator[str]:
    parts = [*found["packers"].values(), *found["balance"].values(), found.get("data_path"), found.get("billion")]
    ran = {part["command"]: part for part in parts if part}
    for command, part in ran.items():
        machine, packages = part["machine"], part["packages"]
        yield f"    {command}"
        yield ""
        yield f"on {name_machine(machine)}; {', '.join(f'{name} {packages[name]}' for name in packages)}."
        yield ""


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    choices = [*PACKING, *BALANCE, "data_path", "billion", "none"]
    parser.add_argument("--only", action="append", choices=choices, help="repeatable; default: all but billion")
    parser.add_argument("--lengths", type=Path, help="a further set of lengths, a .npy file; capacity 2048")
    parser.add_argument("--out", type=Path, default=RESULTS / "packing", help="default results/packing")
    options = parser.parse_args(args)
    only = options.only or [*PACKING, *BALANCE, "data_path"]

    found: dict[str, dict] = {"packers": {}, "balance": {}}
    if (options.out / "bench.json").exists():
        found = json.loads((options.out / "bench.json").read_text(encoding="utf-8"))
    words = [COMMAND, *(f"--only {name}" for name in options.only or [])]
    words += [f"--lengths {options.lengths.name}"] if options.lengths else []
    ran = {"command": " ".join(words), "machine": describe_machine(), "packages": _versions()}
    packing = {name: PACKING[name] for name in PACKING if name in only}
    if options.lengths:
        packing[options.lengths.stem] = (lambda: np.asarray(load_lengths(options.lengths)), 2048)
    missing = left_out() if packing else []
    if missing:
        print(f"left out, as not installed: {', '.join(missing)}", flush=True)
    if gone := lost(found, list(packing), missing):
        parser.error(
            f"{options.out / 'bench.json'} has rows of packers that are not installed here, which would be lost "
            f"({', '.join(gone)}): install them, or give another --out"
        )
    for section, sets, bench in (("packers", packing, bench_packers), ("balance", BALANCE, bench_balance)):
        for name in sets:
            if name in only or sets is packing:
                print(name, flush=True)
                make, capacity = sets[name]
                without = {"left_out": missing} if section == "packers" and missing else {}
                found[section][name] = {"rows": bench(name, make(), capacity)} | without | ran
                store(options.out, found, markdown(found))
    for name, bench in (("data_path", bench_data_path), ("billion", bench_scale)):
        if name in only:
            print(name, flush=True)
            found[name] = bench() | ran
    store(options.out, found, page := markdown(found))
    print(page)


if __name__ == "__main__":
    main()
