"""The conformance study sees what is right and what is wrong: a trainer known to pass, and one made to fail."""

from __future__ import annotations

import pytest

from packtrain.errors import PacktrainError
from results.conformance.questions import ON_RANKS, QUESTIONS, TOLERANCE, Asked, Setting, ask, judge
from results.conformance.rows import PACK, documents, even_rows, ragged_rows
from results.conformance.run import CONTROL, symbol
from results.conformance.settings import SETTINGS

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


def test_a_refusal_is_an_answer(tmp_path):
    def refusing(job):
        raise PacktrainError("the model is not known", fix="name another one")

    refuses = Asked(Setting(name="refuses", packages=(), build=refusing), tmp_path)
    found = ask(refuses, "gradients")
    assert found.verdict == "refused" and "the model is not known" in found.figure


def test_documents_are_found_wherever_they_lie():
    import torch

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
