"""Which weights a run starts from: other weights, other identity; wherever they lie, the same."""

from __future__ import annotations

import shutil

import pytest
import torch

from packtrain.modeling.stored_weights import base_weights
from packtrain.recipe.sections import ModelSection
from tests.tiny import tiny_model


def identity(directory) -> str | None:
    return base_weights(ModelSection(model_name_or_path=str(directory)), tiny_model("llama").config)


@pytest.fixture
def saved(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_copy_is_the_same(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    (tmp_path / "copy/README.md").write_text("no weights")
    assert identity(tmp_path / "copy") == identity(saved)


def test_any_trained_tensor_changes_it(saved, tmp_path):
    found = {identity(saved)}
    names = [name for name, _ in tiny_model("llama").named_parameters()]
    for number, name in enumerate(names):
        model = tiny_model("llama")
        with torch.no_grad():
            dict(model.named_parameters())[name].add_(1e-3)
        model.save_pretrained(tmp_path / str(number))
        found.add(identity(tmp_path / str(number)))
    assert len(found) == 1 + len(names)


def test_a_damaged_header_is_for_loading_to_explain(saved):
    before, file = identity(saved), saved / "model.safetensors"
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])
    assert identity(saved) not in (None, before)


def test_a_model_of_the_hub_is_known_by_its_commit():
    section, config = ModelSection(model_name_or_path="org/model"), tiny_model("llama").config
    assert base_weights(section, config) is None
    config._commit_hash = "abc"
    assert base_weights(section, config) == "org/model at abc"
    assert base_weights(ModelSection(config={"model_type": "llama"}), config) is None
