"""What other runs do to this one: two in the same directory, and an adapter that resumes on other weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from tests.faults.runs import hold, let_go, log_of, run, same, start, weights, write_recipe

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("words", [pytest.param(("--overwrite",), marks=pytest.mark.ci), ("--resume",), ()])
def test_a_run_in_use_is_left_alone(tmp_path, words):
    recipe = write_recipe(tmp_path)
    first = hold(recipe)
    try:
        assert run(recipe, *words) == 2
        assert f"is in use by another run: process {first.pid}" in log_of(recipe)
    finally:
        let_go(recipe)
        first.join()
    assert first.exitcode == 0, log_of(recipe)
    alone = write_recipe(tmp_path / "alone")
    assert run(alone) == 0
    assert same(weights(tmp_path / "run"), weights(tmp_path / "alone/run"))
    assert run(recipe, "--overwrite") == 0, log_of(recipe)  # the control: the lock has gone with its run


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A saved model, to train adapters on."""
    recipe = write_recipe(tmp_path_factory.mktemp("base"))
    assert run(recipe, "--set", "training.max_steps=1") == 0, log_of(recipe)
    return recipe.parent / "run/model"


def write_second(directory: Path, base: Path, *, lora: bool) -> Path:
    recipe = write_recipe(directory)
    settings = yaml.safe_load(recipe.read_text())
    settings["model"] = {"model_name_or_path": str(base)}
    settings["training"] |= {"max_steps": 4}
    if lora:
        settings["lora"] = {"r": 4, "target_modules": "all-linear"}
    recipe.write_text(yaml.safe_dump(settings))
    return recipe


@pytest.mark.parametrize("lora", [pytest.param(True, marks=pytest.mark.ci), False])
def test_an_adapter_resumes_on_its_own_base_only(tmp_path, base, lora):
    """A checkpoint of all weights needs no base; an adapter on another base is a model that nobody trained."""
    mine = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(mine)
    for file in base.glob("*token*"):
        (mine / file.name).write_bytes(file.read_bytes())
    recipe = write_second(tmp_path, mine, lora=lora)
    process = start(recipe, "--set", "training.max_steps=2")
    process.join()
    assert process.exitcode == 0, log_of(recipe)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    model.save_pretrained(mine)
    code = run(recipe, "--resume", "--allow-changes")
    refused = "the weights of model.model_name_or_path, on which the adapter was trained: was" in log_of(recipe)
    assert (code, refused) == ((2, True) if lora else (0, False)), log_of(recipe)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.div_(2)
    model.save_pretrained(mine)
    assert run(recipe, "--resume", "--allow-changes") == 0, log_of(recipe)  # the control


@pytest.mark.ci
@pytest.mark.parametrize("name", ["model", "recipe.yaml", "summary.json"])
def test_nothing_is_written_through_a_link(tmp_path, name):
    recipe, theirs = write_recipe(tmp_path), tmp_path / "theirs"
    theirs.mkdir() if name == "model" else theirs.write_text("theirs")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(theirs)
    for words in ((), ("--overwrite",), ("--resume",)):
        assert run(recipe, *words) == 2 and "is a link, through which the run would write" in log_of(recipe)
    assert list(theirs.iterdir()) == [] if name == "model" else theirs.read_text() == "theirs"
