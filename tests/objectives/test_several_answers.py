"""Several answers to one prompt: what is laid out, and that losses and gradients are those of the rows written out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from packtrain.cli import main
from packtrain.data.examples import build_examples
from packtrain.data.formats import IGNORED
from packtrain.data.sources import open_rows
from packtrain.errors import DataError, RecipeError
from packtrain.modeling.attention.prefixes import KEY as SHARED
from packtrain.objectives.groups import GroupCollator
from packtrain.recipe.reader import load_recipe
from packtrain.training.run import fit
from tests.data.helpers import CHAT_TEMPLATE, make_tokenizer, shown
from tests.objectives.helpers import Leaking, answers_of, asked, batch_of, gradients, made, whole_batch, worst, write
from tests.objectives.preference.helpers import WORDS, curves, pair_recipe

USER = {"role": "user", "content": "What is 2+2?"}
YES, NO = {"role": "assistant", "content": "It is 4."}, {"role": "assistant", "content": "the sum"}
CHAT = "<s><|user|>What is 2+2?<|end|><|assistant|>"
FIGURES = ("loss", "grad_norm")


def answered_rows(count: int) -> list[dict]:
    """Prompts of 2 to 20 words, with 1 to 4 answers of 1 to 12."""
    draw = np.random.default_rng(0)

    def text(low: int, high: int) -> str:
        return " ".join(draw.choice(WORDS, size=draw.integers(low, high)))

    return [
        {"prompt": text(2, 21) + "\n", "completions": [text(1, 13) for _ in range(draw.integers(1, 5))]}
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("rows") / "rows.jsonl", answered_rows(24))


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(chat_template=CHAT_TEMPLATE)


# ------------------------------------------------------------------------------------------------- rows and batches


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"prompt": "What is 2+2?", "completions": [" It is 4.", " the sum", " It is 4."]},
            "<s>What is 2+2?[ It is 4.</s>]<s>What is 2+2?[ the sum</s>]<s>What is 2+2?[ It is 4.</s>]",
        ),
        ({"prompt": "What is 2+2?", "completions": [" the sum"]}, "<s>What is 2+2?[ the sum</s>]"),
        ({"prompt": [USER], "completions": [[YES], [NO]]}, f"{CHAT}[It is 4.</s>]{CHAT}[the sum</s>]"),
    ],
)
def test_a_row_becomes_a_document_for_each_answer(row, expected, tmp_path, tokenizer):
    assert shown(tokenizer, answers_of(tmp_path / "rows.jsonl", tokenizer, row)) == [expected]


GOOD = {"prompt": "one", "completions": [" two", " three"]}
BAD = {
    "no prompt": (GOOD | {"prompt": None}, "'prompt' is null"),
    "an empty prompt": (GOOD | {"prompt": " "}, "'prompt' is empty"),
    "no answers": (GOOD | {"completions": []}, "'completions' is empty"),
    "one text": (GOOD | {"completions": " two"}, "'completions' is text, not a list of answers"),
    "an empty answer": (GOOD | {"completions": [" two", ""]}, "'completions[1]' is empty"),
    "a number": (GOOD | {"completions": [" two", 3]}, "'completions[1]' is a number, not text"),
    "kinds that differ": (GOOD | {"completions": [" two", [YES]]}, "'prompt' and 'completions[1]' must both be text"),
    "a user's turn last": (
        {"prompt": [USER], "completions": [[YES], [NO, USER]]},
        "'completions[1]': the last message",
    ),
    "a switch": ({"prompt": [USER], "completions": [[YES | {"weight": 0}]]}, "completions[0][0] has a switch"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_named_with_row_and_reason(name, tmp_path, tokenizer):
    row, reason = BAD[name]
    with pytest.raises(DataError) as refused:
        answers_of(tmp_path / "rows.jsonl", tokenizer, GOOD, row, GOOD)
    said = str(refused.value)
    assert f"rows.jsonl, line 2: {reason}" in said
    assert "line 1" not in said and "skip them with `data.on_bad_row: skip`" in said


def test_rows_name_the_objective_that_learns_from_them(rows, tokenizer):
    with pytest.raises(DataError) as refused:
        build_examples(open_rows(rows), tokenizer)
    assert "several answers to one prompt (`several_answers`)" in str(refused.value)


@pytest.mark.parametrize("weighting", ["token", "example"])
def test_every_layout_asks_what_the_rows_written_out_ask(weighting, tmp_path, tokenizer):
    rows = answered_rows(6)
    examples = answers_of(tmp_path / "rows.jsonl", tokenizer, *rows)
    flat = batch_of(examples, loss_weighting=weighting)
    expected = asked(flat)
    assert expected == asked(batch_of(examples, layout="padded", loss_weighting=weighting))
    shared = batch_of(examples, shared=True, loss_weighting=weighting)
    assert expected == asked(shared)
    assert shared["input_ids"].numel() < flat["input_ids"].numel()
    counts = [len(row["completions"]) for row in rows]
    assert {1, 2, 3} <= {*counts}
    assert shared["example_ids"].tolist() == np.repeat(np.arange(6), counts).tolist()
    written = [{"prompt": row["prompt"], "completion": text} for row in rows for text in row["completions"]]
    single = build_examples(open_rows(write(tmp_path / "written.jsonl", written)), tokenizer)
    ids, labels = single.gather(np.arange(len(single)))
    assert torch.equal(flat["input_ids"][0], torch.from_numpy(ids)) and torch.equal(
        flat["labels"][0], torch.from_numpy(labels)
    )
    total = sum(weight for _, _, weight in expected)
    assert total == pytest.approx(6 if weighting == "example" else np.count_nonzero(labels != IGNORED))
    assert not len(GroupCollator(layout="flat", shared=True).empty()["predictors"])


# ----------------------------------------------------------------------------------------------------------- training


def test_losses_and_gradients_are_those_of_the_rows_written_out(rows, tmp_path):
    written = [
        {"prompt": row["prompt"], "completion": text}
        for row in map(json.loads, rows.read_text().splitlines())
        for text in row["completions"]
    ]
    single = made(write(tmp_path / "written.jsonl", written), tmp_path / "run", name="causal_lm")
    loss, expected = gradients(single, whole_batch(single))
    for options in ({"shared": True}, {}, {"batching__strategy": "pad_longest"}):
        trainer = made(rows, tmp_path / "run", **options)
        batch = whole_batch(trainer)
        assert (SHARED in batch) == ("shared" in options)
        found, grads = gradients(trainer, batch)
        assert abs(found / loss - 1) < 1e-6 and worst(grads, expected) < 1e-6, options
        if "shared" in options:
            leaking, grads = gradients(trainer, whole_batch(trainer, Leaking(layout="flat", shared=True)))
            assert abs(leaking / loss - 1) > 1e-4 and worst(grads, expected) > 1e-3


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("weighting", ["token", "example"])
def test_layouts_train_the_same_and_rows_are_one_example(rows, tmp_path, weighting):
    changes = {"weighting": weighting, "training__max_steps": 8, "batching__max_tokens": 300, "data__max_length": 300}
    expected = curves(made(rows, tmp_path / "run", batching__strategy="pad_longest", **changes), FIGURES)
    shared = made(rows, tmp_path / "run", shared=True, **changes)
    assert [len(shared.plan.examples(step)) for step in range(4)] == [6] * 4  # prompts, whatever their answers
    assert shared.plan.gradient_accumulation_steps > 1
    np.testing.assert_allclose(curves(shared, FIGURES), expected, rtol=1e-5)
    np.testing.assert_allclose(curves(made(rows, tmp_path / "run", **changes), FIGURES), expected, rtol=1e-5)
    other = {"token": "example", "example": "token"}[weighting]  # the control
    differing = curves(made(rows, tmp_path / "run", shared=True, **changes | {"weighting": other}), FIGURES)
    assert np.abs(differing[:, 0] / expected[:, 0] - 1).max() > 1e-4


@pytest.mark.slow
@pytest.mark.ci
def test_a_resumed_run_ends_with_bitwise_the_same_weights(rows, tmp_path):
    changes = {"training__max_steps": 6, "training__save_strategy": "steps", "training__save_steps": 3}
    unbroken, resumed = (made(rows, tmp_path / "run", shared=True, **changes) for _ in range(2))
    fit(unbroken)
    fit(resumed, str(tmp_path / "run" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    for (name, weight), other in zip(unbroken.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(weight, other), name


@pytest.fixture
def recipe(rows, tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    objective = {"name": "several_answers", "shared_prefix": True}
    written = pair_recipe(rows, tmp_path / "run", data__max_length=400).to_dict(given=True)
    path.write_text(json.dumps(written | {"objective": objective}))
    return path


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (["overflow=truncate"], "the answers to a prompt are needed whole"),
        (["shapes=2"], "takes the answers to a prompt together"),
        (["strategy=wrapped"], "needs whole ones"),
        (["strategy=pad_longest"], "needs a flat layout"),
        (["completion_only_loss=false"], "answers are learnt from, and not their prompt"),
    ],
)
def test_settings_that_contradict_answers_are_refused(recipe, changes, reason):
    with pytest.raises(RecipeError) as refused:
        load_recipe(recipe, changes)
    assert reason in str(refused.value)
    load_recipe(recipe)


def test_plan_and_show_draw_answers_and_prefixes(recipe, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")

    def printed(*args: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main([*args])
        assert not ended.value.code
        return capsys.readouterr().out

    out = printed("show", str(recipe), "--documents", "30")
    assert re.search(r"· answer 2 of 3, goes on from the first \d+ tokens of document \d+ ─", out)
    assert "· answer 1 of 3 ─" in out and "· answer 1 of 1 ─" in out
    out = printed("show", str(recipe), "--set", "objective.shared_prefix=false", "--set", "strategy=pad_longest")
    assert "· answer 2 of" in out and "goes on from" not in out
    out = printed("plan", str(recipe), "--all")
    assert "in 24 examples, 1 to 4 in each" in out and "what they share is laid out once" in out
