"""Answers to held-out prompts: what is asked, what counts as right, and where it is stored."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from packtrain.errors import PacktrainError
from packtrain.generation.evaluation import evaluate, split, wilson
from packtrain.generation.scores import apply_score, exact, find_score
from packtrain.generation.trained import load_trained
from packtrain.recipe.reader import load_recipe
from packtrain.training.run import train
from tests.training.test_run import RECIPE


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("It is 12. #### 12", "7 + 5 = 12 #### 12", 1),
        ("#### 1,200", "so #### 1200.", 1),
        ("12", "7 + 5 = 12 #### 12", 0),
        ("#### 13", "#### 12", 0),
        (" two  words\n", "two words", 1),
        ("two word", "two words", 0),
    ],
)
def test_what_is_right(answer, reference, right):
    assert exact(answer, reference) == right


def test_an_example_is_asked_for_its_last_turn():
    ids, labels = np.arange(8), np.array([-100, -100, 2, 3, -100, 5, 6, -100])
    assert split(ids, labels) == ([0, 1, 2, 3, 4], [5, 6])
    with pytest.raises(PacktrainError, match="supervised from their beginning"):
        split(ids, np.array([-100, 1, 2, 3, 4, 5, 6, 7]))


def test_the_interval_covers_its_share():
    """Of 2,000 samples of a known share, 95% of the intervals hold it; control: intervals of 50% don't."""
    drawn = np.random.default_rng(0).binomial(40, 0.1, 2000)
    for confidence, least, most in ((0.95, 0.92, 0.98), (0.5, 0.4, 0.65)):
        bounds = [wilson([1.0] * k + [0.0] * (40 - k), confidence) for k in drawn]
        assert least < np.mean([low <= 0.1 <= high for low, high in bounds]) < most


def lengths_agree(answer: str, reference: str) -> float:
    return 1 / (1 + abs(len(answer) - len(reference)))


def own_rows(tmp_path) -> list[str]:
    return ["data.eval_size=0", f"data.eval_path={tmp_path}/others.jsonl"]


def test_a_run_is_asked_its_held_out_prompts(tmp_path):
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    given = [f"training.output_dir={tmp_path}/out", "max_steps=2", "training.save_strategy=no"]
    recipe = load_recipe(tmp_path / "tiny.yaml", given)
    with pytest.raises(PacktrainError, match="is not a folder"):
        evaluate(recipe)
    train(recipe)
    done = evaluate(recipe, prompts=6, max_new_tokens=8)
    rows = [json.loads(line) for line in (tmp_path / "out/evaluation/answers-model.jsonl").read_text().splitlines()]
    assert done.prompts == len(rows) == 6 and done.score == np.mean([row["score"] for row in rows])
    assert all("####" in row["reference"] and row["reference"] not in row["prompt"] for row in rows)
    assert done.low is not None and done.low <= done.score <= done.high and done.tokens <= 8
    other = evaluate(recipe, prompts=6, max_new_tokens=8, score=lengths_agree)
    assert 0 < other.score < 1 and other.low is None and other.tokens == done.tokens
    again = load_recipe(tmp_path / "out/recipe.yaml")  # as the run has written it
    assert evaluate(again, prompts=6, max_new_tokens=8) == done
    assert load_trained(tmp_path / "out").recipe is not None
    for change in ("data.eval_size=40", "data.eval_size=19"):
        with pytest.raises(PacktrainError, match="holds out other examples than the run did"):
            evaluate(load_recipe(tmp_path / "tiny.yaml", [*given, change]), prompts=1, max_new_tokens=2)
    rows = "".join(json.dumps({"prompt": f"{n}+1? ", "completion": "#### 2"}) + "\n" for n in range(3))
    (tmp_path / "others.jsonl").write_text(rows)
    own = load_recipe(tmp_path / "tiny.yaml", [*given, *own_rows(tmp_path)])
    assert evaluate(own, prompts=9, max_new_tokens=2).prompts == 3
    with pytest.raises(PacktrainError, match="another vocabulary"):
        evaluate(
            load_recipe(
                tmp_path / "out/recipe.yaml",
                ["model.tokenizer_vocab_size=280", "data.on_bad_row=skip", *own_rows(tmp_path)],
            )
        )
    with pytest.raises(PacktrainError, match="failed for the answer .* ZeroDivisionError"):
        evaluate(recipe, prompts=1, max_new_tokens=2, score=lambda answer, reference: 1 / 0)
    with pytest.raises(PacktrainError, match="has no base"):
        evaluate(recipe, prompts=1, base=True)


def test_scores_of_users(monkeypatch, tmp_path):
    (tmp_path / "my_scores.py").write_text(
        "def close(answer, reference):\n    return 0.5\n\ndef one(answer):\n    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    assert math.isclose(find_score("my_scores:close")("a", "b"), 0.5)
    for name, message in (
        ("my_scores:one", "not a function of"),
        ("my_scores:no", "can't be imported"),
        ("x", "--score: names no function of a module .*\n.*, for example x:score"),
        ("x.py", "names no function of a module .*\n.*, for example x:score"),
        ("my_scores:", "names no function of a module"),
        (":close", "names no function of a module"),
    ):
        with pytest.raises(PacktrainError, match=message):
            find_score(name)


def test_a_score_that_fails_or_is_no_number_names_the_answer_and_the_line():
    def broken(answer: str, reference: str) -> float:
        return 1.0 / len(answer)

    assert apply_score(broken, "four", "4") == 0.25
    with pytest.raises(
        PacktrainError, match=r"for the answer '' and the reference '4': ZeroDivisionError.*test_eval.*line"
    ):
        apply_score(broken, "", "4")
    for value in ("0.5", None, float("nan"), [1.0]):
        with pytest.raises(PacktrainError, match="must return a finite number, and returned") as refused:
            apply_score(lambda answer, reference, value=value: value, "four", "4")  # ty: ignore[invalid-argument-type]
        assert repr(value) in str(refused.value)


def test_pairs_have_no_right_answer():
    with pytest.raises(PacktrainError, match="pairs of answers"):
        evaluate(load_recipe("dpo_lora"))
