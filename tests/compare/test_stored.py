"""The comparisons under results/ say what their runs say, and are of the recipes that stand here."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from packtrain.compare.comparison import read_comparison
from packtrain.compare.experiment import load_experiment
from packtrain.compare.tables import render_csv, render_markdown

ROOT = Path(__file__).parents[2]
STORED = sorted(path.parent for path in (ROOT / "results").glob("**/compare_*/manifest.json"))


@pytest.mark.parametrize("directory", STORED, ids=lambda path: path.name)
def test_tables_are_those_of_the_runs(directory):
    comparison = read_comparison(directory)
    assert (directory / "summary.md").read_text() == render_markdown(comparison)
    assert (directory / "summary.csv").read_text() == render_csv(comparison)


@pytest.mark.parametrize("directory", STORED, ids=lambda path: path.name)
def test_runs_are_of_the_recipe_as_it_stands(directory, tmp_path, monkeypatch):
    manifest = json.loads((directory / "manifest.json").read_text())
    _, _, recipe, *options = shlex.split(manifest["command"])
    overrides = options[1::2]  # --set KEY=VALUE
    monkeypatch.chdir(tmp_path)
    for override in overrides:
        if override.startswith("data.path="):
            file = tmp_path / override.partition("=")[2]
            file.parent.mkdir(parents=True)
            file.touch()
    assert load_experiment(ROOT / recipe, overrides).hash == manifest["hash"]
    assert load_experiment(ROOT / recipe, [*overrides, "learning_rate=1"]).hash != manifest["hash"]


def test_there_are_some():
    assert len(STORED) >= 3
