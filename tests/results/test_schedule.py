"""The study of schedules says what its runs say, at as many tokens and FLOPs, and only of what is finished."""

from __future__ import annotations

import json

import numpy as np
import pytest

from packtrain.compare.statistics import Ratio
from results.schedule import run as study


def figures(losses: list[float], seconds: float, tokens: list[int]) -> dict:
    return {
        "held_out": losses, "updates": 30, "ends": [10, 20, 30], "cpu_seconds": seconds, "tokens": tokens,
        "flops": [float(count) for count in tokens], "largest_gradient": 2.0,
    }  # fmt: skip


@pytest.fixture
def runs() -> dict:
    """Seeds of very different losses; with the schedule a third of the tokens is 5% better, and the whole no different."""
    ways: dict[str, list] = {way: [] for way in study.WAYS}
    for seed, base in enumerate([2.0, 3.0, 4.0, 5.0, 6.0]):
        noise = 1 + 0.01 * (-1) ** seed
        ways["without"].append(figures([2 * base, 1.5 * base, base], 10.0 + seed, [100, 200, 300]))
        ways["with"].append(figures([1.9 * base, 1.5 * base * noise, base], 11.0 + 1.1 * seed, [90, 210, 300]))
    return {"0.003": ways}


PLANS = {
    "tokens": 300, "longest": 90, "median": 20.0, "attention_share": 0.25,
    "phases": [{"until": 0.1, "longest": 64, "examples": 5, "examples_per_update": 5, "tokens_per_update": [30, 30.0, 30],
                "updates": 1}],
    "padding": {"pad_longest": {"without": [2.0, 2.0], "with": [1.5, 1.5]}},
}  # fmt: skip


def test_ways_are_paired_by_seed(runs):
    found = study.compare_ways(runs)["0.003"]
    first, second, last = (Ratio(**ratio) for ratio in found["held_out"])
    assert first.estimate == pytest.approx(0.95) and first.below_one
    assert second.estimate == pytest.approx(1.0, abs=0.01) and not second.below_one and not second.above_one
    assert last.estimate == pytest.approx(1.0) and not last.below_one
    assert found["tokens"][0]["estimate"] == pytest.approx(0.9)
    assert found["cpu_seconds"]["estimate"] == pytest.approx(1.1)
    assert np.std([one["held_out"][0] for one in runs["0.003"]["without"]]) > 1, "control: pairs are needed to see it"
    result = {
        "found": {"0.003": found},
        "plans": PLANS,
        "machine": {"cpu": "a", "cores": 1, "memory_gib": 1},
        "threads": 1,
    }
    result |= {"packages": {"torch": "1", "transformers": "2"}, "command": "python results/schedule/run.py"}
    page = study.markdown(json.loads(json.dumps(result)))
    assert "| 0.003 | 33% | 8.0000 | 7.6000 | **-5.0% (-5.0 to -5.0)** | 0.900x | 0.900x |" in page
    assert (
        "1.10x (1.10-1.10) the CPU seconds" in page and "1.50 tokens for every real one instead of 2.00: 0.75x" in page
    )
    assert "Attention is 25.0% of the FLOPs" in page


def test_an_epoch_of_other_tokens_is_no_comparison(runs):
    runs["0.003"]["with"][0]["flops"][-1] *= 1.001
    with pytest.raises(AssertionError, match="other tokens or FLOPs"):
        study.compare_ways(runs)


def test_parts_end_where_their_tokens_are_nearest():
    assert study.ends_of(np.array([10, 10, 10, 10, 10, 10])) == [2, 4, 6]
    assert study.ends_of(np.array([40, 10, 10, 10, 10, 10])) == [1, 3, 6]


@pytest.mark.ci
@pytest.mark.slow  # trains twice
def test_both_ways_see_every_example_once(tmp_path, monkeypatch):
    study.write_rows(tmp_path, 160)
    found = {way: study.run(tmp_path, way, 3e-3, 0) for way in study.WAYS}
    plans = study.look_at_plans(tmp_path, 1)
    assert {one["tokens"][-1] for one in found.values()} == {plans["tokens"]}
    assert found["with"]["flops"][-1] == pytest.approx(found["without"]["flops"][-1], rel=1e-12)
    assert found["with"]["flops"][0] / found["with"]["tokens"][0] < 0.97 * (
        found["without"]["flops"][0] / found["without"]["tokens"][0]
    ), "short examples first: less attention at the beginning"
    assert [phase["updates"] for phase in plans["phases"]] and 0.05 < plans["attention_share"] < 0.9
    assert all(1 <= value for ways in plans["padding"].values() for values in ways.values() for value in values)
