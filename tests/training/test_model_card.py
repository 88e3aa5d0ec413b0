"""The card of a run: every figure is the summary's, the recipe in it loads, and nothing in it is of this machine."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from packtrain.cli import main
from packtrain.modeling.tokenizer import train_bpe
from packtrain.recipe.reader import load_recipe
from packtrain.training.run import train
from tests.golden.store import exit_code
from tests.tiny import tiny_model

RECIPE = """
model:
  config: {model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}
  tokenizer_vocab_size: 300
data: {path: ROWS, eval_size: 4, max_length: 64}
batching: {examples_per_step: 4, max_tokens: 256}
training: {output_dir: OUT, use_cpu: true, learning_rate: 1e-2, max_steps: 3, logging_steps: 1, report_to: none,
  save_strategy: "no"}
"""


@pytest.fixture
def run(tmp_path):
    """Trains the recipe, and returns its card, its text and its summary."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "2+2? ", "completion": "4"}\n' * 20)
    text = RECIPE.replace("OUT", str(tmp_path / "run")).replace("ROWS", str(tmp_path / "rows.jsonl"))
    (tmp_path / "tiny.yaml").write_text(text)

    def run(*overrides: str) -> tuple[ModelCard, str, dict]:
        train(load_recipe(tmp_path / "tiny.yaml", overrides), overwrite=True)
        card = (tmp_path / "run/model/README.md").read_text()
        return ModelCard(card), card, json.loads((tmp_path / "run/summary.json").read_text())

    return run


def recipe_in(card: str) -> dict:
    return yaml.safe_load(re.search(r"```yaml\n(.*?)```", card, re.DOTALL)[1])


def test_the_card_says_what_was_trained_and_what_came_of_it(run, tmp_path):
    card, text, summary = run()
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["packtrain"] and card.data.base_model is None and card.data.datasets is None
    assert f"| {summary['held_out_loss_before']:.4f} -> {summary['held_out_loss_after']:.4f} |" in text
    assert f"| {summary['real_tokens']:,}, {summary['supervised_tokens']:,} of them supervised |" in text
    assert "on 16 examples (`rows.jsonl`)" in text and f"torch {summary['versions']['torch']}" in text
    assert str(tmp_path) not in text and str(Path.home()) not in text
    stored = recipe_in(text)
    assert stored["training"]["learning_rate"] == 0.01 and stored["batching"]["strategy"] == "balanced"
    again = tmp_path / "again.yaml"
    stored["training"]["output_dir"] = "out"
    again.write_text(yaml.safe_dump(stored))
    assert load_recipe(again).batching == load_recipe(tmp_path / "tiny.yaml").batching
    _, other, _ = run("learning_rate=0.5")  # control: another run has another card
    assert recipe_in(other)["training"]["learning_rate"] == 0.5 and other != text


def test_an_adapter_has_a_card_in_place_of_the_empty_one_of_peft(run, tmp_path):
    """Its base is a folder here, which is no name for others."""
    tokenizer = train_bpe(["2+2? 4"] * 20, vocab_size=300)
    tokenizer.save_pretrained(tmp_path / "base")
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    base = f"model={{model_name_or_path: {tmp_path / 'base'}}}"
    card, text, summary = run(base, "lora={r: 2, target_modules: all-linear}")
    assert card.data.library_name == "peft" and "lora" in card.data.tags and card.data.base_model is None
    assert "A LoRA adapter for `base`" in text and f"{summary['trainable_parameters']:,} trained, " in text
    assert "[More Information Needed]" not in text and str(tmp_path) not in text


def test_a_merged_model_keeps_the_card_of_its_adapter(run, tmp_path):
    """It is what can be uploaded where the base is a folder here; a card that someone else wrote is of other weights."""
    tokenizer = train_bpe(["2+2? 4"] * 20, vocab_size=300)
    tokenizer.save_pretrained(tmp_path / "base")
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    base = f"model={{model_name_or_path: {tmp_path / 'base'}}}"
    card, _, _ = run(base, "lora={r: 2, target_modules: all-linear}")
    assert exit_code(main, ["merge", str(tmp_path / "run"), "--out", str(tmp_path / "merged")]) == 0
    merged = ModelCard.load(tmp_path / "merged/README.md")
    assert merged.data.library_name == "transformers" and merged.data.tags == card.data.tags
    assert "A LoRA adapter, merged into `base`" in merged.text and recipe_in(str(merged)) == recipe_in(str(card))

    (tmp_path / "run/model/README.md").write_text("---\nlibrary_name: peft\n---\n\n# Mine")
    assert exit_code(main, ["merge", str(tmp_path / "run"), "--out", str(tmp_path / "other")]) == 0
    assert not (tmp_path / "other/README.md").exists()
