"""Told to stop, a run saves once, exits with 75, and goes on as if nothing had been.

pytest -m slow tests/faults/test_stops.py       # twenty random moments, and a signal that one of two ranks hears
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from packtrain.training.guards.stops import PAUSE, StopOnSignal
from packtrain.training.sealing import is_sealed
from tests.faults.runs import (
    STEPS,
    Reading,
    log_of,
    run,
    run_ranks,
    same,
    start,
    start_ranks,
    training,
    wait_for,
    weights,
    what_counts,
    write_recipe,
)
from tests.training.helpers import make_trainer

NO_SAVES = ("--set", "training.save_strategy=no")


def checkpoints(recipe: Path) -> list[Path]:
    return sorted((recipe.parent / "run").glob("checkpoint-*"))


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_saves_once_and_the_run_goes_on_bitwise(tmp_path, unbroken, name):
    recipe = write_recipe(tmp_path)
    process = start(recipe, *NO_SAVES)
    wait_for(process, lambda: training(recipe))
    os.kill(process.pid, getattr(signal, name))
    process.join()
    assert process.exitcode == 75, log_of(recipe)
    (saved,) = checkpoints(recipe)
    step = int(saved.name.removeprefix("checkpoint-"))
    assert is_sealed(saved) and 1 <= step < STEPS
    said = log_of(recipe)
    assert f"stopped by {name} after step {step} of {STEPS}" in said and "continue with --resume" in said
    assert "Traceback" not in said and not (tmp_path / "run/model").exists()
    assert run(recipe, *NO_SAVES, "--resume") == 0, log_of(recipe)
    assert same(weights(tmp_path / "run"), weights(unbroken))


@pytest.mark.ci
@pytest.mark.slow
def test_a_signal_that_comes_twice_at_once_is_one(tmp_path):
    """To a whole process group, and once more from the launcher that got it, too."""
    recipe = write_recipe(tmp_path)
    process = start(recipe, *NO_SAVES)
    wait_for(process, lambda: training(recipe))
    for number in (signal.SIGSTOP, signal.SIGINT, signal.SIGTERM, signal.SIGCONT):  # both before either is heard
        os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 75, log_of(recipe)
    (saved,) = checkpoints(recipe)
    assert is_sealed(saved)


class Endless(Reading):
    """Its third update takes longer than any test."""

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 2:
            print("in the third update", flush=True)
            time.sleep(3600)
        return super().training_step(*args, **kwargs)


@pytest.mark.ci
@pytest.mark.slow
def test_the_second_signal_exits_at_once(tmp_path):
    recipe = write_recipe(tmp_path)
    (process,) = start_ranks(recipe, 1, resume=False, overrides=NO_SAVES[1:], trainer_class=Endless)
    wait_for(process, lambda: training(recipe) and "in the third update" in log_of(recipe))
    os.kill(process.pid, signal.SIGINT)
    wait_for(process, lambda: "SIGINT: the run stops after this update" in log_of(recipe))
    os.kill(process.pid, signal.SIGTERM)  # too soon to be a second one
    time.sleep(1.5 * PAUSE)
    assert process.is_alive(), log_of(recipe)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM, log_of(recipe)
    assert not checkpoints(recipe)


@pytest.mark.ci
@pytest.mark.slow
def test_a_signal_that_was_ignored_before_is_heard_while_training(tmp_path):
    """As where a shell was told to ignore it, which what it starts inherits."""
    stop = StopOnSignal(make_trainer(tmp_path, strategy="balanced"))
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with stop.listening():
            os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.heard == signal.SIGUSR1
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.ci
@pytest.mark.slow
def test_epoch_saves_do_not_save_a_second_time(tmp_path):
    recipe = write_recipe(tmp_path)
    words = ("--set", "training.save_strategy=epoch")
    process = start(recipe, *words)
    wait_for(process, lambda: training(recipe))
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 75, log_of(recipe)
    assert not list((tmp_path / "run").glob("*.previous")) and all(is_sealed(path) for path in checkpoints(recipe))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(2))
@pytest.mark.parametrize("ranks", [1, 2])
def test_stopped_at_twenty_random_moments(tmp_path, record_property, ranks, part):
    """In two parts of ten. SIGTERM to one rank, whichever: all save the same step and exit with 75, and go on bitwise."""
    draw, whole = random.Random(10 * part + ranks), write_recipe(tmp_path / "whole")
    assert set(run_ranks(whole, ranks, resume=False)) == {0}
    expected, reads = weights(whole.parent / "run"), what_counts(whole)
    steps: list[str] = []
    for number in range(20):
        recipe, last = write_recipe(tmp_path / str(number)), draw.randrange(STEPS - 2)
        processes = start_ranks(recipe, ranks, resume=False, overrides=["training.save_strategy=no"])
        wait_for(processes[0], lambda recipe=recipe, last=last: updates_done(recipe) > last)
        time.sleep(draw.uniform(0, 0.01))
        os.kill(draw.choice(processes).pid, signal.SIGTERM)
        for process in processes:
            process.join()
        if {process.exitcode for process in processes} == {0} and what_counts(recipe) == reads:
            continue  # it was done already: another moment
        assert {process.exitcode for process in processes} == {75}, log_of(recipe)
        (saved,) = checkpoints(recipe)
        assert is_sealed(saved)
        steps.append(saved.name)
        overrides = ["training.save_strategy=no"]
        assert set(run_ranks(recipe, ranks, resume=True, overrides=overrides)) == {0}, log_of(recipe)
        assert same(weights(recipe.parent / "run"), expected)
        assert what_counts(recipe) == reads
        if len(steps) == 10:
            break
    assert len(steps) == 10
    record_property("times", 10)
    record_property("note", f"stopped after {len(set(steps))} different updates")
    assert len(set(steps)) > 3


def updates_done(recipe: Path) -> int:
    path = recipe.with_name("read.jsonl")
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.ci
@pytest.mark.slow
def test_it_is_enough_that_one_rank_hears_it(tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "tests.programs.one_rank_hears", str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        assert "SIGTERM after step 3" in (tmp_path / f"rank{rank}.txt").read_text()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert is_sealed(tmp_path / "checkpoint-3")
