"""Measures where the seconds go from the command to the end of the first update, and what the checks before it take.

    python results/startup/run.py                  # about eleven minutes on two cores
    python results/startup/run.py --rounds 1 --rows 2000

Every case is a process of its own that does what `packtrain train` does, with one update: imports, rows and tokens, plan,
model, trainer, a look whether documents are isolated, and the update. The rows lie in a file; "again" means that they
were tokenised before. The checks are what is hashed, sampled or compared so that ranks, caches and checkpoints belong
together; they are part of the other columns. With two ranks the seconds are those of rank 0.

Writes `results/startup/bench.json` and `results/startup/README.md`. Finished cases are kept in `out/`.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, as results/ is not installed

QUICKSTART, ROWS = "quickstart", "rows"
PHASES = {
    "imports": "imports",
    "load_task": "rows, tokens",
    "plan_training": "plan",
    "prepare_model": "model",
    "make_trainer": "trainer",
    "check_documents": "isolation",
    "update": "update",
}
CHECKS = {
    "hash_files": "cached tokens hashed",
    "tokenizer_fingerprint": "tokenizer hashed",
    "base_weights": "files of the model sampled",
    "weights_hash": "weights sampled",
    "hash": "plan hashed",
    "check_agreement": "ranks compared",
}
PLACES = {
    "hash_files": ["packtrain.data.store"],
    "tokenizer_fingerprint": ["packtrain.data.store", "packtrain.training.run"],
    "base_weights": ["packtrain.training.checkpoints"],
    "weights_hash": ["packtrain.training.run"],
    "check_agreement": ["packtrain.training.run"],
} | {name: ["packtrain.training.run"] for name in PHASES if name not in ("imports", "update")}


def sets(case: Mapping[str, Any], directory: str) -> list[str]:
    """The settings of a case: those of the quickstart, without an evaluation before the first update."""
    own = ["training.max_steps=1", "training.save_strategy=no", "training.eval_on_start=false"]
    own += [f"training.output_dir={directory}/out", "data.eval_size=8"]
    if case["rows"] == ROWS:
        own += [f"data.path={directory}/rows.jsonl", "data.num_rows=null"]
    if case["model"]:
        own += ["model.config=null", "model.tokenizer_vocab_size=null", f"model.model_name_or_path={case['model']}"]
        own += ["batching.examples_per_step=4"]
    return own


def work(case: Mapping[str, Any], directory: str, into: Path) -> None:
    """Trains one update in this process, and writes the seconds of phases and checks."""
    import psutil

    began = psutil.Process().create_time()
    from importlib import import_module

    from rich.console import Console
    from transformers import TrainerCallback

    import packtrain.training.run as run
    from packtrain.packing.plan import Plan
    from packtrain.recipe.reader import load_recipe

    recipe = load_recipe("quickstart", sets(case, directory))
    seconds = {"imports": time.time() - began}

    def timed(name: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

        return call

    for name, modules in PLACES.items():
        for place in map(import_module, modules):
            setattr(place, name, timed(name, getattr(place, name)))
    plan_hash = functools.cached_property(timed("hash", Plan.__dict__["hash"].func))
    plan_hash.__set_name__(Plan, "hash")
    Plan.hash = plan_hash  # type: ignore[assignment]
    trainer = run.build(recipe, console=Console(quiet=True))
    start = time.perf_counter()

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seconds["update"], seconds["all"] = time.perf_counter() - start, time.time() - began

    trainer.add_callback(Clock())
    run.fit(trainer, console=Console(quiet=True))
    if trainer.is_world_process_zero():
        into.write_text(json.dumps(seconds))
    run.leave(trainer.accelerator)


def start(case: Mapping[str, Any], directory: str) -> dict[str, float]:
    """The same in a process of its own, or two."""
    into = Path(directory, "seconds.json")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if case["ranks"] == 2 else []
    command = [sys.executable, *launcher, __file__, "--work", json.dumps(case), "--directory", directory]
    cache = {"PACKTRAIN_CACHE": f"{directory}/cache", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=os.environ | cache, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case['name']}: {done.stderr[-3000:]}")
    found = json.loads(into.read_text())
    print(f"{case['name']:60s} {found['all']:6.1f} s", flush=True)
    return found


def write_rows(path: Path, count: int) -> None:
    """Writes generated questions and answers as JSON lines."""
    from packtrain.data.synthetic import arithmetic_row

    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            file.write(json.dumps(arithmetic_row(0, number)) + "\n")


def cases(rows: int) -> list[dict[str, Any]]:
    from results.real_model.prepare import MODEL, missing

    many = f"{rows:,} rows"
    found = [
        {"name": "quickstart, 6,000 rows, first time", "rows": QUICKSTART, "again": False},
        {"name": "quickstart, again", "rows": QUICKSTART, "again": True},
        {"name": f"{many}, first time", "rows": ROWS, "again": False},
        {"name": f"{many}, again", "rows": ROWS, "again": True},
        {"name": f"{many}, again, two ranks", "rows": ROWS, "again": True, "ranks": 2},
    ]
    if missing() is None:
        real = {"rows": ROWS, "model": str(MODEL)}
        found.append({"name": f"{many}, a model of 135M, first time", **real, "again": False})
        found.append({"name": f"{many}, a model of 135M, again", **real, "again": True})
        found.append({"name": f"{many}, a model of 135M, again, two ranks", **real, "again": True, "ranks": 2})
    return [{"ranks": 1, "model": None} | case for case in found]


def measure(case: Mapping[str, Any], rows: int, rounds: int, kept: Any, place: Callable[[], str]) -> dict[str, float]:
    """Medians over rounds; first times are measured once."""
    number = rounds if case["again"] else 1
    runs = [kept.measure(f"{case['name']} {turn}", lambda: start(case, place())) for turn in range(number)]
    return {name: statistics.median(run.get(name, 0.0) for run in runs) for name in {*PHASES, *CHECKS, "all"}}


def markdown(result: Mapping[str, Any]) -> str:
    from results.page import limits, origin_lines

    lines = ["# Start-up", "", "Where do the seconds go from the command to the end of the first update?", ""]
    lines += ["| | all | " + " | ".join(PHASES.values()) + " |", "|---|" + "---:|" * (len(PHASES) + 1)]
    for name, found in result["cases"].items():
        figures = [f"{found[key]:.2f}" for key in PHASES]
        lines.append(f"| {name} | **{found['all']:.1f}** | {' | '.join(figures)} |")
    lines += ["", "Seconds; what is between the columns is in the first only. Of them, the checks take:", ""]
    lines += ["| | all checks | " + " | ".join(CHECKS.values()) + " |", "|---|" + "---:|" * (len(CHECKS) + 1)]
    for name, found in result["cases"].items():
        figures = [f"{found[key]:.3f}" for key in CHECKS]
        lines.append(f"| {name} | **{sum(found[key] for key in CHECKS):.2f}** | {' | '.join(figures)} |")
    lines += limits(
        "One size of rows; files in the memory of the machine. Imports are those of torch and transformers' Trainer, but "
        "for about a second. More ranks, and ranks on other hosts, wait for the slowest one where they are compared."
    )
    lines += origin_lines(result, "torch", "transformers")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="of the cases that are tokenised (default 3)")
    parser.add_argument("--rows", type=int, default=100_000, help="default 100,000")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="default results/startup")
    arguments = parser.parse_args()
    if arguments.work:
        work(json.loads(arguments.work), arguments.directory, Path(arguments.directory, "seconds.json"))
        return
    from results.page import RESULTS, Kept, origin, store

    kept = Kept("startup")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        made: set[tuple] = set()  # what lies in the cache of this directory

        def place(case: Mapping[str, Any]) -> str:
            rows, model = Path(directory, "rows.jsonl"), case["model"]
            if case["rows"] == ROWS and not rows.exists():
                write_rows(rows, arguments.rows)
            if case["again"] and (case["rows"], model) not in made:  # the first time was measured before
                start({**case, "ranks": 1, "name": f"{case['name']}: tokenising"}, directory)
            made.add((case["rows"], model))
            return directory

        for case in cases(arguments.rows):
            found[case["name"]] = measure(case, arguments.rows, arguments.rounds, kept, functools.partial(place, case))
    result = origin("startup") | {"threads": 1, "rounds": arguments.rounds, "cases": found}
    store(arguments.out or RESULTS / "startup", result, markdown(result))
    kept.finish()
    print(markdown(result))


if __name__ == "__main__":
    main()
