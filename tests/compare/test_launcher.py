"""The launcher, with processes of torchrun that train nothing: whatever ranks do, a run file says what became of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from packtrain.compare.experiment import load_experiment
from packtrain.compare.launcher import Job, launch
from packtrain.compare.results import read_run
from packtrain.compare.run import _context
from tests.compare.tiny_experiment import write_experiment


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("killed", "rank 1: killed by SIGKILL"),
        ("exits", "rank 1: the process ended with code 7"),
        ("fails", "rank 1: ValueError: rank 1 has said why"),
        ("stopped", "rank 0: ValueError: rank 0 has said why"),  # rank 1 hangs, and torchrun kills it after 30 seconds
        ("without a result", "the ranks ended without a result"),
    ],
)
def test_ranks_that_end_leave_a_run_that_says_how(tmp_path, monkeypatch, how, reason):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    recipe = load_experiment(write_experiment(tmp_path)).variants[0].recipe
    job = Job(trainer=how, recipe=recipe, path=tmp_path / "run.jsonl", updates=1, eval_every=None, ranks=2)
    process = _context().Process(target=launch, args=(job, "tests.programs.ending_ranks"))
    process.start()
    process.join()
    run = read_run(job.path, round=0, variant="pad_longest")
    assert run.failed and run.end.reason == reason
