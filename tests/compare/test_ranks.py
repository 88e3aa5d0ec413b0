"""The ranks of a run: what is merged of them, by hand; which of them failed first; what each of a peer's is given."""

from __future__ import annotations

import signal
from dataclasses import replace

import numpy as np
import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from packtrain.compare.experiment import load_experiment
from packtrain.compare.launcher import Failure, Job, first_codes, read_failures, reason_of_ranks, write_failure
from packtrain.compare.measure import RunFailed
from packtrain.compare.peers import PlannedRebalance, PlannedShares
from packtrain.compare.ranks import merge_ends, merge_updates
from packtrain.compare.results import End
from packtrain.packing.plan import make_plan
from tests.compare.synthetic_runs import make_update
from tests.compare.tiny_experiment import write_experiment

FAST = make_update(
    3, seconds=2.0, loss=4.0, backward_seconds=1.2, micro_batches=2, real_tokens=300, examples=5, flops=2e9
)
SLOW = make_update(
    3, seconds=2.2, loss=6.0, backward_seconds=1.4, micro_batches=2, real_tokens=700, examples=3, flops=4e9
)


def test_an_update_of_two_ranks_by_hand():
    """Rank 0 arrives at 10.5 s, rank 1 at 11.3 s: the mean rank waits 0.4 of 2.2 s, in what was its backward pass."""
    merged = merge_updates([(FAST, 10.5), (SLOW, 11.3)])
    assert (merged.update, merged.micro_batches, merged.real_tokens, merged.examples) == (3, 4, 1000, 8)
    assert (merged.computed_tokens, merged.supervised_tokens, merged.flops) == (4000, 1000, 6e9)
    assert (merged.seconds, merged.loss) == (2.2, 5.0)
    assert merged.waiting_seconds == pytest.approx(0.4)
    assert merged.backward_seconds == pytest.approx((1.2 + 1.4) / 2 - 0.4)
    assert merged.forward_seconds == pytest.approx((0.6 + 0.66) / 2)


def test_ranks_that_arrive_together_do_not_wait():
    assert merge_updates([(FAST, 11.0), (SLOW, 11.0)]).waiting_seconds == 0.0


def test_what_a_rank_does_not_know_is_not_known_of_all():
    untold = replace(SLOW, examples=None, flops=None)
    merged = merge_updates([(FAST, 10.0), (untold, None)])
    assert merged.examples is merged.flops is merged.waiting_seconds is None
    assert merged.backward_seconds == pytest.approx(1.3)


def test_one_rank_stays_as_it_is():
    assert merge_updates([(FAST, None)]) is FAST and FAST.waiting_seconds is None


def test_the_end_of_a_run_is_that_of_the_rank_with_most_memory():
    ends = [
        End(
            status="finished", peak_memory=7, memory_before=3, startup_seconds=1.0, threads=1, layout=[{"width": 4}] * 2
        ),
        End(
            status="finished", peak_memory=5, memory_before=4, startup_seconds=2.0, threads=1, layout=[{"width": 6}] * 2
        ),
    ]
    merged = merge_ends(ends)
    assert (merged.peak_memory, merged.memory_before, merged.startup_seconds, merged.threads) == (7, 4, 2.0, 1)
    assert [part["width"] for part in merged.layout] == [4, 6, 4, 6]  # micro-step by micro-step


LOST = Failure(at=9.0, reason="RuntimeError: Connection closed by peer")
CAUSE = Failure(at=8.5, reason="ValueError: a bad row")


@pytest.mark.parametrize(
    ("codes", "told", "reason"),
    [
        ({0: 1, 1: 1}, {0: LOST, 1: CAUSE}, "rank 1: ValueError: a bad row"),
        ({0: 1}, {0: LOST, 1: CAUSE}, "rank 1: ValueError: a bad row"),  # torchrun looked before rank 1 was gone
        ({0: 1, 1: -signal.SIGKILL}, {0: LOST}, "rank 1: killed by SIGKILL"),
        ({1: 7}, {0: LOST}, "rank 1: the process ended with code 7"),
        ({0: -signal.SIGABRT}, {1: CAUSE}, "rank 1: ValueError: a bad row"),  # rank 0 was aborted when it lost rank 1
        ({0: -signal.SIGABRT}, {}, "rank 0: killed by SIGABRT"),
    ],
)
def test_the_first_failure_is_the_reason(codes, told, reason):
    assert reason_of_ranks(codes, told) == reason


def found(code: int, at: int) -> ProcessFailure:
    """What torchrun makes of a rank that it finds dead at a second."""
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=code, error_file="")
    failure.timestamp = at
    return failure


@pytest.mark.parametrize(
    ("failures", "codes"),
    [
        ({1: found(-9, 100), 0: found(-15, 100)}, {1: -9}),  # rank 1 was killed, and torchrun ended rank 0
        ({0: found(1, 100), 1: found(-9, 130)}, {0: 1}),  # rank 1 hung, and did not end by SIGTERM
        ({0: found(1, 100), 1: found(-9, 101)}, {0: 1, 1: -9}),
        ({0: found(-15, 100), 1: found(-15, 100)}, {0: -15, 1: -15}),  # somebody else did
    ],
)
def test_ranks_that_torchrun_ended_are_not_the_cause(failures, codes):
    assert first_codes(failures) == codes


def test_failures_are_read_as_they_were_written(tmp_path):
    write_failure(tmp_path, 11, "ValueError: no")
    assert [(rank, failure.reason) for rank, failure in read_failures(tmp_path).items()] == [(11, "ValueError: no")]


def test_a_job_is_read_as_it_was_written(tmp_path):
    recipe = load_experiment(write_experiment(tmp_path)).variants[1].recipe
    job = Job(trainer="packtrain", recipe=recipe, path=tmp_path / "x.jsonl", updates=3, eval_every=None, ranks=2)
    job.save(tmp_path / "job.json")
    again = Job.load(tmp_path / "job.json")
    assert replace(again, recipe=recipe) == job  # a recipe knows where it was read from
    assert again.recipe.hash == recipe.hash


@pytest.mark.parametrize("kind", [PlannedShares, PlannedRebalance])
@pytest.mark.parametrize("examples", [96, 90])
def test_ranks_of_a_peer_share_the_updates_of_the_plan(sft_lengths, kind, examples):
    """Also in an epoch whose last update is short, and in the second epoch."""
    plan = make_plan(sft_lengths[:examples], strategy="pad_longest", examples_per_step=16, world_size=2, num_epochs=2)
    ranks = [kind(plan, 2, rank) for rank in range(2)]
    for epoch in range(2):
        for rank in ranks:
            rank.set_epoch(epoch)
        assert len(ranks[0]) == len(ranks[1]) == len(list(ranks[0])) == 12
        parts = [list(rank) for rank in ranks]
        for number in range(6):
            seen = [index for of_rank in parts for part in of_rank[2 * number : 2 * number + 2] for index in part]
            assert sorted(seen) == sorted(plan.examples(6 * epoch + number).tolist())


def test_an_update_that_leaves_a_rank_nothing_is_refused(sft_lengths):
    plan = make_plan(sft_lengths[:33], strategy="pad_longest", examples_per_step=16, world_size=2)
    with pytest.raises(RunFailed, match=r"(?s)update 3 has 1 examples, fewer than the 2 ranks.*data.num_rows"):
        list(PlannedShares(plan, 2, 0))


def test_a_balanced_deal_is_more_even_than_the_plans_order(sft_lengths):
    """The control of the test above: the two orders are not the same."""
    plan = make_plan(sft_lengths, strategy="pad_longest", examples_per_step=16, world_size=2)

    def padded_tokens(kind) -> np.ndarray:
        return np.array([
            [sum(len(part) * int(sft_lengths[part].max()) for part in parts[at : at + 2]) for at in range(0, 200, 2)]
            for parts in (list(kind(plan, 2, rank)) for rank in range(2))
        ])  # fmt: skip

    uneven = [np.abs(np.diff(padded_tokens(kind), axis=0)).mean() for kind in (PlannedRebalance, PlannedShares)]
    assert uneven[0] < uneven[1] / 2
