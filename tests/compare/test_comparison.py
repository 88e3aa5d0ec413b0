"""Rows from runs with known answers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from packtrain.compare.comparison import summarise
from packtrain.compare.setting import facts, method
from packtrain.compare.tables import render_csv, render_markdown
from tests.compare.synthetic_runs import make_manifest, make_run

VARIANTS = [("pad_longest", "packtrain", True), ("balanced", "packtrain", True), ("bfd", "packtrain", False)]


def comparison_of(runs, variants=VARIANTS, **changes):
    return summarise(make_manifest(variants, **changes), runs)


def rounds_of(name, *rates, **changes):
    return [make_run(name, number, rate=rate, learns=number == 0, **changes) for number, rate in enumerate(rates)]


def test_speed_counts_the_timed_updates_only():
    """The first update is ten times as slow and belongs to the warm-up; the fifth and sixth come after the window."""
    row = comparison_of(rounds_of("pad_longest", 100.0)).row("pad_longest")
    assert row.tokens_per_second == pytest.approx(100.0)
    assert row.supervised_per_second == pytest.approx(50.0)
    assert row.update_seconds.median == pytest.approx(10.0)
    assert len(row.timed_runs) == row.rounds == 1


def test_speed_is_total_tokens_over_total_seconds():
    """1000 tokens in 1 s, 1000 in 1 s and 4000 in 10 s are 500 per second, whatever the median update does."""
    run = make_run("pad_longest", 0, rate=1000.0)
    run.updates[3] = type(run.updates[3])(**vars(run.updates[3]) | {"real_tokens": 4000, "seconds": 10.0})
    row = comparison_of([run]).row("pad_longest")
    assert row.tokens_per_second == pytest.approx(500.0)
    assert row.update_rate.median == pytest.approx(1000.0)


def test_ratios_pair_the_rounds():
    runs = rounds_of("pad_longest", 100.0, 50.0, 200.0) + rounds_of("balanced", 250.0, 125.0, 500.0)
    speed = comparison_of(runs).row("balanced").speed
    assert (speed.low, speed.estimate, speed.high) == pytest.approx((2.5, 2.5, 2.5))


def test_a_round_without_its_partner_does_not_count():
    runs = rounds_of("pad_longest", 100.0, 100.0) + rounds_of("balanced", 200.0, 200.0, 900.0)
    row = comparison_of(runs).row("balanced")
    assert row.speed.estimate == pytest.approx(2.0) and row.speed.pairs == 2
    assert row.rounds == 3


def test_losses_are_compared_update_by_update():
    runs = rounds_of("pad_longest", 100.0) + rounds_of("balanced", 100.0, loss_factor=1.01)
    row = comparison_of(runs).row("balanced")
    assert row.loss_difference == pytest.approx(0.01)
    assert row.norm_difference == 0.0
    assert row.held_out == pytest.approx(4.4 * 1.01) and row.per_example == pytest.approx(2.2 * 1.01)
    assert row.held_out_ratio.estimate == pytest.approx(1.01)


def test_packers_are_compared_after_the_same_updates_too():
    """4 updates instead of 6: the end of both runs, and update 4, where both were evaluated."""
    runs = rounds_of("pad_longest", 100.0) + rounds_of("bfd", 150.0, updates=4, loss_factor=1.1)
    row = comparison_of(runs).row("bfd")
    assert row.loss_difference is None  # its updates see other examples
    assert row.updates == 4
    assert row.held_out == pytest.approx(4.6 * 1.1)
    equal = row.equal_updates
    assert (equal.update, equal.loss, equal.reference) == (4, pytest.approx(4.6 * 1.1), pytest.approx(4.6))


def test_shares_padding_examples_and_memory():
    row = comparison_of(rounds_of("pad_longest", 100.0, 300.0)).row("pad_longest")
    assert row.shares == pytest.approx({"data": 0.1, "forward": 0.3, "backward": 0.5, "optimizer": 0.1})
    assert row.padding_share == pytest.approx(0.5)
    assert row.examples_per_update == (8, 8.0, 8)
    assert row.memory == 600 * 2**20


def test_waiting_is_a_share_of_the_timed_updates():
    """A tenth of every update, on two ranks; nothing is said of it where one update has none."""
    runs = [make_run("pad_longest", 0, rate=100.0, waiting_seconds=1.0)]  # updates of 10 s, after the first
    row = comparison_of(runs, ranks=2).row("pad_longest")
    assert row.waiting == pytest.approx(0.1) and sum(row.shares.values()) == pytest.approx(1.1)
    updates = [replace(update, waiting_seconds=None) if update.update == 3 else update for update in runs[0].updates]
    assert comparison_of([replace(runs[0], updates=updates)], ranks=2).row("pad_longest").waiting is None
    assert comparison_of(rounds_of("pad_longest", 100.0)).row("pad_longest").waiting is None


@pytest.mark.parametrize(("ranks", "waiting"), [(2, 1.0), (1, None)])
def test_the_tables_show_waiting_where_there_are_ranks(ranks, waiting):
    runs = rounds_of("pad_longest", 100.0, waiting_seconds=waiting)
    comparison = comparison_of(runs, ranks=ranks)
    assert ("| waiting for other ranks |" in render_markdown(comparison)) == (ranks == 2)
    assert ("| 10.0% |" in render_markdown(comparison)) == (ranks == 2)
    assert ("waiting_share" in render_csv(comparison)) == (ranks == 2)
    assert any("2 ranks" in fact for fact in facts(comparison)) == (ranks == 2)
    assert any("torchrun" in line for line in method(comparison)) == (ranks == 2)


def test_what_was_not_measured_is_none():
    runs = rounds_of("pad_longest", 100.0, examples=None, flops=None, grad_norm=None)
    row = comparison_of(runs + rounds_of("balanced", 100.0, grad_norm=None)).row("pad_longest")
    assert row.examples_per_update is None and row.flops_per_second is None
    assert row.mfu is None and row.norm_difference is None


def test_mfu_needs_a_known_peak():
    run = make_run("pad_longest", 0, rate=1000.0)  # 1e9 FLOPs per second
    on_gpu = type(run.end)(**vars(run.end) | {"device": "NVIDIA A100-SXM4-80GB", "dtype": "bfloat16"})
    known = type(run)(**vars(run) | {"end": on_gpu})
    assert comparison_of([run]).row("pad_longest").mfu is None
    assert comparison_of([known]).row("pad_longest").mfu == pytest.approx(1e9 / 312e12)


def test_a_failed_variant_is_a_row_without_figures():
    runs = rounds_of("pad_longest", 100.0) + [make_run("balanced", 0, rate=100.0, failure="OutOfMemoryError: no room")]
    comparison = comparison_of(runs)
    row = comparison.row("balanced")
    assert row.failure == "OutOfMemoryError: no room"
    assert row.tokens_per_second is None and row.speed is None and row.updates is None
    assert [row.name for row in comparison.measured] == ["pad_longest"]


def test_without_its_reference_a_variant_keeps_its_own_figures():
    runs = [make_run("pad_longest", 0, rate=100.0, failure="killed by SIGKILL"), *rounds_of("balanced", 100.0)]
    row = comparison_of(runs).row("balanced")
    assert row.tokens_per_second == pytest.approx(100.0)
    assert row.speed is None and row.loss_difference is None and row.equal_updates is None


def test_the_table_for_others_says_of_what_model_data_and_machine():
    """Stored beside the runs, it is all that many readers see."""
    data = {"examples": 100, "tokens": 9000}
    git = {"commit": "5ac5dd8e41d4bc931680741bf37c9dcfa07b391e", "changed": False}
    text = render_markdown(comparison_of(rounds_of("pad_longest", 100.0, 110.0), data=data, git=git, rounds=2))
    assert text.splitlines()[2] == (
        "llama, 1M trained parameters, float32; train.jsonl: 100 examples, 9,000 tokens; 8 examples per update, "
        "4,096 tokens per micro-batch; a processor, 2 cores, 1 thread."
    )
    assert "- 2 rounds over 1 seed; in a round every variant runs once" in text
    assert "Versions: python 3.11; packtrain's commit 5ac5dd8e41d4." in text


@pytest.mark.parametrize(("seeds", "over"), [((0, 0), "rounds"), ((0, 1), "seeds")])
def test_an_interval_is_over_seeds_where_there_are_several(seeds, over):
    comparison = comparison_of(rounds_of("pad_longest", 100.0, 110.0), seeds=seeds)
    assert any(line.endswith(f"t intervals of their logarithms over the {over}.") for line in method(comparison))
