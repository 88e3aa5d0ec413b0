"""Every sentence stays true: what is claimed, and what is not, in each case."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from packtrain.compare.comparison import summarise
from packtrain.compare.plots import cover, curve, loss_of, losses, shown_rows
from packtrain.compare.report import stylesheet
from packtrain.compare.results import Update
from packtrain.compare.setting import method
from packtrain.compare.tables import render_latex, render_markdown
from packtrain.compare.verdict import alike_until, headliner, verdict
from tests.compare.synthetic_runs import make_manifest, make_run

OURS = [("pad_longest", "packtrain", True), ("balanced", "packtrain", True)]
PADDING_FREE, BFD = ("padding_free", "packtrain", True), ("bfd", "packtrain", False)
PEERS = [("trl:padding", "trl:padding", True), ("trl:packing_bfd", "trl:packing_bfd", False)]


def runs_of(name, *rates, **changes):
    return [make_run(name, number, rate=rate, learns=number == 0, **changes) for number, rate in enumerate(rates)]


def comparison_of(variants, *runs, **changes):
    return summarise(make_manifest(variants, **changes), [run for some in runs for run in some])


def texts(comparison, topic):
    return [sentence.text for sentence in verdict(comparison) if sentence.topic == topic]


REFERENCE = runs_of("pad_longest", 100.0, 102.0, 98.0)


def test_the_headline_has_the_ratio_and_the_loss():
    comparison = comparison_of(OURS, REFERENCE, runs_of("balanced", 240.0, 244.8, 235.2))
    first = verdict(comparison)[0]
    assert first.topic == "speed"
    assert first.text == (
        "`balanced` is 2.40x (2.40-2.40) as fast as `pad_longest`, with the same loss in every one of 6 updates "
        "(largest relative difference 0)."
    )


def test_an_unequal_loss_is_said():
    comparison = comparison_of(OURS, REFERENCE, runs_of("balanced", 240.0, 244.8, 235.2, loss_factor=1.02))
    text = verdict(comparison)[0].text
    assert "its training loss differs by up to 2.0% in one of 6 updates" in text and "same loss" not in text
    assert texts(comparison, "loss") == [
        "`balanced` sees the same examples in the same updates, but its training loss departs from that of "
        "`pad_longest` by up to 2.0% (relative); held-out at the end 4.4880 against 4.4000 (+2.0%, one seed)."
    ]


def test_losses_that_drift_apart_are_told_from_losses_that_differ():
    """Rounding grows: four updates alike, then apart. Unequal from the first update is the test above."""
    drifting = runs_of("balanced", 240.0, 244.8, 235.2)
    late = [
        Update(**vars(update) | {"loss": update.loss * (1.03 if update.update > 4 else 1)})
        for update in drifting[0].updates
    ]
    drifting[0] = replace(drifting[0], updates=late)
    comparison = comparison_of(OURS, REFERENCE, drifting)
    assert alike_until(comparison.row("balanced"), comparison.reference) == 4
    assert (
        "lies within 0.1% of that of `pad_longest` for the first 4 updates, then departs"
        in texts(comparison, "loss")[0]
    )


def test_no_loss_is_claimed_where_none_was_measured():
    runs = [*REFERENCE[1:], *runs_of("balanced", 240.0, 244.8, 235.2)[1:]]  # the rounds that only time
    text = verdict(comparison_of(OURS, runs))[0].text
    assert "loss" not in text and "2.4" in text


def test_noise_is_not_a_difference():
    text = verdict(comparison_of(OURS, REFERENCE, runs_of("balanced", 150.0, 70.0, 110.0)))[0].text
    assert text.startswith("`balanced` is neither measurably faster nor slower than `pad_longest`, 1.05x")


def test_slower_is_said_as_it_is():
    text = verdict(comparison_of(OURS, REFERENCE, runs_of("balanced", 50.0, 51.0, 49.0)))[0].text
    assert text.startswith("`balanced` is 0.50x (0.50-0.50) as fast as `pad_longest`")


def test_one_round_gives_no_interval_and_says_so():
    comparison = comparison_of(OURS, REFERENCE[:1], runs_of("balanced", 240.0), rounds=1)
    assert verdict(comparison)[0].text.startswith(
        "`balanced` was 2.40x as fast as `pad_longest` in the one round there is"
    )
    assert texts(comparison, "caution") == [
        "There is one timed round, which gives no confidence intervals; three `seeds` or more do."
    ]


def test_the_default_speaks_unless_another_is_measurably_faster():
    close = comparison_of(
        [*OURS, PADDING_FREE],
        REFERENCE,
        runs_of("balanced", 240.0, 250.0, 230.0),
        runs_of("padding_free", 241.0, 246.0, 234.0),
    )
    assert headliner(close).name == "balanced"
    clear = comparison_of(
        [*OURS, PADDING_FREE],
        REFERENCE,
        runs_of("balanced", 240.0, 250.0, 230.0),
        runs_of("padding_free", 300.0, 312.0, 288.0),
    )
    assert headliner(clear).name == "padding_free"


def test_packing_names_speed_updates_and_loss():
    comparison = comparison_of(
        [*OURS, BFD],
        REFERENCE,
        runs_of("balanced", 240.0, 244.8, 235.2),
        runs_of("bfd", 264.0, 269.28, 258.72, updates=3, loss_factor=1.1),
    )
    assert texts(comparison, "packing") == [
        "`bfd` is faster than `balanced`, 1.10x (1.10-1.10), and makes 2.0x fewer updates (3 for 6); after the same "
        "examples its held-out loss is 5.1700 against 4.4000 (+17.5%, one seed), after the same 2 updates "
        "5.2800 against 4.8000."
    ]


def test_max_steps_means_equal_updates():
    manifest = make_manifest([*OURS, BFD])
    for variant in manifest["variants"]:
        variant["ends_with_reference"] = "updates"
    runs = [
        *REFERENCE,
        *runs_of("balanced", 240.0, 244.8, 235.2),
        *runs_of("bfd", 240.0, 244.8, 235.2, loss_factor=0.9),
    ]
    (text,) = [s.text for s in verdict(summarise(manifest, runs)) if s.topic == "packing"]
    assert "makes the same number of updates (6) of other examples; after the same updates its held-out loss is" in text
    assert "(-10.0%, one seed)" in text


def test_as_many_updates_of_more_examples_are_said():
    """Under `max_steps` a packer's updates may be several times as large, and its loss lower for that alone."""
    manifest = make_manifest([*OURS, BFD])
    for variant in manifest["variants"]:
        variant["ends_with_reference"] = "updates"
    larger = runs_of("bfd", 240.0, 244.8, 235.2, examples=32)
    (text,) = [s.text for s in verdict(summarise(manifest, [*REFERENCE, *larger])) if s.topic == "packing"]
    assert "makes the same number of updates (6), of 32 examples instead of 8; after the same updates" in text


PACKER = "trl:packing_bfd"
SDPA = f"Without flash-attention, the kernel for flat batches, `{PACKER}` ran with sdpa."


def test_ahead_of_every_peer_only_if_every_interval_says_so():
    balanced = runs_of("balanced", 240.0, 244.8, 235.2)
    slow = runs_of("trl:padding", 90.0, 92.0, 88.0)
    ahead = comparison_of([*OURS, *PEERS], REFERENCE, balanced, slow, runs_of("trl:packing_bfd", 120.0, 122.4, 117.6))
    assert texts(ahead, "peers") == [
        "`balanced` is faster than both other trainers: 2.00x (2.00-2.00) as fast as `trl:packing_bfd`, the closest, "
        "and 2.67x (2.65-2.68) as fast as `trl:padding`, the closest with the same updates.",
        SDPA,
    ]
    tied = comparison_of([*OURS, *PEERS], REFERENCE, balanced, slow, runs_of("trl:packing_bfd", 200.0, 290.0, 240.0))
    assert "not measurably apart" in texts(tied, "peers")[0]
    behind = comparison_of([*OURS, *PEERS], REFERENCE, balanced, slow, runs_of("trl:packing_bfd", 480.0, 489.6, 470.4))
    assert texts(behind, "peers") == ["`trl:packing_bfd` is faster than `balanced`: 2.00x (2.00-2.00) as fast.", SDPA]
    flash = [replace(run, end=replace(run.end, attention="flash_attention_2")) for run in behind.row(PACKER).timed_runs]
    assert SDPA not in texts(comparison_of([*OURS, *PEERS], REFERENCE, balanced, slow, flash), "peers")


def test_waiting_is_said_of_ranks_and_not_of_one():
    """Updates of 4.17 s, 10 s and 11.1 s (the slowest rank's), of which the mean rank waits 0.1, 1 and 4 s."""
    waits = {"balanced": (240.0, 0.1), "pad_longest": (100.0, 1.0), "trl:padding": (90.0, 4.0)}
    runs = [runs_of(name, rate, rate, waiting_seconds=seconds) for name, (rate, seconds) in waits.items()]
    both = comparison_of([*OURS, PEERS[0]], *runs, ranks=2)
    assert texts(both, "ranks") == [
        "With `balanced`, the mean of 2 ranks waits for the others 2.4% of the time, with the rest from 10.0% "
        "(`pad_longest`) to 36.0% (`trl:padding`)."
    ]
    assert texts(comparison_of(OURS, *runs[:2], ranks=2), "ranks")[0].endswith("of the time, with `pad_longest` 10.0%.")
    assert texts(comparison_of(OURS, REFERENCE, runs_of("balanced", 240.0)), "ranks") == []


def test_no_peers_no_word_of_them():
    assert texts(comparison_of(OURS, REFERENCE, runs_of("balanced", 240.0, 244.8, 235.2)), "peers") == []


def test_a_failed_peer_is_not_beaten():
    failed = [make_run("trl:packing_bfd", 0, rate=1.0, failure="ImportError: no trl")]
    comparison = comparison_of(
        [*OURS, *PEERS, ("trl:padding_free", "trl:padding_free", True)],
        REFERENCE,
        runs_of("balanced", 240.0, 244.8, 235.2),
        runs_of("trl:padding", 90.0, 92.0, 88.0),
        runs_of("trl:padding_free", 90.0, 92.0, 88.0),
        failed,
    )
    assert "both other trainers that ran" in texts(comparison, "peers")[0]
    assert texts(comparison, "failure") == ["`trl:packing_bfd` failed: ImportError: no trl"]


def test_without_the_reference_there_are_no_ratios():
    failed = [make_run("pad_longest", 0, rate=1.0, failure="killed by SIGKILL")]
    comparison = comparison_of(OURS, failed, runs_of("balanced", 240.0, 244.8, 235.2))
    assert [sentence.topic for sentence in verdict(comparison)] == ["caution", "failure"]
    assert verdict(comparison)[0].text == "The reference, `pad_longest`, was not timed, so there are no ratios to it."


def test_nothing_measured_nothing_claimed():
    failed = [make_run(name, 0, rate=1.0, failure="RunFailed: the loss is nan") for name in ("pad_longest", "balanced")]
    assert [sentence.topic for sentence in verdict(comparison_of(OURS, failed))] == ["failure", "failure", "caution"]


@pytest.mark.parametrize(
    ("strategy", "rate", "expected"),
    [
        ("balanced", 120.0, "picks `balanced`: right, no variant with the same updates was measurably faster."),
        ("balanced", 300.0, "picks `balanced`: wrong here, `padding_free` was faster, 1.25x (1.25-1.25)."),
        ("group_by_length", 120.0, "picks `group_by_length`, which was not among the variants."),
    ],
)
def test_the_recommendation_is_judged(strategy, rate, expected):
    comparison = comparison_of(
        [*OURS, PADDING_FREE],
        REFERENCE,
        runs_of("balanced", 240.0, 244.8, 235.2),
        runs_of("padding_free", rate, rate * 1.02, rate * 0.98),
        recommendation={"strategy": strategy, "reasons": []},
    )
    (text,) = texts(comparison, "recommendation")
    assert text.endswith(expected)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "wrong here, `balanced 8k` was faster, 1.25x (1.25-1.25)."),  # control: it only has another name
        ({"batching": {"max_tokens": 8192}}, "right, no variant with the same updates was measurably faster."),
        ({"training": {"learning_rate": 1e-2}}, "right, no variant with the same updates was measurably faster."),
    ],
)
def test_a_variant_with_settings_of_its_own_does_not_judge_the_recommendation(changes, expected):
    """It was made for the recipe's settings: twice as many tokens at once make no other strategy the right one."""
    own = ("balanced 8k", "packtrain", True)
    manifest = make_manifest([*OURS, own], recommendation={"strategy": "balanced", "reasons": []})
    recipe = manifest["variants"][2]["recipe"]
    recipe["batching"]["strategy"] = "padding_free"
    for section, change in changes.items():
        recipe[section] |= change
    runs = [REFERENCE, runs_of("balanced", 240.0, 244.8, 235.2), runs_of("balanced 8k", 300.0, 306.0, 294.0)]
    (text,) = texts(summarise(manifest, [run for some in runs for run in some]), "recommendation")
    assert text.endswith(f"picks `balanced`: {expected}")
    if changes:  # and where nothing else has the strategy, nothing was judged
        manifest["variants"] = [manifest["variants"][0], manifest["variants"][2]]
        recipe["batching"]["strategy"] = "balanced"
        (text,) = texts(summarise(manifest, [*runs[0], *runs[2]]), "recommendation")
        assert text.endswith("picks `balanced`, which ran with settings of its own only.")


def test_the_method_says_where_the_timing_of_a_short_run_ends():
    """A packer of few rows has fewer updates than are timed; control: runs that are all as long."""
    runs = [REFERENCE, runs_of("balanced", 240.0, 244.8, 235.2), runs_of("bfd", 250.0, 255.0, 245.0, updates=3)]
    said = "Speed: real tokens over seconds of updates 2 to 4"
    assert method(comparison_of([*OURS, BFD], *runs))[1].startswith(
        f"{said}, or to the end of a shorter run (the shortest ends after 3). Ratios"
    )
    assert method(comparison_of(OURS, *runs[:2]))[1].startswith(f"{said}. Ratios")


def test_losses_of_other_predictions_are_not_compared():
    """Masked answers with a rainbow behind them have a higher loss than with eos alone, and are no worse for it."""
    manifest = make_manifest(OURS)
    for variant, tail in zip(manifest["variants"], ("eos", "rainbow"), strict=True):
        variant["recipe"]["objective"] = {"name": "masked_diffusion", "tail": tail}
    runs = [*REFERENCE, *runs_of("balanced", 240.0, 244.8, 235.2, loss_factor=1.1)]
    compared = summarise(manifest, runs)
    assert "+10.0%" in render_markdown(compared)  # control
    manifest["variants"][1]["scores_like_reference"] = False
    comparison = summarise(manifest, runs)
    assert verdict(comparison)[0].text == "`balanced` is 2.40x (2.40-2.40) as fast as `pad_longest`."
    assert texts(comparison, "loss") == [
        "`balanced` is scored on other predictions than `pad_longest` (tail rainbow for eos), so their losses are not "
        "compared."
    ]
    assert "%" not in render_markdown(comparison).split("|---")[0].replace("95%", "")
    (line,) = [line for line in render_latex(comparison).splitlines() if line.startswith("balanced ")]
    assert "4.8400 (of other predictions)" in line and "of other predictions" not in render_latex(compared)
    assert loss_of(comparison.row("balanced"), comparison) == ""
    assert "not drawn, scored on other predictions: balanced" in " ".join(next(losses(comparison)).split())
    assert "not drawn" not in next(losses(compared))


def test_the_strategy_of_the_recipe_is_spoken_of():
    """Slower than the fastest that packs, it had no sentence and no bar; control: another's has none."""
    own = ("packing:mine", "packtrain", False)
    runs = [REFERENCE, runs_of("balanced", 240.0, 244.8, 235.2), runs_of("bfd", 300.0, 306.0, 294.0, updates=4)]
    runs.append(runs_of("packing:mine", 200.0, 204.0, 196.0, updates=3, loss_factor=1.1))
    comparison = comparison_of([*OURS, BFD, own], *runs, own_strategy="packing:mine")
    assert verdict(comparison)[0].text.startswith("`balanced` is 2.40x")
    assert texts(comparison, "speed")[1].startswith(
        "`packing:mine`, the recipe's own strategy, is faster than `pad_longest`, 2.00x (2.00-2.00), and is slower than "
        "`balanced`, 0.83x (0.83-0.83), and makes 2.0x fewer updates (3 for 6); after the same examples its held-out"
    )
    assert [row.name for row in shown_rows(comparison)] == ["pad_longest", "balanced", "bfd", "packing:mine"]
    other = comparison_of([*OURS, BFD, ("ffd", "packtrain", False)], *runs[:3], runs_of("ffd", 200.0, 204.0, 196.0))
    assert len(texts(other, "speed")) == 1 and "ffd" not in [row.name for row in shown_rows(other)]


@pytest.mark.parametrize("count", [6, 7])
def test_of_a_few_that_pack_each_is_spoken_of(count):
    """Of seven only the fastest."""
    names = [f"packs{number}" for number in range(count)]
    runs = [runs_of(name, 250.0 + n, 255.0 + n, 245.0 + n, updates=4) for n, name in enumerate(names)]
    variants = [*OURS, *((name, "packtrain", False) for name in names)]
    said = texts(comparison_of(variants, REFERENCE, runs_of("balanced", 240.0, 244.8, 235.2), *runs), "packing")
    assert [sum(f"`{name}`" in text for text in said) for name in names] == [int(count == 6)] * (count - 1) + [1]
    assert (
        count == 7
        or "`packs0` 1.04x (1.04-1.04) as fast (held-out loss after the same examples +4.5%, one seed)" in said[1]
    )


def learning_runs_of(name, *factors, rate=100.0, **changes):
    """One run to the end for each seed, its losses times a factor."""
    return [make_run(name, seed, rate=rate, loss_factor=factor, **changes) for seed, factor in enumerate(factors)]


def test_a_difference_of_losses_over_seeds_has_its_interval():
    """As a speed has; without it nobody can say whether seeds explain it. Control: of one seed it says so, see above."""
    runs = [learning_runs_of(name, 1, 1, 1) for name in ("pad_longest", "balanced")]
    runs.append(learning_runs_of("bfd", 1.09, 1.10, 1.11, updates=4, rate=200.0))
    comparison = comparison_of([*OURS, BFD], *runs, seeds=range(3))
    assert (
        "its held-out loss is 5.0600 against 4.4000 (+15.0%, +12.4 to +17.6), after" in texts(comparison, "packing")[0]
    )
    assert "| 5.0600 | +15.0% (+12.4 to +17.6) |" in render_markdown(comparison)
    assert "| 4.4000 | 0% |" in render_markdown(comparison)  # balanced, whose losses are the reference's


def test_another_learning_rate_is_named_and_no_defect():
    """It was asked for, and such a variant does not speak for its strategy; control: the test of unequal losses."""
    tuned = [("balanced fast", "packtrain", True), ("bfd fast", "packtrain", False)]
    manifest = make_manifest([*OURS, *tuned])
    for variant in manifest["variants"][2:]:
        variant["recipe"]["training"] = {"num_train_epochs": 1, "learning_rate": 6e-3}
        variant["recipe"]["batching"]["strategy"] = variant["name"].removesuffix(" fast")
    manifest["variants"][0]["recipe"]["training"]["learning_rate"] = 3e-3
    manifest["variants"][1]["recipe"]["training"]["learning_rate"] = 3e-3
    manifest["variants"] = [manifest["variants"][number] for number in (0, 2, 1, 3)]
    runs = [REFERENCE, runs_of("balanced", 240.0, 244.8, 235.2), runs_of("bfd fast", 250.0, 255.0, 245.0, updates=4)]
    runs.append(runs_of("balanced fast", 250.0, 255.0, 245.0, loss_factor=0.9))
    comparison = summarise(manifest, [run for some in runs for run in some])
    assert verdict(comparison)[0].text.startswith(
        "`balanced` is 2.40x (2.40-2.40) as fast as `pad_longest`, with the same"
    )
    assert texts(comparison, "loss") == [
        "`balanced fast` sees the same examples in the same updates as `pad_longest`, with learning_rate 0.006 for 0.003: "
        "its training loss differs by up to 10.0% (relative); held-out at the end 3.9600 against 4.4000 (-10.0%, one seed)."
    ]
    assert (
        "; with learning_rate 0.006 for 0.003, after the same examples its held-out" in texts(comparison, "packing")[0]
    )


def test_a_figure_says_what_its_variants_share():
    """Two batch sizes were `packed over the whole epoch`, only the faster was drawn, and eos tails were plain padding."""
    variants = [("eos", "packtrain", True), ("same", "packtrain", True)]
    variants += [(f"{size} examples", "packtrain", False) for size in (4, 16)]
    manifest = make_manifest(variants)
    runs = [run for name, *_ in variants for run in runs_of(name, 100.0, 102.0, 98.0)]
    packed = cover(summarise(manifest, runs), stylesheet())  # control: of strategies that are not known, and so pack
    for variant in manifest["variants"]:
        variant["recipe"]["batching"]["strategy"] = "balanced"
    drawn = cover(summarise(manifest, runs), stylesheet())
    assert all(text in drawn for text in ("the same updates as eos", "other updates", "4 examples", "16 examples"))
    assert "other updates" not in packed and len(re.findall("(?:4|16) examples [0-9.]+x", packed)) == 1
    assert len(re.findall("(?:4|16) examples [0-9.]+x", drawn)) == 2
    assert "packed over the whole epoch, the fastest of 2" in packed and "packed over" not in drawn


def test_a_mean_over_few_updates_does_not_hide_the_end():
    """All of five updates were averaged: a loss that fell from 5 to 4.6 was drawn to end at 4.8."""
    (run,) = runs_of("pad_longest", 100.0, updates=5)
    comparison = comparison_of(OURS, [replace(run, held_out=[])], [])
    assert "pad_longest 4.6000" in next(losses(comparison)) and "mean of" not in next(losses(comparison))
    (long,) = runs_of("pad_longest", 100.0, updates=30)
    assert "training loss, mean of 3 updates" in next(losses(comparison_of(OURS, [replace(long, held_out=[])], [])))
    assert curve(run, "update", 2)[1] == pytest.approx([5.0, 4.95, 4.85, 4.75, 4.65])
