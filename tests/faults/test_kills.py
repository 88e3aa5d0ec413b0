"""kill -9 at any moment: the run goes on as if nothing had been, no example lost or repeated.

pytest -m slow tests/faults/test_kills.py       # fifty random moments, of one process and of two
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter

import pytest

from packtrain.training.checkpoints import find_last_checkpoint
from packtrain.training.sealing import MANIFEST, UNFINISHED
from tests.faults.runs import (
    ROWS,
    STEPS,
    can_resume,
    kill,
    log_of,
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


def resume_and_compare(recipe, expected, reads=None, ranks=1) -> None:
    run_dir = recipe.parent / "run"
    assert set(run_ranks(recipe, ranks, resume=can_resume(recipe))) == {0}, log_of(recipe)
    assert same(weights(run_dir), expected)
    assert not list(run_dir.glob(f"checkpoint-*/{UNFINISHED}"))  # what the kill left half-written is gone
    if reads is not None:
        assert what_counts(recipe) == reads


def lost_or_repeated(reads: list[list[int]]) -> int:
    """Examples that an epoch has not read once."""
    epochs = [reads[: STEPS // 2], reads[STEPS // 2 :]]
    counted = [Counter(i for ids in epoch for i in ids) for epoch in epochs]
    return sum(count[i] != 1 for count in counted for i in range(ROWS))


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", ["model.safetensors", pytest.param("optimizer.pt", marks=pytest.mark.ci), "trainer_state.json"]
)
def test_killed_in_the_middle_of_a_save(tmp_path, unbroken, file):
    for attempt in range(40):
        recipe = write_recipe(tmp_path / str(attempt))
        half = recipe.parent / "run/checkpoint-5"
        process = start(recipe)
        wait_for(process, (half / file).exists)
        kill([process], [0])
        if not (half / MANIFEST).exists():
            break  # the kill came in time, as it nearly always does
    assert (half / UNFINISHED).exists() and not (half / MANIFEST).exists()
    said = []
    assert find_last_checkpoint(half.parent, said.append)[0].name == "checkpoint-4"
    assert said == ["skipped checkpoint-5: is unfinished: it has no manifest"]
    resume_and_compare(recipe, weights(unbroken))


def killed_at_random_moments(tmp_path, *, times: int, ranks: int, seed: int = 0) -> Counter:
    """Of a run that saves every update: one rank, or all at once, `times` while all were running. Returns what
    happened."""
    draw, whole = random.Random(10 * seed + ranks), write_recipe(tmp_path / "whole")
    processes = start_ranks(whole, ranks, resume=False)
    wait_for(processes[0], lambda: training(whole))
    began = time.monotonic()
    for process in processes:
        process.join()
    seconds = time.monotonic() - began  # of the updates with their saves
    expected, reads = weights(whole.parent / "run"), what_counts(whole)
    assert len(reads) == STEPS and lost_or_repeated(reads) == 0
    happened: Counter = Counter()
    while happened["between saves"] + happened["within a save"] < times:
        number = happened.total()
        recipe = write_recipe(tmp_path / str(number))
        processes = start_ranks(recipe, ranks, resume=False)
        wait_for(processes[0], lambda recipe=recipe: training(recipe))
        time.sleep(draw.uniform(0, 0.9) * seconds)
        which = draw.choice([[rank] for rank in range(ranks)] + [list(range(ranks))])
        in_time = all(process.is_alive() for process in processes)
        kill(processes, which)
        in_a_save = in_time and list((recipe.parent / "run").glob(f"checkpoint-*/{UNFINISHED}"))
        happened["within a save" if in_a_save else "between saves" if in_time else "after the end"] += 1
        resume_and_compare(recipe, expected, reads, ranks)
        assert lost_or_repeated(what_counts(recipe)) == 0
    return happened


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(5))
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_fifty_random_moments(tmp_path, record_property, ranks, part):
    """In five parts of ten."""
    happened = killed_at_random_moments(tmp_path, times=10, ranks=ranks, seed=part)
    record_property("times", 10)
    record_property("note", ", ".join(f"{count} {when}" for when, count in sorted(happened.items())))


@pytest.mark.slow
def test_two_ranks_killed_at_two_random_moments(tmp_path):
    """The short form of the above."""
    killed_at_random_moments(tmp_path, times=2, ranks=2)


@pytest.mark.ci
@pytest.mark.slow
def test_an_example_that_is_lost_or_repeated_would_be_found():
    """Control."""
    epoch = [list(range(first, first + 10)) for first in range(0, ROWS, 10)]
    assert lost_or_repeated(epoch + epoch) == 0
    assert lost_or_repeated(epoch + epoch[:-1] + [[*range(50, 59), 3]]) == 2


@pytest.mark.slow
@pytest.mark.ci
def test_the_figures_of_two_ranks_go_on_after_a_resume(tmp_path):
    """Every rank counts its own tokens; a checkpoint carries their sum."""
    recipe = write_recipe(tmp_path)
    assert set(run_ranks(recipe, 2, resume=False)) == {0}, log_of(recipe)
    summary = tmp_path / "run/summary.json"
    whole = json.loads(summary.read_text())
    assert set(run_ranks(recipe, 2, resume=str(tmp_path / f"run/checkpoint-{STEPS - 1}"))) == {0}, log_of(recipe)
    resumed = json.loads(summary.read_text())
    for name in ("real_tokens", "supervised_tokens", "padding_share", "updates"):
        assert resumed[name] == whole[name], name
    assert resumed["world_size"] == 2 and resumed["measured_after"] == 0
