"""Which rank is waited for: told from what each wrote last, and seen from outside in a run of two."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
import torch.distributed as dist

from packtrain.training.watchdog import BEAT, Told, Watchdog, _behind
from tests.faults.runs import Reading, log_of, start_ranks, training, wait_for, write_recipe


def told(at: tuple[int, int], *, silent: float = 0.0) -> Told:
    return Told(at, f"in step {at[1]}", time.monotonic() - 100, time.monotonic() - silent)


def test_who_is_behind():
    assert _behind([told((3, 2)), told((3, 2))]) == ""  # both evaluate, say
    assert _behind([told((3, 2)), told((3, 1))]).startswith("rank 1, in step 1 since ")
    assert _behind([told((4, 0)), told((3, 1)), None]).count("rank") == 2
    assert "rank 0, in step 2" in _behind([told((3, 2), silent=6 * BEAT), told((3, 2))])
    assert "gives no sign of life" in _behind([told((3, 2), silent=6 * BEAT), told((3, 2))])


class Watched(Reading):
    """Names who is behind after two seconds."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.watchdog.stall = 2.0


class Sleepy(Watched):
    """Whose second rank hangs before its fourth update, longer than the test lasts."""

    def get_batch_samples(self, *args):
        if self.args.process_index == 1 and self.state.global_step == 3:
            time.sleep(600)
        return super().get_batch_samples(*args)


@pytest.mark.ci
@pytest.mark.slow
def test_a_rank_that_hangs_is_named_and_the_timeout_is_the_one_asked_for(tmp_path):
    recipe = write_recipe(tmp_path)
    ranks = start_ranks(recipe, 2, resume=False, overrides=["training.ddp_timeout=15"], trainer_class=Sleepy)
    ranks[0].join(100)
    try:
        assert ranks[0].exitcode not in (0, None), "30 minutes are the default"
        assert "waiting for rank 1, in micro-batch" in log_of(recipe), log_of(recipe)
    finally:
        ranks[1].kill()
        ranks[1].join()


@pytest.mark.ci
@pytest.mark.slow
def test_a_rank_that_is_stopped_is_named_and_the_run_goes_on(tmp_path):
    recipe = write_recipe(tmp_path)
    ranks = start_ranks(recipe, 2, resume=False, overrides=["training.num_train_epochs=6"], trainer_class=Watched)
    wait_for(ranks[0], lambda: training(recipe))
    os.kill(ranks[1].pid, signal.SIGSTOP)
    try:
        wait_for(ranks[0], lambda: "waiting for rank 1, " in log_of(recipe))
    finally:
        os.kill(ranks[1].pid, signal.SIGCONT)
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0], log_of(recipe)


def test_the_clock_of_another_host_is_not_asked():
    """What counts is when rank 0 has read something new."""
    store, watchdog = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), Watchdog()
    for rank, ahead in enumerate((0, -3600, 3600)):
        store.set(f"doing/{rank}", json.dumps([3, 1, "in step 1", time.time() + ahead]))
        store.set(f"alive/{rank}", str(time.time() + ahead))
    told = [watchdog._read(store, rank) for rank in range(3)]
    assert _behind(told) == "" and max(time.monotonic() - one.since for one in told) < 600
    assert watchdog._read(store, 1) == told[1]  # nothing new
    store.set("alive/1", "something new")
    assert watchdog._read(store, 1).alive > told[1].alive
