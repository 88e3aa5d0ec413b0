"""The study of pruning a real model's rows finds effects that are there, and none where there are none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from packtrain.compare.statistics import Ratio
from results import small_model
from results.page import Kept
from results.scores_real_model import run as study

ABOUT = {
    "machine": {"cpu": "a", "cores": 1, "memory_gib": 1}, "threads": 1, "command": "python results/scores_real_model/run.py",
    "packages": {"torch": "1", "transformers": "2", "peft": "3"},
}  # fmt: skip


def made_up(effects: dict[str, float], seeds: int = 5) -> dict[str, dict[str, dict]]:
    """Runs whose losses are far apart between seeds, and within a seed differ by `effects` (relative) and little noise."""
    generator = np.random.default_rng(0)
    found: dict[str, dict[str, dict]] = {}
    for name, seed, _ in study.all_runs(seeds):
        if name == study.SCORED:
            lengths = generator.integers(50, 300, 48)
            scores = {"loss": -lengths / 100, "perplexity": -1.0 * lengths, "el2n": generator.random(48)}
            figures = {"held_out": 1.4, "seconds": 48.0, "lengths": lengths.tolist()}
            figures |= {"scores": {key: values.tolist() for key, values in scores.items()}}
        else:
            loss = (1 + 0.2 * seed) * (1 + effects.get(name, 0.0) + generator.normal(0, 1e-3))
            figures = {"held_out": loss, "rows": 24, "tokens": 5_000, "updates": 6}
        found.setdefault(name, {})[str(seed)] = figures
    return found


def page_of(found) -> str:
    return study.markdown(json.loads(json.dumps(ABOUT | {"found": study.summarise(found)})))


def test_effects_are_found_and_nothing_else():
    found = study.summarise(made_up({"el2n high, 50% pruned": 0.03, "perplexity middle, 30% pruned": -0.02}))
    ratios = {name: Ratio(**row["ratio"]) for name, row in found["choices"].items() if row["ratio"]}
    assert len(ratios) == 6 and found["choices"]["random, 50% pruned"]["ratio"] is None
    assert ratios["el2n high, 50% pruned"].above_one and ratios["el2n high, 50% pruned"].estimate == pytest.approx(
        1.03, abs=3e-3
    )
    assert ratios["perplexity middle, 30% pruned"].below_one
    unclear = [name for name, ratio in ratios.items() if not ratio.above_one and not ratio.below_one]
    assert len(unclear) >= 3, "control: the same losses are not told apart"
    assert found["correlations"]["perplexity and length"] == pytest.approx([-1, -1, -1])


def test_the_page_says_what_is_not_finished():
    found = made_up({"el2n high, 50% pruned": 0.03})
    text = page_of(found)
    assert "1 worse" in text and "Not finished" not in text and "| el2n high | 50% | 24 | 5,000 |" in text
    del found["random, 10% pruned"]["4"]
    text = page_of(found)
    assert "Not finished yet: the choices without 10% of the rows." in text and "| random | 10% |" not in text


@pytest.mark.slow  # trains sixteen times, in processes of their own
def test_the_study_runs_and_goes_on_where_it_stopped(gsm8k, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(small_model, "GSM8K", gsm8k)
    tiny = small_model.Settings(held_out=4, tuning=4, pool=8, base=64, vocabulary=700, hidden=16, layers=1)
    ground = small_model.prepare_ground(tmp_path / "ground", tiny)
    lora = study.LORA | {"layers_to_transform": [0]}
    recipe = study.recipe_of
    for name, value in {
        "GSM8K": gsm8k,
        "HELD_OUT": 4,
        "recipe_of": lambda *given: recipe(*given, model=str(ground.model), lora=lora),
    }.items():
        monkeypatch.setattr(study, name, value)
    folder = tmp_path / "seed-0"
    found: dict[str, dict] = {}
    for name, seed, keep in study.all_runs(1):
        found[name] = study.one_run(name, seed, 8, keep, tmp_path)
    assert found[study.SCORED]["held_out"] != found[study.FULL]["held_out"], "control: it was trained"
    assert {found[name]["rows"] for name in found if "50%" in name} == {4} and found[study.FULL]["rows"] == 8
    assert (folder / "scores.parquet").exists()
    kept = Kept("nothing")
    kept.path = tmp_path / "kept.json"
    kept.found = {f"{name}, seed 0": figures for name, figures in found.items()}
    assert study.study(kept, 1, 8, 1, 0)[study.FULL]["0"] == found[study.FULL], "nothing is measured twice"
