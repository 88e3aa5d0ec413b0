"""Recipes that come with packtrain, trained from the command line for a few updates on a tenth of their model and data."""

from __future__ import annotations

import json
import math

import pytest
import transformers

from packtrain.cli import main

SMALL = {
    "data.num_rows": 40,
    "data.eval_size": 8,
    "data.max_length": 1024,
    "data.overflow": "drop",
    "batching.examples_per_step": 4,
    "batching.max_tokens": 2048,
    "training.max_steps": 3,
    "training.logging_steps": 1,
    "training.use_cpu": True,
}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(
    ("recipe", "auto_class"),
    [
        ("dpo_lora", None),
        ("reward", "AutoModelForSequenceClassification"),
        ("bert_mlm", "AutoModelForMaskedLM"),
    ],
)
def test_a_shipped_recipe_trains_from_the_command_line(recipe, auto_class, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PACKTRAIN_CACHE", str(tmp_path / "cache"))
    settings = SMALL | {"training.output_dir": str(tmp_path / "run")}
    settings |= {f"model.config.{name}": size for name, size in SIZES.items()}
    with pytest.raises(SystemExit) as ended:
        main(["train", recipe, *(word for key, value in settings.items() for word in ("--set", f"{key}={value}"))])
    assert not ended.value.code, capsys.readouterr().err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    before, after = (summary[f"held_out_loss_{when}"] for when in ("before", "after"))
    assert summary["updates"] == 3 and math.isfinite(after) and after != before
    model = tmp_path / "run" / "model"
    if auto_class is None:  # an adapter, next to the reference that it is at first
        assert before == pytest.approx(math.log(2), abs=1e-6) and summary["frozen_parameters"] > 0
        assert json.loads((model / "adapter_config.json").read_text())["r"] == 16
    else:
        assert getattr(transformers, auto_class).from_pretrained(model).config.hidden_size == 32
