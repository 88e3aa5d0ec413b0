"""Packers side by side: time, packs, gap to the bound, balance of the ranks; and the data path against its peers.

    python -m packtrain.experiments.bench_packing                       # writes results/packing/; a few minutes
    python -m packtrain.experiments.bench_packing --only sft_100k --only data_path
    python -m packtrain.experiments.bench_packing --only billion        # a 2 GB temporary file, 6 GiB of memory

With `--only`, results that are there already are kept. All packers get the same lengths, in one process, the best of a
few repeats; those that take a list get one, and making it isn't timed. A peer that isn't installed is left out. TRL's
packer is given rows of nulls (as it takes no lengths), once all in one batch, once its default of 1,000 rows at a time.
Balance is that of updates of eight packs per rank under the cost model of a 7B Llama, over the epoch's shuffle of packs;
`balanced` draws its updates from the shuffle of examples, as many as fill eight micro-batches per rank to three quarters.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from packtrain.experiments.bench_balance import BALANCE, bench_balance, lognormal
from packtrain.experiments.bench_packing_page import markdown
from packtrain.packing.counts import pack_counts
from packtrain.packing.histogram import best_fit_decreasing
from packtrain.packing.lengths import histogram, load_lengths
from packtrain.packing.packs import PatternPacks, sort_by_length
from packtrain.packing.plan import make_plan
from packtrain.packing.strategies import STRATEGIES
from packtrain.training.summary import describe_machine

OURS = ("bfd", "ffd", "optimal", "next_fit")
COMPILED = "packtrain bfd, compiled"
LARGE_ROWS = 32_768  # tokens; TRL is not asked to fill these, as a million documents for them keep it for many minutes
COMMAND = "python -m packtrain.experiments.bench_packing"
BILLION = 1_000_000_000
PACKAGES = ("numpy", "scipy", "numba", "trl", "transformers", "datasets", "lightbinpack", "seqpacker")


def uniform(low: float, high: float) -> np.ndarray:
    return np.random.default_rng(0).integers(int(low * 2048), int(high * 2048) + 1, 100_000, dtype=np.int32)


PACKING: dict[str, tuple[Callable[[], np.ndarray], int]] = {  # lengths, capacity
    "sft_100k": (partial(lognormal, 5.5, 0.9, 100_000, 2048), 2048),
    "sft_1m": (partial(lognormal, 5.5, 0.9, 1_000_000, 2048), 2048),
    "long_1m": (partial(lognormal, 7.0, 1.5, 1_000_000, 32_768), 32_768),
    "uniform_15_55": (partial(uniform, 0.15, 0.55), 2048),
    "uniform_26_50": (partial(uniform, 0.26, 0.5), 2048),
}


def bench_packers(name: str, lengths: np.ndarray, capacity: int) -> list[dict]:
    """One row per packer: seconds, packs, gap to the bound that `optimal` proves; of ours, the seconds that it takes
    to write down every pack's ids, too, which the others have done."""
    packers = {f"packtrain {own}": partial(STRATEGIES[own].function, lengths, capacity, 0) for own in OURS}
    if importlib.util.find_spec("numba"):
        packers[COMPILED] = partial(_compiled, lengths, capacity)
        packers[COMPILED]()  # loads numba
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


def _compiled(lengths: np.ndarray, capacity: int) -> PatternPacks:
    counts = histogram(lengths)
    patterns = best_fit_decreasing(counts, capacity, compiled=True)
    return PatternPacks(patterns=patterns, counts=counts, by_length=sort_by_length(lengths, counts), key=0, bound=0)


def bench_scale(number: int = BILLION, world_size: int = 64) -> dict:
    """Plan many lengths from a memory-mapped file; seconds of each stage and the process's peak memory after it.

    The peak holds the pages of the file that were read, which the system may take back.
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
        reports = stage("counts only: bfd, ffd, optimal", lambda: pack_counts(counts, 2048))
        size = {"max_tokens": 2048, "tokens_per_step": 2048 * 4 * world_size, "world_size": world_size}
        plan = stage("plan bfd", lambda: make_plan(lengths, strategy="bfd", **size))
        steps = np.linspace(0, plan.total_steps - 1, 100).astype(np.int64).tolist()
        stage("one rank's part of 100 updates", lambda: [plan.micro_batches(step, world_size // 2) for step in steps])
        found |= {"packs": reports[0].packs, "gap": reports[0].gap, "updates": plan.total_steps}
    return found


def _write_lengths(path: Path, number: int, chunk: int = 1 << 24) -> None:
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint16, shape=(number,))
    for seed, start in enumerate(range(0, number, chunk)):
        out[start : start + chunk] = lognormal(5.5, 0.9, min(chunk, number - start), 2048, seed)
        out.flush()


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


def _versions() -> dict[str, str]:
    installed = (name for name in PACKAGES if importlib.util.find_spec(name))
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in installed}


def _timed(function: Callable) -> tuple[float, object]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    choices = [*PACKING, *BALANCE, "data_path", "billion", "none"]
    parser.add_argument("--only", action="append", choices=choices, help="repeatable; default: all but billion")
    parser.add_argument("--lengths", type=Path, help="a further set of lengths, a .npy file; capacity 2048")
    parser.add_argument("--out", type=Path, default=Path("results/packing"))
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
    for section, sets, bench in (("packers", packing, bench_packers), ("balance", BALANCE, bench_balance)):
        for name in sets:
            if name in only or sets is packing:
                print(name, flush=True)
                make, capacity = sets[name]
                found[section][name] = {"rows": bench(name, make(), capacity)} | ran
                _write(found, options.out)
    for name, bench in (("data_path", bench_data_path), ("billion", bench_scale)):
        if name in only:
            print(name, flush=True)
            found[name] = bench() | ran
    _write(found, options.out)
    print(markdown(found))


def _write(found: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(markdown(found), encoding="utf-8")


if __name__ == "__main__":
    main()
