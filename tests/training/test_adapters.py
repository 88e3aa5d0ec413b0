"""A run goes on from the adapter of another: trained further, or merged into its base first."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file, save_file

from packtrain.errors import PacktrainError, RecipeError
from packtrain.generation import load_trained, merge
from packtrain.recipe.reader import load_recipe
from packtrain.training.run import build, train
from tests.generation.test_merging import logits
from tests.training.test_run import RECIPE

LORA = "lora={target_modules: all-linear, r: 4}"
STILL = ["training.max_steps=1", "training.learning_rate=0"]  # one update that changes nothing: losses before it
PRETRAINED = """
model: {model_name_or_path: BASE}
data: {path: "packtrain:arithmetic", num_rows: 120, eval_size: 20, max_length: 512, overflow: truncate}
batching: {examples_per_step: 10, max_tokens: 1024}
training: {use_cpu: true, learning_rate: 1e-1, max_steps: 6, logging_steps: 1, report_to: none, save_strategy: "no"}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A pretrained model in `out/base/model`, and an adapter on it in `out/first`."""
    folder = tmp_path_factory.mktemp("adapters")
    (folder / "base.yaml").write_text(RECIPE)
    train(load_recipe(folder / "base.yaml", [f"training.output_dir={folder}/base", "max_steps=5", "save_strategy=no"]))
    (folder / "tuned.yaml").write_text(PRETRAINED.replace("BASE", str(folder / "base/model")))
    train(tuned(folder, "first", LORA))
    return folder


def tuned(home: Path, name: str, *overrides: str):
    return load_recipe(home / "tuned.yaml", [f"training.output_dir={home / name}", *overrides])


def held_out(home: Path, name: str, *overrides: str) -> float:
    """The held-out loss before training."""
    return train(tuned(home, name, *STILL, *overrides)).held_out_loss_before


def test_going_on_begins_with_what_was_learnt(home, tmp_path):
    """Trained further and merged begin where the first run ended. Control: the base with a new adapter doesn't."""
    ended = train(tuned(home, "again", LORA)).held_out_loss_after
    assert held_out(home, "continued", f"model.continue_adapter={home / 'first'}") == pytest.approx(ended, rel=1e-6)
    assert held_out(home, "onto", f"model.merge_adapter={home / 'first/model'}", LORA) == pytest.approx(ended, rel=1e-5)
    assert held_out(home, "full", f"model.merge_adapter={home / 'first'}") == pytest.approx(ended, rel=1e-5)
    assert abs(held_out(home, "new", LORA) - ended) > 1e-3
    merge(load_trained(home / "first"), tmp_path / "merged")
    assert held_out(home, "named", f"model.model_name_or_path={tmp_path / 'merged'}") == pytest.approx(ended, rel=1e-5)


def test_an_adapter_finds_the_weights_that_it_was_trained_on(home, tmp_path):
    """Those with another adapter merged into them. Without its run, or with other weights in their place, it is refused."""
    merged = f"model.merge_adapter={home / 'first'}"
    train(tuned(home, "second", merged, LORA, "max_steps=2"))
    began = build(tuned(home, "second-again", merged, LORA)).model
    with began.disable_adapter():
        expected = logits(began.eval())
    assert torch.allclose(logits(load_trained(home / "second", base=True).model), expected, atol=1e-5)
    plain = logits(load_trained(home / "base").model)
    assert (plain - expected).abs().max() > 1e-2  # control: what peft alone would put it on
    assert merge(load_trained(home / "second"), tmp_path / "merged") < 1e-4
    copytree(home / "second/model", tmp_path / "moved")
    with pytest.raises(PacktrainError, match="names no base model"):
        load_trained(tmp_path / "moved")

    path = home / "base/model/model.safetensors"
    stored, weights = path.read_bytes(), load_file(path)
    save_file({name: weight + 1 for name, weight in weights.items()}, path, metadata={"format": "pt"})
    try:
        for name in ("first", "second"):
            with pytest.raises(PacktrainError, match="trained on other weights than those of .*base/model"):
                load_trained(home / name)
    finally:
        path.write_bytes(stored)
    assert load_trained(home / "first").has_adapter


def test_an_adapter_that_was_trained_on_a_merged_one_is_not_merged_alone_without_a_word(home, caplog):
    recipe = tuned(home, "third", f"model.merge_adapter={home / 'second'}", LORA)
    assert build(recipe) and "trained on other weights than those of" in caplog.text
    caplog.clear()
    assert build(tuned(home, "fourth", f"model.merge_adapter={home / 'first'}", LORA))
    assert "other weights" not in caplog.text  # control


def test_an_adapter_that_is_trained_further_keeps_its_settings(home):
    recipe = tuned(home, "settings", f"model.continue_adapter={home / 'first'}")
    assert recipe.lora is not None and recipe.lora["r"] == 4
    trainer = build(recipe)
    assert trainer.model.peft_config["default"].r == 4
    trained = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    first = load_file(home / "first/model/adapter_model.safetensors")
    assert any(weight.abs().max() > 0 for name, weight in first.items() if "lora_B" in name)


def test_another_adapter_is_another_run(home):
    """It joins the identity of the weights that a run starts from."""
    from packtrain.modeling.loading import load_config
    from packtrain.modeling.stored_weights import base_weights

    with_adapter = tuned(home, "a", f"model.continue_adapter={home / 'first'}").model
    plain = tuned(home, "b", LORA).model
    config = load_config(plain)
    before = base_weights(with_adapter, config)
    assert before != base_weights(plain, config)
    path = home / "first/model/adapter_model.safetensors"
    stored, weights = path.read_bytes(), load_file(path)
    save_file({name: weight + 1 for name, weight in weights.items()}, path)
    try:
        assert base_weights(with_adapter, config) != before
    finally:
        path.write_bytes(stored)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.continue_adapter=FIRST", LORA], "contradicts `lora:`"),
        (["model.continue_adapter=FIRST", "model.merge_adapter=FIRST"], "contradicts `model.continue_adapter`"),
        (["model.merge_adapter=BASE"], "holds no adapter"),
        (["model.merge_adapter=FIRST", "model.quantization={load_in_4bit: true}", LORA], "into quantised weights"),
    ],
)
def test_what_cannot_be_gone_on_from_is_refused(home, overrides, message):
    given = [text.replace("FIRST", str(home / "first")).replace("BASE", str(home / "base")) for text in overrides]
    with pytest.raises(RecipeError, match=message):
        tuned(home, "refused", *given)


def test_a_folder_that_is_no_model_says_what_it_is(home):
    for name, message in (("first/model", "is an adapter, not a model"), ("base", "set it to .*base/model")):
        with pytest.raises(PacktrainError, match=message):
            build(
                tuned(
                    home,
                    "refused",
                    f"model.model_name_or_path={home / name}",
                    "tokenizer_name_or_path=" + str(home / "base/model"),
                )
            )


def test_an_adapter_of_another_model_is_refused(home, tmp_path):
    (tmp_path / "other.yaml").write_text(RECIPE.replace("hidden_size: 32", "hidden_size: 64"))
    train(
        load_recipe(
            tmp_path / "other.yaml", [f"training.output_dir={tmp_path}/other", "max_steps=1", "save_strategy=no"]
        )
    )
    given = [f"model.model_name_or_path={tmp_path}/other/model", f"model.continue_adapter={home / 'first'}"]
    with pytest.raises(PacktrainError, match="weights differ in name or shape"):
        build(tuned(home, "refused", *given))
