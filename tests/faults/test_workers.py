"""A data worker that is killed, or hangs, ends the run with an error that says so; its work is not lost silently."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest
import torch

from packtrain.data import synthetic
from packtrain.data.examples import build_examples
from packtrain.data.sources import Rows
from packtrain.errors import DataError
from packtrain.packing.collator import PackCollator
from packtrain.training.run import fit
from tests.data.helpers import make_tokenizer
from tests.training.helpers import make_trainer


class Stumbling(PackCollator):
    """In a worker process, does something else at one example."""

    def __init__(self, stumble):
        super().__init__()
        self.stumble, self.home = stumble, os.getpid()

    def collate(self, input_ids, labels, lengths, example_ids, supervised=None):
        if 17 in example_ids and os.getpid() != self.home:
            self.stumble()
        return super().collate(input_ids, labels, lengths, example_ids, supervised)


def hang() -> None:
    time.sleep(600)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def be_asked_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)  # as a scheduler does, to every process of a job


def trainer_with(output_dir, stumble, **settings):
    return make_trainer(
        output_dir,
        strategy="balanced",
        collator=Stumbling(stumble),
        num_epochs=1.0,
        dataloader_num_workers=1,
        **settings,
    )


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.parametrize(
    ("stumble", "seconds", "message"),
    [
        (hang, 2, "did not answer in time: .*timed out after 2 seconds"),
        (die, 60, "worker died: .*(killed|exited unexpectedly)"),
    ],
)
def test_a_worker_that_hangs_or_dies_ends_the_run(tmp_path, stumble, seconds, message):
    with pytest.raises(DataError, match=message):
        fit(trainer_with(tmp_path, stumble, worker_timeout=seconds))
    deadline = time.monotonic() + 30
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


def test_workers_leave_signals_to_the_run_and_change_nothing(tmp_path):
    """Control: with a worker that goes on, the weights are those of a run without workers."""
    runs = [
        trainer_with(tmp_path / "one", be_asked_to_stop),
        make_trainer(tmp_path / "two", strategy="balanced", num_epochs=1.0),
    ]
    for trainer in runs:
        fit(trainer)
    one, two = (dict(trainer.model.named_parameters()) for trainer in runs)
    assert all(torch.equal(value, two[name]) for name, value in one.items())


class Deadly(Rows):
    """Rows that kill the process that reads them, but for the one that opened them: as the system does without memory."""

    home = os.getpid()

    def read(self, start, stop):
        if os.getpid() != self.home:
            die()
        return super().read(start, stop)


def test_a_tokenising_process_that_is_killed_is_said(tmp_path):
    rows = Deadly([synthetic.READERS["packtrain:arithmetic"](1200, seed=0, split="train")])
    with pytest.raises(DataError, match="data.num_proc: one of 2 processes that tokenise was killed"):
        build_examples(rows, make_tokenizer(), max_length=512, overflow="truncate", num_proc=2, cache_dir=tmp_path)
    assert list((tmp_path / "tokens").iterdir()) == []  # nothing half done
