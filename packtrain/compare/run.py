"""The run of a comparison: every variant in a fresh process, interleaved, and a report at the end.

    packtrain compare recipes/compare/quickstart.yaml
    packtrain compare recipes/compare/gsm8k.yaml --set data.path=data/gsm8k/train.jsonl --out results/compare_gsm8k
    packtrain compare recipes/compare/quickstart.yaml --set ranks=2 --out out/compare_on_two_ranks
    packtrain compare recipes/sft_lora.yaml                 # a recipe to train: its strategy, and those to compare it with

Round by round (A B C, A B C, ...), so that a machine that is busy for a while is busy for all. Interrupted, it
continues where it was: finished runs are kept. A variant that fails is a row of the report; its later rounds are left
out, and it is tried again when the command is.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.forkserver
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from packtrain.compare.experiment import Experiment, Variant, load_experiment, with_settings
from packtrain.compare.progress import Progress
from packtrain.compare.results import End, add_end, read_run, remove_logs, remove_runs, run_path, write_manifest
from packtrain.errors import require
from packtrain.recipe.shipped import find_recipe
from packtrain.training.output_lock import only_run

Say = Callable[[str], None]
LOOKS = 1.0  # seconds between looks at a run
GRACE = 5.0  # seconds that an interrupted run has to end by itself


def run_comparison(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    output_dir: str | Path | None = None,
    restart: bool = False,
    say: Say = print,
    console: Console | None = None,
) -> Path:
    """Run what is missing of a comparison, write its report, say its verdict, and return its directory.

    Args:
        path: a comparison, see `experiment`; a recipe to train; or the name of one that comes with packtrain.
        overrides: `key=value` of it or of its base recipe.
        output_dir: `out/compare_NAME` by default.
        restart: remove the runs that are there first.
        say: takes lines for people.
        console: a terminal that shows how far a run is.

    Raises:
        PacktrainError: the recipe is wrong, or the directory holds another experiment or is in use by another process.
    """
    require("jinja2", "matplotlib", extra="plots")
    from packtrain.compare.comparison import read_comparison
    from packtrain.compare.manifest import check_same, make_manifest
    from packtrain.compare.report import write_report
    from packtrain.compare.verdict import note, verdict

    path = find_recipe(path, below="compare")
    experiment = load_experiment(path, overrides)
    directory = Path(output_dir) if output_dir else Path("out") / f"compare_{experiment.name}"
    directory.mkdir(parents=True, exist_ok=True)
    with only_run(directory, key="--out"):  # two would write into each other's runs
        manifest = make_manifest(experiment, path, overrides)
        if restart:
            remove_runs(directory)
        check_same(directory, manifest)
        write_manifest(directory, manifest)
        try:
            run_rounds(experiment, directory, say, console)
        except KeyboardInterrupt:
            say(what_is_kept(experiment, directory, restart=restart))
            raise
    report, comparison = write_report([directory]), read_comparison(directory)
    say("verdict:")
    for text in (*(sentence.text for sentence in verdict(comparison)), note(comparison)):
        if text is not None:
            say(f"  {text}")
    say(f"report: {report}")
    return directory


def run_rounds(experiment: Experiment, directory: Path, say: Say, console: Console | None = None) -> None:
    """Make every run that has no file yet, one after the other; failed ones again."""
    context = _context()
    failed: set[str] = set()
    todo = missing_runs(experiment, directory)
    if todo:
        say(describe(experiment, kept=len(experiment.rounds) * len(experiment.variants) - len(todo)))
    progress = Progress(experiment, todo, say, console)
    for number, variant in todo:
        if variant.name in failed:
            continue
        try:
            end = _run(context, experiment, number, variant, directory, progress)
        finally:
            progress.stop()
        if end.status == "failed":
            failed.add(variant.name)
        progress.end(end)


def missing_runs(experiment: Experiment, directory: Path) -> list[tuple[int, Variant]]:
    """Find the runs that are not finished, as round and variant, in the order in which they are made."""
    return [
        (number, variant)
        for number in range(len(experiment.rounds))
        for variant in experiment.variants
        if not _finished(run_path(directory, number, variant.name), number, variant.name)
    ]


def what_is_kept(experiment: Experiment, directory: Path, *, restart: bool) -> str:
    """Say which runs an interrupted comparison keeps, and how it goes on."""
    runs = len(experiment.rounds) * len(experiment.variants)
    kept = runs - len(missing_runs(experiment, directory))
    command = "the same command without --restart" if restart else "the same command"
    verb = "is" if kept == 1 else "are"
    return f"interrupted: {kept} of {runs} runs {verb} finished and kept in {directory}; {command} makes the rest"


def describe(experiment: Experiment, *, kept: int = 0) -> str:
    """Say what is compared, how often, for how long, and how many runs of an earlier call are kept."""
    names, rounds = [variant.name for variant in experiment.variants], len(experiment.rounds)
    limits = {variant.recipe.training.get("max_steps", -1) for variant in experiment.variants}
    limit = limits.pop() if len(limits) == 1 and min(limits) > 0 else None
    text = f"comparing {', '.join(names)}: {rounds} round{'' if rounds == 1 else 's'}"
    if limit is not None:
        text += f", {limit:,} updates each"
        asked = experiment.warmup_steps + experiment.measure_steps
        if limit < asked:
            timed = max(0, limit - experiment.warmup_steps)
            text += (
                f" (training.max_steps, fewer than the {asked:,} of warmup_steps + measure_steps; {timed:,} are timed)"
            )
    if kept:
        text += f"; {kept} of {rounds * len(names)} runs {'is' if kept == 1 else 'are'} finished and kept"
    return text


def _run(
    context: Any, experiment: Experiment, number: int, variant: Variant, directory: Path, progress: Progress
) -> End:
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
    progress.begin(number, variant, path)
    try:
        with _uninterrupted():
            _start_server(context, process)
        if process.pid is None:
            process.start()  # waits for a server that has just been started, while that loads libraries
        progress.restart_clock()
        while process.is_alive():
            process.join(LOOKS)
            progress.look()
    except KeyboardInterrupt:
        progress.interrupt()
        _end(process)
        raise
    if not path.exists():
        add_end(path, End(status="failed", reason=reason_of_code(process.exitcode or 0)))
    end = read_run(path, round=number, variant=variant.name).end
    if end.status == "finished":
        remove_logs(path)
    return end


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let processes that are started meanwhile ignore Ctrl-C, which a terminal tells all of them: the comparison ends them.

    One that is importing libraries would write a traceback into the terminal.
    """
    if threading.current_thread() is not threading.main_thread():  # where no Ctrl-C is heard, nor a handler set
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _start_server(context: Any, process: Any) -> None:
    """Start what takes no time to start: the fork server, or where there is none the process itself."""
    if context.get_start_method() == "forkserver":
        multiprocessing.forkserver.ensure_running()
    else:
        process.start()


def _end(process: Any) -> None:
    """End a run that nobody waits for: soon where it finishes its update by itself, else at once."""
    if process.pid is not None:
        process.terminate()
        process.join(GRACE)
        process.kill()
        process.join()


def _context() -> Any:
    """Choose how processes start: forked from a server with the libraries loaded, or anew on CUDA (see `worker`)."""
    if sys.platform != "linux" or Path("/proc/driver/nvidia").exists():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["packtrain.compare.worker"])
    return context


def _finished(path: Path, number: int, variant: str) -> bool:
    return path.exists() and not read_run(path, round=number, variant=variant).failed
