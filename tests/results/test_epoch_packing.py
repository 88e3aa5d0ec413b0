"""The study of packing over the epoch says what its runs say: what tuning the learning rate closes of the gap."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from packtrain.compare.statistics import Difference, paired_difference
from results.epoch_packing import run as study
from results.page import signed

SEEDS = 6
BEST = {study.BALANCED: "0.001", study.BFD: "0.002", study.SMALL: "0.001", study.SHORT: "0.004"}
UPDATES = {study.BALANCED: 96, study.BFD: 22, study.SMALL: 96, study.SHORT: 22, study.UNTUNED: 22}
BASE = {"parameters": 1000, "tokens": 10_000, "rows": 50, "held_out": {"0": 6.0, "10": 3.5, "20": 3.0}}


def one_run(arm: str, loss: float) -> dict:
    tokens = 22_000 if arm == study.SHORT else 90_000
    return {"loss": loss, "updates": UPDATES[arm], "tokens": tokens, "examples": tokens // 250, "deviation": 10.0}


@pytest.fixture
def found() -> dict:
    """Seeds that differ by far more than the ways: bfd is 0.05 worse at the rate of balanced and no different at its own,
    small packs 0.02 better, and a run cut short 0.2 worse."""
    effects = {study.BALANCED: 0.0, study.UNTUNED: 0.05, study.SMALL: -0.02, study.SHORT: 0.2}
    runs = {
        str(seed): {arm: one_run(arm, 2.0 + 0.1 * seed + effects.get(arm, 0.001 * (-1) ** seed)) for arm in UPDATES}
        for seed in range(SEEDS)
    }
    tuning = {
        arm: {
            f"{rate:g}": [{"loss": 3.0 + (f"{rate:g}" != best) + 0.1 * seed} for seed in range(2)]
            for rate in study.RATES
        }
        for arm, best in BEST.items()
    }
    return {"tuning": tuning, "rates": study.choose_rates(tuning), "runs": runs}


def page_of(found: dict) -> str:
    result = {
        "found": study.summarise(found),
        "base": BASE,
        "threads": 1,
        "command": "python results/epoch_packing/run.py",
    }
    result |= {"machine": {"cpu": "a", "cores": 1, "memory_gib": 1}, "packages": {"torch": "1", "transformers": "2"}}
    return study.markdown(json.loads(json.dumps(result)))


def test_every_arm_gets_the_rate_that_was_best_for_it(found):
    assert found["rates"] == {arm: float(rate) for arm, rate in BEST.items()}
    found["tuning"][study.BFD]["0.0005"][0]["loss"] = 0.0  # one lucky seed is half of a mean
    assert study.choose_rates(found["tuning"])[study.BFD] == 5e-4
    found["tuning"][study.BFD]["0.0005"][1]["loss"] = 99.0
    assert study.choose_rates(found["tuning"])[study.BFD] == 2e-3


def test_ways_are_paired_by_seed(found):
    """Control: without the pairs, the seeds' spread hides all but the largest effect."""
    arms = study.summarise(found)["arms"]
    untuned, tuned, small = (Difference(**arms[arm]["difference"]) for arm in (study.UNTUNED, study.BFD, study.SMALL))
    assert untuned.estimate == pytest.approx(0.05) and untuned.is_clear
    assert small.estimate == pytest.approx(-0.02) and small.is_clear
    assert tuned.estimate == pytest.approx(0.0, abs=1e-9) and not tuned.is_clear
    assert np.std([one[study.BALANCED]["loss"] for one in found["runs"].values()]) > 0.1
    equal = Difference(**study.summarise(found)["equal_updates"])
    assert equal.estimate == pytest.approx(-0.2) and equal.is_clear


def test_the_page_says_that_tuning_closes_the_gap(found):
    page = page_of(found)
    assert (
        "| bfd at the rate of balanced | 22 | 4,091 (10) | 0.001 |" in page
        and "**+0.0500 (+0.0500 to +0.0500)**" in page
    )
    assert "Tuning closes the gap" in page and "can't be told from it" in page
    assert "`bfd, small packs` is better by 0.0200" in page and "has read 4.1 times the tokens" in page
    assert "At an edge" not in page and "**3.0500**" in page


def test_the_page_says_how_much_tuning_leaves(found):
    for number, of_seed in enumerate(found["runs"].values()):
        of_seed[study.BFD] = one_run(study.BFD, of_seed[study.BALANCED]["loss"] + 0.02 + 0.001 * (-1) ** number)
    page = page_of(found)
    assert "Tuning closes 60% of the gap, and leaves the rest." in page and "Tuning closes the gap" not in page


def test_the_page_says_where_the_grid_ends(found):
    found["tuning"][study.BFD]["0.008"] = [{"loss": 1.0}, {"loss": 1.0}]
    found["rates"] = study.choose_rates(found["tuning"])
    assert "a better rate may lie beyond: bfd." in page_of(found)
    found["rates"][study.BFD] = found["rates"][study.BALANCED]
    assert "so that tuning changes nothing for `bfd`" in page_of(found)


def test_arms_see_the_examples_that_they_should():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.3, 0.4, 384), 60, 800).astype(np.int64)
    plans = {arm: study.plan_of(arm, lengths, 3) for arm in study.ARMS}
    balanced, bfd, small, short = plans.values()
    for plan in (balanced, bfd, small):
        seen = np.concatenate([plan.examples(step) for step in range(plan.total_steps)])
        assert sorted(seen.tolist()) == list(range(384))
    assert balanced.total_steps == small.total_steps == 96, "as many updates, and so as many tokens in each"
    assert bfd.total_steps == short.total_steps < 96 / 3
    for step in range(short.total_steps):
        assert short.examples(step).tolist() == balanced.examples(step).tolist()
    tighter = study.make_plan(
        lengths, strategy="bfd", seed=3, max_tokens=small.scope.max_tokens - 1, gradient_accumulation_steps=1
    )
    assert tighter.total_steps > 96 or small.scope.max_tokens == -(-lengths.sum() // 96), (
        "control: the smallest capacity"
    )


def test_differences_are_written_with_their_interval():
    clear = paired_difference([1.012, 2.010, 3.011], [1.0, 2.0, 3.0])
    assert signed(clear, 3) == "**+0.011 (+0.009 to +0.013)**"
    assert signed(replace(clear, low=-0.001), 3) == "+0.011 (-0.001 to +0.013)"
    assert signed(paired_difference([0.5], [1.0]), 2) == "-0.50"
