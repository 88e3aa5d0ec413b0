"""Tokens stay out of what a run writes and says, and code of a model runs where it was asked for, loudly, or not at all."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants

from packtrain.errors import HIDDEN, DataError, ModelError, RecipeError, hidden
from packtrain.modeling.loading import load_config
from packtrain.recipe.reader import load_recipe
from packtrain.recipe.sections import ModelSection
from packtrain.training.checkpoints import Change
from packtrain.training.portable import portable
from tests.faults.runs import log_of, run, write_recipe
from tests.training.helpers import make_trainer

TOKEN = "hf_" + "Ab3" * 12
ADDRESS = "https://me:dear-secret@host/rows.jsonl"
SIGNED = "https://host/rows.jsonl?X-Amz-Date=20260101&X-Amz-Signature=0123abcd&part=1"


def everything_under(directory: Path) -> bytes:
    return b"\n".join(path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file())


@pytest.mark.ci
@pytest.mark.slow
def test_a_token_is_in_no_file_of_a_run(tmp_path):
    """Given in Python, as a recipe refuses it; `training_args.bin` is a zip of a pickle, stored uncompressed."""
    trainer = make_trainer(tmp_path, strategy="balanced", max_steps=2, save_strategy="steps", save_steps=1)
    trainer.args.hub_token = TOKEN
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    assert len(list(tmp_path.rglob("training_args.bin"))) == 3
    assert TOKEN.encode() not in everything_under(tmp_path)
    assert trainer.args.hub_token == TOKEN  # whoever uploads has it still
    torch.save(trainer.args, tmp_path / "control.bin")
    assert TOKEN.encode() in everything_under(tmp_path)


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["token", "access_token", "X-Amz-Signature", "X-Goog-Signature", "X-Amz-Credential", "sig", "api_key", "apikey"],
)
def test_parameters_of_signed_addresses_are_not_shown(name):
    assert hidden(f"https://host/a?b=1&{name}=0123abcd&c=2 there") == f"https://host/a?b=1&{name}={HIDDEN}&c=2 there"
    assert hidden(f"https://host/a?{name}=0123abcd") == f"https://host/a?{name}={HIDDEN}"


def test_what_looks_like_a_secret_is_not_shown():
    for secret in (TOKEN, "sk-proj-" + "x1" * 20, "ghp_" + "Z9" * 18, "github_pat_" + "a_1" * 9, "AKIA" + "Q7" * 8):
        assert hidden(f"at {secret}, there") == f"at {HIDDEN}, there"
        assert secret not in str(DataError("can't be read", key="data.path", value=secret, where=f"x {secret}"))
        assert secret not in str(Change(key="data.path", then=secret, now="rows.jsonl", safe=False))
    assert hidden(ADDRESS) == f"https://{HIDDEN}@host/rows.jsonl"
    for plain in (
        "org/hf_dataset_of_many_rows",
        "sk-learn",
        "https://host/a@b",
        "0a" * 20,
        "ghp_short",
        "mail me@host",
        "https://host/a?page=2&tokens=3&design=4",
    ):
        assert hidden(plain) == plain  # control


@pytest.mark.ci
@pytest.mark.slow
def test_a_secret_in_a_recipe_reaches_no_message_and_no_record(tmp_path):
    recipe = write_recipe(tmp_path)
    for where in (TOKEN, SIGNED, ADDRESS):
        assert run(recipe, "--set", f"data.path={where}") == 2
        words = ("--set", f"training.run_name={where}", "--set", "max_steps=2", "--overwrite")
        assert run(recipe, *words) == 0, log_of(recipe)
    stored = yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())
    assert stored["training"]["run_name"] == f"https://{HIDDEN}@host/rows.jsonl"
    manifest = json.loads((tmp_path / "run/checkpoint-2/packtrain_manifest.json").read_text())
    assert HIDDEN in manifest["recipe"]["training"]["run_name"]
    for path in [recipe.with_name("log.txt"), *(tmp_path / "run").rglob("*.*")]:
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes() and b"dear-secret" not in path.read_bytes(), path
            assert b"0123abcd" not in path.read_bytes(), path
    kept = portable(load_recipe(recipe, [f"training.run_name={ADDRESS}"]))
    assert kept["training"]["run_name"] == f"https://{HIDDEN}@host/rows.jsonl"  # the reports of comparisons


@pytest.fixture
def model_with_code(tmp_path) -> tuple[Path, Path]:
    """A model directory that brings code, and what the code makes when it runs."""
    model, mark = tmp_path / "model_with_code", tmp_path / "mark"
    model.mkdir()
    (model / "config.json").write_text(
        json.dumps({"model_type": "brings_code", "auto_map": {"AutoConfig": "theirs.Config"}, "vocab_size": 8})
    )
    (model / "theirs.py").write_text(
        f"import os\nos.mkdir({str(mark)!r})\nfrom transformers import PreTrainedConfig\n"
        "class Config(PreTrainedConfig):\n    model_type = 'brings_code'\n"
    )
    return model, mark


@pytest.mark.ci
@pytest.mark.slow
def test_code_of_a_model_does_not_run_by_default(model_with_code, caplog):
    model, mark = model_with_code
    with pytest.raises(ModelError, match="trust_remote_code|custom code|can't be loaded"):
        load_config(ModelSection(model_name_or_path=str(model)))
    assert not mark.exists() and "may run" not in caplog.text


@pytest.mark.ci
@pytest.mark.slow
def test_code_of_a_model_runs_where_it_was_asked_for_and_is_announced(model_with_code, caplog, monkeypatch):
    """Control of the above, in a cache of its own."""
    model, mark = model_with_code
    monkeypatch.setattr(constants, "HF_MODULES_CACHE", str(model.parent / "modules"), raising=False)
    before = set(sys.modules)
    with caplog.at_level(logging.WARNING):
        load_config(ModelSection(model_name_or_path=str(model), trust_remote_code=True))
    assert mark.exists()
    assert f"code that comes with {model} may run in this process" in caplog.text
    for name in set(sys.modules) - before:
        if "theirs" in name:
            del sys.modules[name]


@pytest.mark.ci
@pytest.mark.slow
def test_code_from_the_hub_is_pinned(tmp_path):
    recipe = write_recipe(tmp_path)
    named = ["model.config=null", "tokenizer_vocab_size=null", "model_name_or_path=org/model", "trust_remote_code=true"]
    for revision in ("null", "main", "v1.0", "0a" * 19):
        with pytest.raises(RecipeError, match="must be pinned"):
            load_recipe(recipe, [*named, f"model.revision={revision}"])
    assert load_recipe(recipe, [*named, f"model.revision={'0a' * 20}"]).model.trust_remote_code
    assert not load_recipe(recipe).model.trust_remote_code
