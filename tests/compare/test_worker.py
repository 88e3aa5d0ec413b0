"""One run of a comparison, in this process: what it writes while it trains, and how it ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from packtrain.compare.experiment import load_experiment
from packtrain.compare.launcher import Job
from packtrain.compare.results import Run, RunWriter, read_run
from packtrain.compare.worker import _train
from tests.compare.tiny_experiment import write_experiment


def trained(directory: Path, variant: str | dict, *, updates: int | None) -> Run:
    """The run of a variant, read again from the file that it has left."""
    directory.mkdir(exist_ok=True)
    chosen = load_experiment(write_experiment(directory, variants=["pad_longest", variant])).variants[1]
    path = directory / "run.jsonl"
    job = Job(trainer=chosen.trainer, recipe=chosen.recipe, path=path, updates=updates, eval_every=2)
    writer = RunWriter(path)
    writer.end(_train(job, writer.write))
    return read_run(path, round=0, variant=chosen.name)


def test_a_variant_and_a_peer_are_measured_and_learn_alike(tmp_path):
    """To the end, with held-out losses; control: half as fast a rate learns otherwise."""
    pytest.importorskip("trl")
    slower = {"name": "slower", "training.learning_rate": 1.5e-3}
    ours, theirs, other = (
        trained(tmp_path / str(number), variant, updates=None)
        for number, variant in enumerate(["balanced", "trl:padding_free", slower])
    )
    assert [update.update for update in ours.updates] == list(range(1, ours.end.planned_updates + 1))
    assert [found.update for found in ours.held_out] == [0, 2, 4, 6]
    for run in (ours, theirs, other):
        assert run.end.status == "finished" and run.end.trained_parameters > 0 and run.end.layout
    assert ours.end.over_ranks and theirs.end.over_ranks is None
    losses = [[found.loss for found in run.held_out] for run in (ours, theirs, other)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] != pytest.approx(losses[0], rel=1e-5)


def test_a_run_for_speed_ends_early(tmp_path):
    run = trained(tmp_path, "padding_free", updates=3)
    assert len(run.updates) == 3 < run.end.planned_updates and run.held_out == []
