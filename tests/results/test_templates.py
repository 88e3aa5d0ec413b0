"""The study of chat templates notices what it looks for: text that is lost, tokens that are wrongly learnt, other ids."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from results.templates.cells import encode, judge
from results.templates.conversations import CONVERSATIONS, FAMILY
from results.templates.peer import compare, verdict
from results.templates.reference import Renderer, align, expect, tokens_in
from results.templates.run import TEMPLATES, judge_all, summary, symbol, templates
from results.templates.vocabularies import TOKENIZERS

SOURCES = templates()
SOME = ("gemma4", "phi3", "qwen3")


@pytest.mark.parametrize("name", SOME)
def test_no_cell_fails(name):
    cells = judge_all({key: SOURCES[key] for key in (name, f"{name}_training") if key in SOURCES})[name]
    found = summary({name: cells})
    assert found["silent failures"] == 0 and found["complete"] > 20 and found["by spans"] > 10
    assert found["complete"] + found["noted"] + found["refused"] == found["cells"] == 2 * len(CONVERSATIONS)
    assert {symbol(pair) for kinds in cells.values() for pair in kinds.values()} <= {"+", "n", "w", "r"}


def test_all_templates_of_trl_are_there():
    assert len(SOURCES) == len(list(TEMPLATES.glob("*.jinja"))) >= 60
    assert sum(f"{name}_training" in SOURCES for name in SOURCES) >= 25


# --- planted faults ------------------------------------------------------------------------------------------------


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param](SOURCES["qwen3"])


@pytest.fixture
def failures(tokenizer):
    """A function that judges a row whose mask was changed."""

    def judged(row: dict, change=lambda factors: factors) -> list[str]:
        (one,) = encode(tokenizer, [row], assistant_only=True)
        changed = replace(one, factors=change(one.factors.copy()))
        return judge(tokenizer, row, changed, SOURCES["qwen3_training"]).failures

    return judged


@pytest.mark.parametrize("kind", ["multi-turn", "emoji, right to left", "blanks"])
@pytest.mark.parametrize("step", [-1, 1])
def test_a_mask_that_is_off_by_one_fails(kind, step, failures):
    row = CONVERSATIONS[kind]
    assert failures(row) == []
    assert "wrongly" in failures(row, lambda factors: np.roll(factors, step))[0]


def test_a_turn_that_is_not_learnt_fails(failures):
    def forget_the_last(factors):
        factors[np.flatnonzero(np.diff(factors))[-1] + 1 :] = 0
        return factors

    found = failures(CONVERSATIONS["multi-turn"], forget_the_last)
    assert any("wrongly not learnt" in failure for failure in found)
    assert any("don't decode to 'Rome is that one.'" in failure for failure in found)


def test_a_question_that_is_learnt_fails(failures):
    found = failures(CONVERSATIONS["multi-turn"], np.ones_like)
    assert any("And that of Italy?" in failure for failure in found if "none of the turn's words" in failure)


def test_factors_are_compared(failures):
    row = CONVERSATIONS["switches"]
    assert failures(row) == []
    assert failures(row, np.ceil)


def test_lost_text_fails(tokenizer):
    """The template leaves out the first system message, and no remark says so."""
    row = CONVERSATIONS["system"]
    assert not judge(tokenizer, row, *encode(tokenizer, [row], assistant_only=True), None).failures
    tokenizer.chat_template = SOURCES["qwen3"].replace("messages[0].content", "''")
    (one,) = encode(tokenizer, [row], assistant_only=True, on_lost_content="warn")
    found = judge(tokenizer, row, replace(one, remarks=[]), None).failures
    assert any("nobody says so: ['Answer in one word" in failure for failure in found)


def test_ids_of_another_text_fail(tokenizer):
    row, other = CONVERSATIONS["plain"], CONVERSATIONS["short"]
    (one,) = encode(tokenizer, [other], assistant_only=True)
    assert judge(tokenizer, row, one, None).failures == ["the ids spell no rendering of the row"]


@pytest.mark.parametrize("problem", ["no", "messages[1]: no", "use `data.on_lost_content: warn`"])
def test_a_refusal_without_turn_or_fix_fails(problem, tokenizer):
    row = CONVERSATIONS["plain"]
    (one,) = encode(tokenizer, [row], assistant_only=True)
    assert judge(tokenizer, row, replace(one, problem=problem), None).failures
    assert not judge(tokenizer, row, replace(one, problem="messages[1]: no; use `data.roles`"), None).failures


# --- references ----------------------------------------------------------------------------------------------------


def test_tokens_of_a_part_of_a_character_are_in_its_span(tokenizer):
    text = f"a {FAMILY}b"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    places = align(tokenizer, ids, text)
    assert len(ids) > len(text) and align(tokenizer, ids, "a b") is None
    inside = tokens_in([(2, 3)], text, places)  # the first of the family
    assert [ids[n] for n in np.flatnonzero(inside)] == tokenizer(text[2], add_special_tokens=False)["input_ids"][-4:]


@pytest.mark.parametrize(
    ("name", "kind", "reference", "rules", "learnt"),
    [
        ("qwen3", "plain", "training markers", (), ["<think>\n\n</think>\n\nParis is the capital.<|im_end|>\n"]),
        (
            "gptoss", "plain", "training markers", ("prompt",),
            ["<|channel|>final<|message|>Paris is the capital.<|return|>"],
        ),
        ("llama3_1", "plain", "prefixes", (), ["Paris is the capital.<|eot_id|>"]),
        ("glm4moe", "trailing question", "training markers", ("prompt", "next"), None),
        ("qwen3_training", "plain", "own markers", (), ["<think>\n\n</think>\n\nParis is the capital.<|im_end|>\n"]),
    ],
)  # fmt: skip
def test_what_is_expected(name, kind, reference, rules, learnt):
    tokenizer = TOKENIZERS["byte-level"](SOURCES[name])
    training = SOURCES.get(f"{name}_training")
    own = Renderer(tokenizer, SOURCES[name], None)
    messages = CONVERSATIONS[kind]["messages"]
    text = own.render(messages)
    found = expect(own, Renderer(tokenizer, training, None) if training else None, messages, text)
    assert found.by == reference and (learnt is None or found.rules == rules)
    if learnt is not None:
        assert [text[start:end] for start, end in found.spans] == learnt


# --- TRL -----------------------------------------------------------------------------------------------------------


def test_a_mask_that_differs_from_trl_is_judged(tokenizer):
    tokenizer.chat_template = SOURCES["qwen3_training"]
    row = CONVERSATIONS["emoji, right to left"]
    (ours,) = encode(tokenizer, [row], assistant_only=True)
    labels = [n if on else -100 for n, on in zip(ours.ids, ours.factors, strict=True)]
    assert verdict(tokenizer, row, ours, (ours.ids, labels), prompts=False) == "identical"
    last = int(np.flatnonzero(ours.factors)[-1])
    less = [-100 if n == last else label for n, label in enumerate(labels)]
    found = verdict(tokenizer, row, ours, (ours.ids, less), prompts=False)
    assert found == "same ids, packtrain has the reference's mask"
    factors = ours.factors.copy()
    factors[last] = 0
    found = verdict(tokenizer, row, replace(ours, factors=factors), (ours.ids, labels), prompts=False)
    assert found == "same ids, TRL has the reference's mask"
    assert verdict(tokenizer, row, ours, "ValueError: no", prompts=False) == "TRL fails"


@pytest.mark.slow
@pytest.mark.ci
def test_rows_go_through_trl(tmp_path):
    tokenizer = TOKENIZERS["byte-level"](SOURCES["qwen3_training"])
    counts = compare(tokenizer, str(tmp_path), prompts=False)
    assert counts["identical"] > 15 and sum(counts.values()) == len(CONVERSATIONS)
