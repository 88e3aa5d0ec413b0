"""A drive that is full, can't be written or is taken away: one clear error, and nothing that was good is lost."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest

from packtrain.training.sealing import MANIFEST, is_sealed
from tests.faults.runs import hold, let_go, log_of, run, same, start, wait_for, weights, write_recipe
from tests.faults.test_kills import resume_and_compare


@pytest.fixture
def drive(tmp_path):
    """A drive of one MiB that only root can have; `mount(*options)` changes it."""
    place = tmp_path / "drive"
    place.mkdir()

    def mount(*options: str) -> Path:
        done = subprocess.run(["mount", *options, str(place)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"may not mount: {done.stderr.strip()}")
        return place

    mount("-t", "tmpfs", "-o", "size=1m", "tmpfs")
    yield mount
    subprocess.run(["umount", "-l", str(place)])


def on_the_drive(place: Path, tmp_path: Path) -> Path:
    """A recipe beside the drive, whose run is on it."""
    recipe = write_recipe(tmp_path)
    (tmp_path / "run").symlink_to(place, target_is_directory=True)
    return recipe


def failed_to_save(recipe: Path) -> None:
    message = log_of(recipe)
    assert "could not be saved" in message and "older checkpoints are intact" in message, message
    assert "Traceback" not in message
    left = list((recipe.parent / "run").glob("checkpoint-*"))
    assert left and all(is_sealed(path) for path in left)  # no half directory


@pytest.mark.ci
@pytest.mark.slow
def test_a_full_drive(drive, tmp_path, unbroken):
    """A tmpfs of one MiB has room for a few checkpoints; with more room the run goes on."""
    place = drive("-o", "remount,size=1m")
    recipe = on_the_drive(place, tmp_path)
    assert run(recipe) == 2, log_of(recipe)
    failed_to_save(recipe)
    assert "the drive is full" in log_of(recipe)
    drive("-o", "remount,size=64m")
    resume_and_compare(recipe, weights(unbroken))


@pytest.mark.ci
@pytest.mark.slow
def test_a_drive_without_room_for_the_model(drive, tmp_path):
    """No checkpoint was asked for, so the model at the end is the first that finds the drive full."""
    place = drive("-o", "remount,size=64k")
    recipe = on_the_drive(place, tmp_path)
    assert run(recipe, "--set", "save_strategy=no") == 2, log_of(recipe)
    assert "can't be written, the drive is full" in log_of(recipe) and "Traceback" not in log_of(recipe)


@pytest.mark.ci
@pytest.mark.slow
def test_a_limit_on_the_size_of_files(tmp_path, unbroken):
    """Where nobody may mount, it stands in for the full drive: set from outside once two checkpoints are there."""
    recipe = write_recipe(tmp_path)
    process = hold(recipe)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (60_000, 60_000))
    let_go(recipe)
    process.join()
    assert process.exitcode == 2, log_of(recipe)
    failed_to_save(recipe)
    resume_and_compare(recipe, weights(unbroken))


@pytest.mark.ci
@pytest.mark.slow
def test_a_drive_that_becomes_read_only(drive, tmp_path, unbroken):
    place = drive("-o", "remount,size=64m")
    recipe = on_the_drive(place, tmp_path)
    process = hold(recipe)
    drive("-o", "remount,ro")
    let_go(recipe)
    process.join()
    assert process.exitcode == 2, log_of(recipe)
    message = log_of(recipe)
    assert "Read-only file system" in message and "Traceback" not in message, message
    drive("-o", "remount,rw")
    resume_and_compare(recipe, weights(unbroken))


@pytest.mark.ci
@pytest.mark.slow
def test_a_drive_that_is_read_only_from_the_beginning(drive, tmp_path):
    place = drive("-o", "remount,ro")
    recipe = on_the_drive(place, tmp_path)
    assert run(recipe) == 2
    assert "is not a writable directory: Read-only file system" in log_of(recipe).replace("\n", " ")
    assert "Traceback" not in log_of(recipe)


@pytest.mark.ci
@pytest.mark.slow
def test_a_place_that_can_not_be_a_directory(tmp_path):
    recipe = write_recipe(tmp_path)
    (tmp_path / "run").write_text("a file where the directory should be")
    assert run(recipe) == 2
    assert "is not a writable directory" in log_of(recipe) and "Traceback" not in log_of(recipe)


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.parametrize("after", [2, 5])
def test_the_directory_is_removed_during_the_run(tmp_path, unbroken, after):
    """It is made again, or the save that was under way says so; the run that is started anew is as if nothing had been."""
    for attempt in range(10):
        recipe = write_recipe(tmp_path / str(attempt))
        directory = recipe.parent / "run"
        process = start(recipe)
        wait_for(process, (directory / f"checkpoint-{after}" / MANIFEST).exists)
        shutil.rmtree(directory, ignore_errors=True)  # against a run that saves meanwhile
        process.join()
        message = log_of(recipe)
        assert process.exitcode in (0, 2) and "Traceback" not in message, message
        if process.exitcode == 2:
            assert "could not be saved" in message or "can't be written" in message, message
            resume_and_compare(recipe, weights(unbroken))
        if directory.exists():
            break  # it was removed before the end, as it nearly always is
    assert same(weights(directory), weights(unbroken))
    assert all(is_sealed(path) for path in directory.glob("checkpoint-*"))
    assert os.listdir(directory / "model")
