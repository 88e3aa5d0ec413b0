"""Two thousand updates, killed and resumed at random on one, two and three ranks: the weights of the unbroken run.

pytest -m slow -s tests/faults/test_soak.py        # about eight minutes on one core
"""

from __future__ import annotations

import random
import time
from collections import Counter
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

from tests.faults.runs import (
    ROWS,
    can_resume,
    kill,
    log_of,
    records,
    run_ranks,
    start_ranks,
    updates_done,
    wait_for,
    weights,
    what_counts,
    write_recipe,
)

UPDATES, PER_EPOCH = 2000, 6
SETTINGS = [
    f"training.max_steps={UPDATES}",
    "training.save_steps=50",
    "training.save_total_limit=3",
    "training.logging_steps=50",
    "training.learning_rate=1e-4",
    "training.lr_scheduler_type=cosine",
    "model.config.attention_dropout=0.0",  # drawn by every rank for itself: another world size draws others
]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_thousand_updates_on_ranks_that_come_and_go(tmp_path, record_property):
    draw, whole, recipe = random.Random(0), write_recipe(tmp_path / "whole"), write_recipe(tmp_path / "broken")
    assert run_ranks(whole, 1, resume=False, overrides=SETTINGS) == [0], log_of(whole)
    worlds, done = Counter(), False
    while not done:
        ranks = draw.choice([1, 2, 3])
        done = start_and_kill(recipe, ranks, after=draw.randint(20, 250), draw=draw)
        worlds[ranks] += 1
    assert set(worlds) == {1, 2, 3} and sum(worlds.values()) > 10

    expected, found = weights(whole.parent / "run"), weights(recipe.parent / "run")
    difference = max(float((value - found[name]).abs().max()) for name, value in expected.items())
    reads = what_counts(recipe)
    assert reads == what_counts(whole) and len(reads) == UPDATES
    for epoch in range(UPDATES // PER_EPOCH):  # every one that was read to its end
        read = [i for ids in reads[epoch * PER_EPOCH :][:PER_EPOCH] for i in ids]
        assert sorted(read) == list(range(ROWS))
    growth = memory_growth(records(whole))
    longest = max(memory_growth(list(lines)) for _, lines in groupby(records(recipe), key=lambda line: line["attempt"]))
    starts = ", ".join(f"{count} times on {ranks}" for ranks, count in sorted(worlds.items()))
    record_property("note", f"started {starts} ranks; 0 examples lost or repeated")
    record_property("note", f"weights differ by at most {difference:.1e}")
    record_property("note", f"resident memory of the unbroken run grows by {growth / 2**20:.2f} MiB from update 200 on")
    record_property("note", f"of any broken one by at most {longest / 2**20:.2f} MiB once it has settled")
    print(
        f"\n  {starts} ranks, weights differ by {difference:.1e}, memory grows by {growth / 2**20:.2f} MiB", flush=True
    )
    assert difference <= 1e-6
    assert growth < 4 * 2**20


def start_and_kill(recipe: Path, ranks: int, *, after: int, draw: random.Random) -> bool:
    """Start it, or go on, and kill one rank or all `after` so many updates; whether it came to its end before."""
    processes = start_ranks(recipe, ranks, resume=can_resume(recipe), overrides=SETTINGS)
    enough = updates_done(recipe) + ranks * after
    wait_for(processes[0], lambda: updates_done(recipe) > enough, 600)
    if any(process.is_alive() for process in processes):
        time.sleep(draw.uniform(0, 0.02))
        kill(processes, draw.choice([[rank] for rank in range(ranks)] + [list(range(ranks))]))
    return all(process.exitcode == 0 for process in processes)


def memory_growth(lines: list[dict]) -> float:
    """Bytes of resident memory of rank 0 that the later updates have more than the earlier ones, in medians.

    The first tenth is left out: allocators and caches fill up.
    """
    memory = [line["memory"] for line in lines if line["rank"] == 0]
    if len(memory) < 60:
        return 0.0
    settled = memory[max(len(memory) // 10, 20) :]
    tenth = len(settled) // 4
    return float(np.median(settled[-tenth:]) - np.median(settled[:tenth]))


@pytest.mark.ci
@pytest.mark.slow
def test_memory_that_grows_would_be_seen():
    """Control: a hundred bytes in every update."""
    lines = [{"rank": 0, "memory": 2**28 + 100 * update} for update in range(UPDATES)]
    assert memory_growth(lines) == pytest.approx(100 * 0.75 * 0.9 * UPDATES, rel=0.02)
    assert memory_growth([line | {"memory": 2**28} for line in lines]) == 0
