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

from packtrain.training.guards import stops
from packtrain.training.guards.signals import heeded
from packtrain.training.guards.stops import StopOnSignal
from packtrain.training.sealing import is_sealed
from tests.faults.runs import (
    HELD_AFTER,
    STEPS,
    Held,
    hold,
    let_go,
    log_of,
    run,
    run_ranks,
    same,
    start,
    start_ranks,
    training,
    updates_done,
    wait_for,
    weights,
    what_counts,
    write_recipe,
)
from tests.training.helpers import make_trainer

NO_SAVES = ("--set", "training.save_strategy=no")
NO_END = ("--set", "training.num_train_epochs=100000")  # but by a signal


def checkpoints(recipe: Path) -> list[Path]:
    return sorted((recipe.parent / "run").glob("checkpoint-*"))


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_signal_saves_once_and_the_run_goes_on_bitwise(tmp_path, unbroken, name):
    recipe = write_recipe(tmp_path)
    process = hold(recipe, NO_SAVES[1])
    os.kill(process.pid, getattr(signal, name))
    wait_for(process, lambda: f"{name}: the run stops after this update" in log_of(recipe))
    let_go(recipe)
    process.join()
    assert process.exitcode == 75, log_of(recipe)
    (saved,) = checkpoints(recipe)
    assert is_sealed(saved) and saved.name == f"checkpoint-{HELD_AFTER + 1}"
    said = log_of(recipe)
    assert f"stopped by {name} after step {HELD_AFTER + 1} of {STEPS}" in said and "continue with resume=True" in said
    assert "Traceback" not in said and not (tmp_path / "run/model").exists()
    assert run(recipe, *NO_SAVES, "--resume") == 0, log_of(recipe)
    assert same(weights(tmp_path / "run"), weights(unbroken))


@pytest.mark.slow
def test_a_signal_that_comes_twice_at_once_is_one(tmp_path):
    """To a whole process group, and once more from the launcher that got it, too."""
    recipe = write_recipe(tmp_path)
    process = start(recipe, *NO_SAVES, *NO_END)
    wait_for(process, lambda: training(recipe))
    for number in (signal.SIGSTOP, signal.SIGINT, signal.SIGTERM, signal.SIGCONT):  # both before either is heard
        os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 75, log_of(recipe)
    (saved,) = checkpoints(recipe)
    assert is_sealed(saved)


class AnHour(Held):
    """What comes within an hour of the first signal is no second one."""

    pause = 3600.0

    def training_step(self, *args, **kwargs):
        stops.PAUSE = self.pause
        return super().training_step(*args, **kwargs)


class NoTime(AnHour):
    """Whatever comes after the first signal is a second one."""

    pause = 0.0


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.parametrize("trainer_class", [AnHour, NoTime])
def test_the_second_signal_exits_at_once(tmp_path, trainer_class):
    recipe = write_recipe(tmp_path)
    process = hold(recipe, NO_SAVES[1], trainer_class=trainer_class)
    os.kill(process.pid, signal.SIGINT)
    wait_for(process, lambda: "SIGINT: the run stops after this update" in log_of(recipe))
    os.kill(process.pid, signal.SIGTERM)
    if trainer_class is AnHour:
        let_go(recipe)
    process.join()
    assert process.exitcode == (75 if trainer_class is AnHour else 128 + signal.SIGTERM), log_of(recipe)
    assert len(checkpoints(recipe)) == (trainer_class is AnHour)


def test_a_signal_that_was_ignored_before_is_heard_while_training(tmp_path):
    """As where a shell was told to ignore it, which what it starts inherits."""
    stop = StopOnSignal(make_trainer(tmp_path, strategy="balanced"))
    others = {number: signal.getsignal(number) for number in heeded()}
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with stop.listening():
            os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.heard == signal.SIGUSR1
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        for number, handler in others.items():
            signal.signal(number, handler)


def test_a_signal_after_the_stop_spares_a_rank_that_has_saved(tmp_path, monkeypatch):
    """While it leaves; control: where nothing was heard before, or five seconds later, it does what it always does."""
    heard: list[int] = []
    others = {number: signal.getsignal(number) for number in heeded()}
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        stop = StopOnSignal(make_trainer(tmp_path, strategy="balanced"))
        with stop.listening():
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM]
        with stop.listening():
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM]
        monkeypatch.setattr(stops, "PAUSE", 0.0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM] * 2
    finally:
        for number, handler in others.items():
            signal.signal(number, handler)


LEAVES = """
import atexit, os, signal, sys
from types import SimpleNamespace
from packtrain.training.guards import stops

atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))  # runs after what is registered later
stop = stops.StopOnSignal(SimpleNamespace())
with stop.listening():
    if sys.argv[1:]:
        os.kill(os.getpid(), signal.SIGTERM)
stops.PAUSE = 0.0
sys.exit(75)
"""


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.parametrize(("words", "code"), [(("stopped",), 75), ((), -signal.SIGTERM)])
def test_a_signal_at_the_end_of_a_stopped_process_leaves_its_exit_code(words, code):
    """Control: a process that was not stopped."""
    assert subprocess.run([sys.executable, "-c", LEAVES, *words]).returncode == code


@pytest.mark.slow
def test_epoch_saves_do_not_save_a_second_time(tmp_path):
    recipe = write_recipe(tmp_path)
    words = ("--set", "training.save_strategy=epoch", "--set", "training.save_total_limit=2")
    process = start(recipe, *words, *NO_END)
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


def test_nohup_is_respected(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopOnSignal(make_trainer(tmp_path, strategy="balanced")).listening():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL  # control
    finally:
        signal.signal(signal.SIGHUP, before)
