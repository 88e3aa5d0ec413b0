"""The study of pruning says what its runs say: which choices are better than a random one, paired by seed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from packtrain.compare.statistics import Ratio
from results.page import percent
from results.scores import run as study

SEEDS, ROWS = 6, 40


def figures(held_out: float) -> dict[str, float]:
    return {"held_out": held_out, "rows": 30, "tokens": 5000, "mean_length": 50.0, "updates": 9, "cpu_seconds": 2.0}


@pytest.fixture
def found() -> dict:
    """Runs whose seeds differ by far more than their choices: `loss low` is 2% better than random, `loss high` 3% worse, the
    EL2N ones neither; without 10% of the rows one seed has not finished."""
    generator, runs = np.random.default_rng(0), {}
    effects = {("loss", "low"): 0.98, ("loss", "high"): 1.03, (study.RANDOM, None): 1.0}
    lengths = np.arange(20, 20 + ROWS)
    for seed in range(SEEDS):
        base = 3.0 + seed
        scores = {
            "loss": lengths[::-1] / 10.0,
            "perplexity": np.exp(lengths[::-1] / 10.0),
            "el2n": generator.permutation(ROWS) / 10.0,
        }
        full = {"scores": {name: values.tolist() for name, values in scores.items()}, "lengths": lengths.tolist()}
        full |= {
            "supervised": (lengths - 5).tolist(),
            "early": [1, 2],
            "scoring_seconds": lengths.sum() * 0.4 * 2 / 5000,
        }
        runs[str(seed)] = {study.FULL: figures(base * 0.9) | full}
        for pruned in study.PRUNED:
            for choice in study.CHOICES:
                if (pruned, seed) != (10, 3):
                    effect = effects.get(choice, 1.0 + 0.01 * (-1) ** seed)
                    runs[str(seed)][study.name_of(*choice, pruned)] = figures(base * effect)
    return {"base": {"before": 7.0, "after": 4.0, "tokens": 1000}, "runs": runs, "real": None}


def test_choices_are_paired_with_the_random_one_of_their_size(found):
    """Control: without the pairs, the seeds' spread hides both effects."""
    choices = study.summarise(found)["choices"]
    assert [name for name in choices if "10%" in name] == [] and len(choices) == 10
    low, high, neither = (
        Ratio(**choices[f"{name}, 50% pruned"]["ratio"]) for name in ("loss low", "loss high", "el2n low")
    )
    assert low.estimate == pytest.approx(0.98) and low.below_one
    assert high.estimate == pytest.approx(1.03) and high.above_one
    assert neither.estimate == pytest.approx(1.0, abs=1e-3) and not neither.above_one and not neither.below_one
    drawn = choices["random, 30% pruned"]
    assert drawn["against"] == study.FULL and drawn["ratio"]["estimate"] == pytest.approx(1 / 0.9)
    spread = [one[study.name_of("loss", "high", 50)]["held_out"] for one in found["runs"].values()]
    assert np.std(spread) > 10 * 0.03 * np.mean(spread) / 3


def test_the_page_says_what_was_found(found):
    result = {"found": study.summarise(found), "machine": {"cpu": "a", "cores": 1, "memory_gib": 1}, "threads": 1}
    result |= {"packages": {"torch": "1", "transformers": "2"}, "command": "python results/scores/run.py"}
    page = study.markdown(json.loads(json.dumps(result)))
    assert "Of 8 choices by a score, 2 are better than the random one of their size and 2 worse." in page
    assert (
        "**-2.0%" in page and "**+3.0%" in page and "| loss and length | -1.00 (-1.00 to -1.00) | not scored |" in page
    )
    assert "0.40x (0.40-0.40) the CPU seconds" in page and "without 10%" in page


def test_scores_keep_the_same_rows_or_others():
    scores = [np.arange(10.0), np.arange(10.0), np.arange(10.0)[::-1]]
    assert study.overlap(scores[:2], 50, "high") == 1.0 and study.overlap(scores[1:], 50, "high") == 0.0
    assert study.overlap(scores, 50, "high") == pytest.approx(1 / 3)


def test_differences_are_written_with_their_interval():
    assert percent(Ratio(estimate=1.012, low=1.004, high=1.02, pairs=5)) == "**+1.2% (+0.4 to +2.0)**"
    assert percent(Ratio(estimate=0.99, low=0.97, high=1.01, pairs=5)) == "-1.0% (-3.0 to +1.0)"
    assert percent(Ratio(estimate=0.99, low=None, high=None, pairs=1)) == "-1.0%"
