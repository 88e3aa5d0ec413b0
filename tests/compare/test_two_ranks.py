"""Comparisons on two ranks with real processes: the losses of one, the waiting for a slow one, and one that is killed."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
import pytest

from packtrain.compare.comparison import read_comparison
from packtrain.compare.experiment import load_experiment, with_settings
from packtrain.compare.launcher import Job, launch
from packtrain.compare.results import Run, read_run
from packtrain.compare.run import _context, run_comparison
from packtrain.compare.verdict import verdict
from tests.compare.tiny_experiment import write_experiment
from tests.programs.slow_rank import SECONDS

VARIANTS = ["pad_longest", "balanced", "transformers:batch_rebalance"]
KILLED = {"name": "killed", "batching.strategy": "tests.programs.deadly:kill_rank_one"}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Runs get one thread each, as tests do."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


def compared(directory: Path, ranks: int, variants: list, *overrides: str):
    directory.mkdir()
    path = write_experiment(directory, variants=variants, ranks=ranks, reference="pad_longest")
    return read_comparison(run_comparison(path, overrides, output_dir=directory / "out", say=lambda line: None))


def slowed(directory: Path, updates: int) -> Run:
    """`balanced`, launched as a comparison does, with a rank that sleeps in every micro-batch."""
    variant = load_experiment(directory / "tiny.yaml").variants[1]
    path = directory / "slowed.jsonl"
    recipe = with_settings(variant.recipe, seed=0)  # of the comparison's only round
    job = Job(trainer=variant.trainer, recipe=recipe, path=path, updates=updates, eval_every=None, ranks=2)
    process = _context().Process(target=launch, args=(job, "tests.programs.slow_rank"))
    process.start()
    process.join()
    return read_run(path, round=0, variant=variant.name)


@pytest.mark.slow
def test_two_ranks_have_the_losses_of_one_and_wait_for_a_slow_one(tmp_path):
    one = compared(tmp_path / "one", 1, VARIANTS)
    two = compared(tmp_path / "two", 2, [*VARIANTS, KILLED])
    for name in VARIANTS:
        mine, theirs = two.row(name), one.row(name)
        assert mine.failure is None, name
        losses = [[update.loss for update in row.learning_runs[0].updates] for row in (mine, theirs)]
        np.testing.assert_allclose(*losses, rtol=1e-6, err_msg=name)
        assert mine.held_out == pytest.approx(theirs.held_out, rel=1e-6)
        assert (mine.updates, mine.examples_per_update) == (theirs.updates, theirs.examples_per_update)
        tokens = [[update.real_tokens for update in row.learning_runs[0].updates] for row in (mine, theirs)]
        assert tokens[0] == tokens[1]
        assert theirs.waiting is None and 0 <= mine.waiting < 1
        assert all(update.waiting_seconds >= 0 for update in mine.learning_runs[0].updates)
    assert two.row("balanced").loss_difference < 1e-5 and two.row("balanced").padding_share == 0

    assert two.row("killed").failure == "rank 1: killed by SIGKILL"
    said = {sentence.topic: sentence.text for sentence in verdict(two)}
    assert said["ranks"].startswith("With `balanced`, the mean of 2 ranks waits for the others ")
    runs = tmp_path / "two" / "out" / "runs"
    logs = {file.name for file in runs.glob("*.log")}  # of what failed; rank 0 may have said nothing yet
    assert (
        {"00-killed.log", "00-killed.rank1.log"}
        <= logs
        <= {f"00-killed{rank}.log" for rank in ("", ".rank0", ".rank1")}
    )
    assert "2 ranks (DDP)" in (runs.parent / "report.html").read_text()
    assert "waiting for other ranks" in (runs.parent / "summary.md").read_text()
    assert "waiting_share" in (runs.parent / "summary.csv").read_text()

    usual, slow = two.row("balanced").timed_runs[0], slowed(tmp_path / "two", updates=3)
    assert not slow.failed and len(slow.updates) == 3
    waited = [update.waiting_seconds for update in slow.updates]
    losses = [[update.loss for update in run.updates[:3]] for run in (slow, usual)]
    np.testing.assert_allclose(*losses, rtol=1e-6)
    # Rank 0 waits about as long as rank 1 sleeps, rank 1 not at all; the mean is half of it.
    asleep = SECONDS * slow.updates[0].micro_batches / 2
    assert statistics.median(waited) > asleep / 4
    assert statistics.median(update.waiting_seconds for update in usual.updates) < statistics.median(waited)


@pytest.mark.slow
def test_other_trainers_on_two_ranks_see_the_same_examples(tmp_path):
    pytest.importorskip("trl")
    peers = ["transformers:random", "trl:padding", "trl:padding_free"]
    found = compared(tmp_path / "two", 2, ["pad_longest", *peers, "transformers:group_by_length"])
    assert not [row.failure for row in found.rows if row.failure]
    for name in peers:
        row = found.row(name)
        assert row.loss_difference < 1e-4 and row.norm_difference < 1e-4, name
        assert row.examples_per_update == found.reference.examples_per_update and row.waiting is not None
    grouped = found.row("transformers:group_by_length")
    assert grouped.updates == found.reference.updates and not grouped.keeps_updates
