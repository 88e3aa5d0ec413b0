"""Ranks that were started with different settings, files or packages: no update, and a message that names the difference."""

from __future__ import annotations

import json
import shutil

import pytest

from packtrain.modeling.tokenizer import train_bpe
from tests.faults.runs import log_of, run_ranks, write_recipe

pytestmark = pytest.mark.slow

SETTINGS = {
    "data.num_rows=50": "data.num_rows: 50 on rank 1, 60 on rank 0",
    "data.path=OTHER": "data.path: ",
    "data.eval_size=5": "data.eval_size: 5 on rank 1",
    "training.seed=7": "training.seed: 7 on rank 1",
    "training.learning_rate=1e-2": "training.learning_rate: 0.01 on rank 1, 0.003 on rank 0",
    "training.max_grad_norm=0.1": "training.max_grad_norm: 0.1 on rank 1",
    "training.lr_scheduler_type=cosine": "training.lr_scheduler_type: cosine on rank 1",
    "training.weight_decay=0.1": "training.weight_decay: 0.1 on rank 1",
    "training.max_steps=5": "training.max_steps: 5 on rank 1",
    "training.save_steps=5": "training.save_steps: 5 on rank 1, 1 on rank 0",
    "batching.examples_per_step=6": "batching.examples_per_step: 6 on rank 1, 10 on rank 0",
    "batching.strategy=padding_free": "batching.strategy: padding_free on rank 1, balanced on rank 0",
    "model.config.attention_dropout=0.3": "model.config: ",
}


QUICK = ("data.path=OTHER", "training.seed=7", "training.max_steps=5", "batching.strategy=padding_free")


@pytest.mark.parametrize(
    "setting", [pytest.param(name, marks=pytest.mark.ci if name in QUICK else ()) for name in SETTINGS]
)
def test_a_setting_of_one_rank(setting, tmp_path):
    recipe, other = write_recipe(tmp_path), tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"question": f"{n}", "answer": "1"}) + "\n" for n in range(60)))
    mine = [setting.replace("OTHER", str(other))]
    wide = ["data.max_length=1024"]
    assert run_ranks(recipe, 2, resume=False, overrides=wide, of_rank={1: {"overrides": mine}}) == [2, 2]
    said = log_of(recipe)
    assert "the 2 ranks differ, and would not train the same" in said and SETTINGS[setting] in said, said
    assert not (tmp_path / "run/summary.json").exists() and not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.ci
def test_ranks_that_agree_train(tmp_path):
    """The control: the same settings on both, given to each by itself."""
    recipe = write_recipe(tmp_path)
    own = {"overrides": ["training.learning_rate=1e-2"]}
    assert run_ranks(recipe, 2, resume=False, of_rank={0: own, 1: own}) == [
        0,
        0,
    ], log_of(recipe)


@pytest.mark.ci
def test_resuming_on_one_rank_only(tmp_path):
    recipe = write_recipe(tmp_path)
    assert run_ranks(recipe, 2, resume=False, overrides=["training.max_steps=2"]) == [0, 0], log_of(recipe)
    assert run_ranks(recipe, 2, resume=False, of_rank={0: {"resume": True}}) == [2, 2]
    assert "resume: false on rank 1, true on rank 0" in log_of(recipe)


@pytest.mark.ci
def test_rows_of_one_rank(tmp_path):
    """A file of the same name on the drives of two hosts, or a cache of one of them that was changed and hashed anew."""
    rows = [json.dumps({"question": f"{n}", "answer": "1"}) + "\n" for n in range(60)]
    for rank, text in enumerate([rows, [*rows[:-1], rows[0]]]):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "rows.jsonl").write_text("".join(text))
    recipe = write_recipe(tmp_path)
    train_bpe(["12 + 30 = 42"], vocab_size=300).save_pretrained(tmp_path / "tokenizer")
    overrides = ["data.path=rows.jsonl", "model.tokenizer_vocab_size=null"]
    overrides += [f"model.tokenizer_name_or_path={tmp_path / 'tokenizer'}"]
    of_rank = {rank: {"folder": tmp_path / str(rank)} for rank in (0, 1)}
    assert run_ranks(recipe, 2, resume=False, overrides=overrides, of_rank=of_rank) == [2, 2], log_of(recipe)
    said = log_of(recipe)
    assert "the training examples: " in said and "data.path: " not in said, said


@pytest.mark.ci
def test_weights_of_one_rank(tmp_path):
    """As of a checkpoint of the Hub that one host has in another state."""
    recipe = write_recipe(tmp_path)
    assert run_ranks(recipe, 1, resume=False, overrides=["training.max_steps=1"]) == [0], log_of(recipe)
    for rank in (0, 1):
        shutil.copytree(tmp_path / "run/model", tmp_path / f"{rank}/model")
    weights = tmp_path / "1/model/model.safetensors"
    contents = bytearray(weights.read_bytes())
    contents[-3] ^= 1
    weights.write_bytes(contents)
    overrides = ["model.model_name_or_path=model", "model.config=null", "model.tokenizer_vocab_size=null"]
    overrides += [f"training.output_dir={tmp_path / 'second'}"]
    of_rank = {rank: {"folder": tmp_path / str(rank)} for rank in (0, 1)}
    codes = run_ranks(recipe, 2, resume=False, overrides=overrides, of_rank=of_rank)
    assert codes == [2, 2] and "the weights of model.model_name_or_path: " in log_of(recipe), log_of(recipe)
