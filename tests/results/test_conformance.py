"""The conformance study sees what is right and what is wrong: a trainer known to pass, and one made to fail."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch

from packtrain.errors import PacktrainError
from results.conformance import environments
from results.conformance import run as study
from results.conformance.questions import ON_RANKS, QUESTIONS, TOLERANCE, Answer, Asked, Setting, ask, judge
from results.conformance.rows import PACK, documents, even_rows, ragged_rows
from results.conformance.run import CONTROL, markdown, missing, reproducers, symbol
from results.conformance.settings import SETTINGS, stock
from results.page import RESULTS

QUICK = ("isolated", "first labels", "positions", "gradients", "micro-batches")
OTHERS = tuple(name for name in QUESTIONS if name not in (*QUICK, *ON_RANKS))


@pytest.fixture
def asked(tmp_path):
    def make(name: str) -> Asked:
        (tmp_path / name).mkdir()
        return Asked(SETTINGS[name], tmp_path / name)

    return make


def test_padding_passes(asked):
    padding = asked("Trainer, DataCollatorForSeq2Seq")
    assert {name: ask(padding, name).verdict for name in QUICK} == dict.fromkeys(QUICK, "yes")


def test_the_control_fails(asked):
    control = asked(CONTROL)
    answers = {name: ask(control, name) for name in QUICK}
    assert {name: answer.verdict for name, answer in answers.items()} == dict.fromkeys(QUICK, "no")
    assert float(answers["isolated"].figure) > 1e-4  # far above the tolerance
    assert answers["positions"].figure == "7 of 8"  # all but the first


@pytest.mark.ci
@pytest.mark.slow  # trains some twenty times
def test_every_other_question_sees_the_control(asked):
    control = asked(CONTROL)
    assert {name: ask(control, name).verdict for name in OTHERS} == dict.fromkeys(OTHERS, "no")


@pytest.mark.ci
@pytest.mark.slow  # trains some twenty times
def test_a_recipe_passes(asked):
    balanced = asked("packtrain, balanced")
    wanted = [name for name in QUESTIONS if name not in ON_RANKS]
    assert {name: ask(balanced, name).verdict for name in wanted} == dict.fromkeys(wanted, "yes")


def test_isolation_is_no_matter_of_first_labels(tmp_path):
    """Documents that attention keeps apart are isolated, though the last token of each learns the first of the next."""

    def supervising_all(job):
        trainer = stock(job, "flattening")
        inner = trainer.data_collator
        trainer.data_collator = lambda rows: (batch := inner(rows)) | {"labels": batch["input_ids"].clone()}
        return trainer

    asked = Asked(Setting(name="all", packages=(), build=supervising_all), tmp_path)
    answers = [ask(asked, name).verdict for name in ("isolated", "first labels")]
    assert answers == ["yes", "no"]


def test_a_refusal_is_an_answer(tmp_path):
    def refusing(job):
        raise PacktrainError("the model is not known", fix="name another one")

    refuses = Asked(Setting(name="refuses", packages=(), build=refusing), tmp_path)
    found = ask(refuses, "gradients")
    assert found.verdict == "refused" and "the model is not known" in found.figure


def test_documents_are_found_wherever_they_lie():
    first, second, *_ = even_rows()
    ids = torch.tensor([[*first.ids[5:], *second.ids, 0]])
    found = documents(ids, ids == 0)
    border = len(first.ids) - 5
    assert [(one.start, one.stop, one.example) for one in found] == [(0, border, None), (border, border + 24, 1)]


def test_rows_are_what_the_questions_take_for_granted():
    assert sum(len(row.ids) for row in even_rows()) == 4 * PACK
    assert max(len(row.ids) for row in ragged_rows(48)) <= PACK
    assert len({row.ids[0] for row in ragged_rows(48)}) == 48


def test_figures_below_the_tolerance_are_a_yes():
    assert judge(TOLERANCE / 2).verdict == "yes" and judge(TOLERANCE * 2).verdict == judge(float("nan")).verdict == "no"
    assert symbol({"verdict": "no", "figure": "2e-03"}) == "**no** 2e-03"


# What is stored


@pytest.fixture(scope="module")
def stored():
    return json.loads((RESULTS / "conformance" / "bench.json").read_text(encoding="utf-8"))


def test_the_stored_table_is_of_these_settings_questions_and_reproducers(stored):
    assert missing(stored, SETTINGS) == [] and stored["left_out"] == {}
    assert list(stored["cells"]) == list(stored["versions"]) == list(SETTINGS)
    codes = {name: script.read_text(encoding="utf-8") for name, (_, script) in reproducers().items()}
    assert {name: one["code"] for name, one in stored["reproducers"].items()} == {
        name: code.split('"""', 2)[2].strip() for name, code in codes.items()
    }


def test_a_setting_or_a_question_that_was_not_run_is_missed(stored):
    before = copy.deepcopy(stored)
    del before["cells"]["packtrain, balanced"]["gradients"], before["cells"][CONTROL]
    assert missing(before, SETTINGS) == [("packtrain, balanced", "gradients")] + [(CONTROL, one) for one in QUESTIONS]


def test_the_stored_page_is_that_of_the_stored_table(stored):
    assert (RESULTS / "conformance" / "README.md").read_text(encoding="utf-8") == markdown(stored)


def test_the_stored_control_fails_all_and_what_was_not_asked_is_no_yes(stored):
    assert {cell["verdict"] for cell in stored["cells"][CONTROL].values()} == {"no"}
    for name, setting in SETTINGS.items():
        for question, reason in setting.not_asked.items():
            assert stored["cells"][name][question] == {"verdict": "not asked", "figure": reason}


# Peers


def test_every_peer_has_an_environment_with_pinned_versions():
    assert {setting.environment for setting in SETTINGS.values()} == {"", *environments.PINNED}
    assert all("==" in pin for pins in environments.PINNED.values() for pin in pins)


def test_what_a_peer_cannot_be_asked_is_not_asked(tmp_path):
    def building(job):
        raise AssertionError("it was asked")

    setting = Setting(name="peer", packages=(), build=building, not_asked={"resume": "it has no checkpoints"})
    assert ask(Asked(setting, tmp_path), "resume") == Answer("not asked", "it has no checkpoints")
    assert symbol({"verdict": "not asked", "figure": "it has no checkpoints"}) == "not asked"


def test_an_environment_is_made_once_and_says_why_it_could_not_be(tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "PLACE", tmp_path)
    monkeypatch.setattr(environments, "PINNED", {"peer": ("packtrain-has-no-such-peer @ file:///nowhere.whl",)})
    assert "nowhere.whl" in environments.make("peer")
    assert environments.python_of("peer").exists() and environments.python_of("").samefile(sys.executable)
    (tmp_path / "peer" / "installed.txt").write_text("\n".join(environments.PINNED["peer"]), encoding="utf-8")
    assert environments.make("peer") == environments.make("") == ""  # nothing is installed again


def test_answers_of_a_process_are_kept_and_a_cell_that_ends_it_is_one(tmp_path, monkeypatch):
    """A stand-in for an interpreter of a peer answers one question and ends."""
    python = tmp_path / "python"
    line = json.dumps({"setting": "peer", "question": "size", "verdict": "yes", "figure": ""})
    python.write_text(f'#!/bin/sh\ncase "$3" in *size*) echo \'{line}\' >> "$4";; esac\nexit 1\n', encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setattr(study, "python_of", lambda environment: python)
    kept = []
    study.ask("peer", {"peer": ["size", "once"]}, ranks=1, keep=kept.append)
    assert [(one["question"], one["verdict"]) for one in kept] == [("size", "yes"), ("once", "failed")]


def test_a_stored_reproducer_needs_no_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "make", lambda environment: "pip failed")
    (script := tmp_path / "one.py").write_text('"""It prints\none."""\n\nprint(1)\n', encoding="utf-8")
    before = {"says": "It prints.", "code": "print(1)", "prints": "1"}
    assert study.reproduced("peer", script, before) == before | {"says": "It prints one."}
    assert study.reproduced("peer", script, before | {"code": "print(2)"}) == {}  # and where it can't be run anew
