"""A study that was stopped goes on where it was."""

from __future__ import annotations

import sys

import pytest

from results import page
from results.page import Kept


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["run.py", "--rounds", "2"])
    return tmp_path


def test_what_is_measured_is_not_measured_again(study):
    calls: list[str] = []

    def measure() -> dict[str, float]:
        calls.append("measured")
        return {"seconds": 1.5}

    assert Kept("speed").measure("round 0", measure) == {"seconds": 1.5}
    again = Kept("speed")
    assert again.measure("round 0", measure) == {"seconds": 1.5} and len(calls) == 1
    again.measure("round 1", measure)
    assert len(calls) == 2, "control: another part"
    again.finish()
    Kept("speed").measure("round 0", measure)
    assert len(calls) == 3, "forgotten once the page is written"


def test_figures_of_another_command_are_not_used(study, monkeypatch):
    Kept("speed").measure("round 0", lambda: 1.0)
    monkeypatch.setattr(sys, "argv", ["run.py", "--rounds", "3"])
    assert Kept("speed").measure("round 0", lambda: 2.0) == 2.0


def test_a_sitting_of_other_minutes_goes_on(study, monkeypatch):
    Kept("speed").measure("round 0", lambda: 1.0)
    monkeypatch.setattr(sys, "argv", ["run.py", "--rounds", "2", "--minutes", "5"])
    assert Kept("speed").measure("round 0", lambda: 2.0) == 1.0
    monkeypatch.setattr(sys, "argv", ["run.py", "--rounds", "4", "--minutes", "5"])
    assert Kept("speed").measure("round 0", lambda: 2.0) == 2.0, "control"
