"""kill -9 at any moment, and a drive that is full in the middle of a save: the run goes on as if nothing had been.

pytest -m slow tests/faults/test_kills.py       # fifty random moments
"""

from __future__ import annotations

import os
import random
import resource
import signal
import time

import pytest

from packtrain.training.checkpoint import find_last_checkpoint
from packtrain.training.sealing import MANIFEST, UNFINISHED, is_sealed
from tests.faults.runs import log_of, run, same, start, wait_for, weights, write_recipe


def kill(process) -> None:
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()


def resume_and_compare(recipe, unbroken) -> None:
    run_dir = recipe.parent / "run"
    words = ["--resume"] if any(is_sealed(path) for path in run_dir.glob("checkpoint-*")) else []
    assert run(recipe, *words) == 0, log_of(recipe)
    assert same(weights(run_dir), weights(unbroken))
    assert not list(run_dir.glob(f"checkpoint-*/{UNFINISHED}"))  # what the kill left half-written is gone


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_killed_in_the_middle_of_a_save(tmp_path, unbroken, file):
    recipe = write_recipe(tmp_path)
    half = tmp_path / "run/checkpoint-5"
    process = start(recipe)
    wait_for(process, (half / file).exists)
    kill(process)
    if not (half / MANIFEST).exists():  # the kill came in time, as it nearly always does
        assert (half / UNFINISHED).exists()
        said = []
        assert find_last_checkpoint(tmp_path / "run", said.append)[0].name == "checkpoint-4"
        assert said == ["checkpoint-5 passed over: is unfinished: it has no manifest"]
    resume_and_compare(recipe, unbroken)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_fifty_random_moments(tmp_path, unbroken):
    draw = random.Random(0)
    whole = write_recipe(tmp_path / "whole")
    began = time.monotonic()
    assert run(whole) == 0
    seconds = time.monotonic() - began
    cut_short = 0
    for number in range(50):
        recipe = write_recipe(tmp_path / str(number))
        process = start(recipe)
        time.sleep(draw.uniform(0.1, 1.0) * seconds)
        kill(process)
        cut_short += bool(list((recipe.parent / "run").glob(f"checkpoint-*/{UNFINISHED}")))
        resume_and_compare(recipe, unbroken)
    print(f"\n  50 of 50 runs end with the unbroken run's weights, bitwise; {cut_short} were killed within a save")
    assert cut_short


def test_a_full_drive_breaks_one_save_and_nothing_else(tmp_path, unbroken):
    """A limit on the size of files, set from outside once two checkpoints are there, stands in for the full drive."""
    recipe = write_recipe(tmp_path)
    process = start(recipe)
    wait_for(process, (tmp_path / "run/checkpoint-2" / MANIFEST).exists)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (60_000, 60_000))
    process.join()
    assert process.exitcode == 2, log_of(recipe)
    message = log_of(recipe)
    assert "could not be saved" in message and "older checkpoints are intact" in message
    assert "Traceback" not in message
    left = list((tmp_path / "run").glob("checkpoint-*"))
    assert len(left) >= 2 and all(is_sealed(path) for path in left)  # no half directory
    resume_and_compare(recipe, unbroken)


def test_a_place_that_can_not_be_written_is_said_before_the_first_step(tmp_path):
    recipe = write_recipe(tmp_path)
    (tmp_path / "run").write_text("a file where the directory should be")
    assert run(recipe) == 2
    assert "nothing can be written there" in log_of(recipe) and "Traceback" not in log_of(recipe)
