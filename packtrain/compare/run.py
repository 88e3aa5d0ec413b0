"""The run of a comparison: every variant in a fresh process, interleaved, and a report at the end.

    packtrain compare recipes/compare/quickstart.yaml
    packtrain compare recipes/compare/gsm8k.yaml --set data.path=data/gsm8k/train.jsonl --out results/compare_gsm8k
    packtrain compare recipes/compare/quickstart.yaml --set ranks=2 --out out/compare_on_two_ranks

Round by round (A B C, A B C, ...), so that a machine that is busy for a while is busy for all. Interrupted, it
continues where it was: finished runs are kept. A variant that fails is a row of the report; its later rounds are left
out, and it is tried again when the command is.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from packtrain.compare.experiment import Experiment, Variant, load_experiment, with_settings
from packtrain.compare.results import End, add_end, read_run, remove_logs, remove_runs, run_path, write_manifest
from packtrain.errors import require
from packtrain.recipe.shipped import find_recipe

Say = Callable[[str], None]


def run_comparison(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    output_dir: str | Path | None = None,
    restart: bool = False,
    say: Say = print,
) -> Path:
    """Run what is missing of a comparison, write its report, and return its directory.

    Args:
        path: the recipe of the comparison, see `experiment`; or the name of one that comes with packtrain.
        overrides: `key=value` of it or of its base recipe.
        output_dir: `out/compare_NAME` by default.
        restart: remove the runs that are there first.
        say: takes lines for people.

    Raises:
        PacktrainError: the recipe is wrong, or the directory holds another experiment.
    """
    require("jinja2", "matplotlib", extra="plots")
    from packtrain.compare.manifest import check_same, make_manifest
    from packtrain.compare.report import write_report

    path = find_recipe(path, below="compare")
    experiment = load_experiment(path, overrides)
    directory = Path(output_dir) if output_dir else Path("out") / f"compare_{experiment.name}"
    manifest = make_manifest(experiment, path, overrides)
    if restart:
        remove_runs(directory)
    check_same(directory, manifest)
    write_manifest(directory, manifest)
    run_rounds(experiment, directory, say)
    report = write_report([directory])
    say(f"report: {report}")
    return directory


def run_rounds(experiment: Experiment, directory: Path, say: Say) -> None:
    """Make every run that has no file yet, one after the other; failed ones again."""
    context = _context()
    failed: set[str] = set()
    todo = [
        (number, variant)
        for number in range(len(experiment.rounds))
        for variant in experiment.variants
        if not _finished(run_path(directory, number, variant.name), number, variant.name)
    ]
    total = len(experiment.rounds) * len(experiment.variants)
    for number, variant in todo:
        if variant.name in failed:
            continue
        position = number * len(experiment.variants) + experiment.variants.index(variant) + 1
        end = _run(context, experiment, number, variant, directory)
        if end.status == "failed":
            failed.add(variant.name)
        outcome = f"failed: {end.reason}" if end.status == "failed" else "done"
        say(f"run {position}/{total}  round {number + 1}  {variant.name}  {outcome}")


def _run(context: Any, experiment: Experiment, number: int, variant: Variant, directory: Path) -> End:
    """Make one run in its own process, or in one for each rank; a process that dies leaves a run that says so."""
    from packtrain.compare.launcher import Job, launch, reason_of_code
    from packtrain.compare.worker import work

    turn, path = experiment.rounds[number], run_path(directory, number, variant.name)
    path.unlink(missing_ok=True)
    job = Job(
        trainer=variant.trainer,
        recipe=with_settings(variant.recipe, seed=turn.seed),
        path=path,
        updates=None if turn.learns else experiment.warmup_steps + experiment.measure_steps,
        eval_every=experiment.eval_every,
        ranks=experiment.ranks,
    )
    process = context.Process(target=work if job.ranks == 1 else launch, args=(job,))
    process.start()
    try:
        process.join()
    except KeyboardInterrupt:
        process.terminate()
        process.join()
        raise
    if not path.exists():
        add_end(path, End(status="failed", reason=reason_of_code(process.exitcode or 0)))
    end = read_run(path, round=number, variant=variant.name).end
    if end.status == "finished":
        remove_logs(path)
    return end


def _context() -> Any:
    """Choose how processes start: forked from a server with the libraries loaded, or anew on CUDA (see `worker`)."""
    if sys.platform != "linux" or Path("/proc/driver/nvidia").exists():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["packtrain.compare.worker"])
    return context


def _finished(path: Path, number: int, variant: str) -> bool:
    return path.exists() and not read_run(path, round=number, variant=variant).failed
