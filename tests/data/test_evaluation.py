"""Evaluation data: read before the training data are tokenised, and wrong under their own keys."""

from __future__ import annotations

import json

import pytest

import packtrain.data.loading
from packtrain.data.loading import prepare_examples
from packtrain.data.sources import open_rows
from packtrain.errors import DataError
from packtrain.recipe.sections import DataSection


@pytest.fixture
def path(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "two and two"}) + "\n")
    return str(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"eval_split": "test"}, "data.eval_split"),
        ({"eval_path": "nowhere.jsonl"}, "data.eval_path"),
        ({"eval_path": "nowhere.jsonl", "eval_split": "test"}, "data.eval_path"),
    ],
)
def test_what_is_wrong_is_said_under_its_own_key_before_tokenising(path, wrong, key, tokenizer, monkeypatch):
    tokenised = []
    monkeypatch.setattr(packtrain.data.loading, "build_examples", lambda *args, **options: tokenised.append(args))
    section = DataSection(path=path, **wrong)
    with pytest.raises(DataError) as caught:
        prepare_examples(section, open_rows(path), tokenizer, seed=0)
    assert caught.value.key == key and key in str(caught.value)
    assert not tokenised
    prepare_examples(DataSection(path=path, eval_path=path), open_rows(path), tokenizer, seed=0)
    assert len(tokenised) == 2  # the control: both are tokenised where nothing is wrong


def test_a_configuration_of_a_local_file_is_refused(path):
    with pytest.raises(DataError, match="only to datasets of the Hub") as caught:
        open_rows(path, name="main")
    assert caught.value.key == "data.name"
