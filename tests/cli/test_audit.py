"""`packtrain audit`: what can be named, what is printed, and when a recipe fails."""

from __future__ import annotations

import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from packtrain.cli.audit import show_audit
from packtrain.errors import ModelError
from packtrain.modeling.attention.varlen import NAME
from packtrain.modeling.audit.models import tiny_model

RECIPE = """
model: {{config: {{model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2,
  num_attention_heads: 4}}, tokenizer_vocab_size: 300, attn_implementation: {attention}}}
data: {{path: 'packtrain:arithmetic'}}
batching: {{strategy: {strategy}}}
lora: {{r: 4, target_modules: all-linear}}
training: {{output_dir: out, gradient_checkpointing: true}}
"""


def audit(target: object, implementations: str = "sdpa", layouts: str = "flat") -> tuple[bool, str]:
    printed = StringIO()
    options = {"implementations": implementations.split(","), "layouts": layouts.split(","), "device": "cpu"}
    return show_audit(str(target), Console(file=printed, width=200), **options), printed.getvalue()


def test_an_encoder_directory_is_loaded_with_the_head_it_is_trained_with(tmp_path):
    tiny_model("distilbert").save_pretrained(tmp_path)
    safe, text = audit(tmp_path, f"sdpa,{NAME}")
    assert not safe and audit(tmp_path, NAME)[0]  # sdpa was named, too
    assert "bidirectional" in text and f"flat batches are safe with {NAME}" in text


def test_the_fields_of_a_config():
    fields = "model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4"
    _, text = audit(f"config: {{{fields}, vocab_size: 300}}")
    assert "LlamaForCausalLM" in text and "flat batches are safe with sdpa" in text
    with pytest.raises(ModelError, match="not a mapping of config fields"):
        audit("config: llama")
    with pytest.raises(ModelError, match="hiden_size"):
        audit("config: {model_type: llama, hiden_size: 32}")


def test_a_wrong_attention_of_a_config_is_told_as_one_of_the_option():
    config = "config: {model_type: llama, attn_implementation: flash_atention}"
    for target, names in ((config, "sdpa"), ("llama", "flash_atention")):
        with pytest.raises(ModelError, match="(?s)is not a known attention.*did you mean flash_attention_2"):
            audit(target, names)


def test_a_directory_with_a_config_alone_is_audited_by_it(tmp_path, monkeypatch):
    tiny_model("llama").config.save_pretrained(tmp_path)
    safe, text = audit(tmp_path)
    assert safe and "holds no weights: its config is audited" in text and "(llama, " in text
    monkeypatch.setattr(sys.modules["packtrain.cli.audit"], "LARGEST", 100)  # the package has a verb of this name
    with pytest.raises(ModelError, match=r"(?s)random ones are made up to 100.*fix: audit a smaller config"):
        audit(tmp_path)


def test_overrides_are_for_recipes():
    with pytest.raises(ModelError, match="--set: overrides keys of a recipe"):
        show_audit(
            "llama", Console(file=StringIO()), implementations=None, layouts=None, device="cpu", overrides=["seed=1"]
        )


def test_a_misspelt_architecture_is_told_from_a_missing_checkpoint():
    with pytest.raises(ModelError, match="did you mean the architecture llama"):
        audit("lama")
    with pytest.raises(ModelError, match="did you mean sdpa"):
        audit("llama", "sdpaa")
    with pytest.raises(ModelError, match="is not a layout"):
        audit("llama", layouts="flatt")


@pytest.mark.ci
@pytest.mark.slow
def test_a_recipe_is_judged_by_what_it_trains_with(tmp_path):
    recipe = Path(tmp_path / "recipe.yaml")
    recipe.write_text(RECIPE.format(attention="auto", strategy="balanced"))
    safe, text = audit(recipe)  # its own attention is tried beside those asked for
    assert safe and f"this recipe uses {NAME} and flat (train): isolated" in text
    assert text.startswith("this recipe uses")  # the answer, then the table
    recipe.write_text(RECIPE.format(attention="eager", strategy="balanced"))
    printed = StringIO()
    safe = show_audit(
        str(recipe),
        Console(file=printed, width=200),
        implementations=["sdpa"],
        layouts=["flat"],
        device="cpu",
        overrides=["strategy=pad_longest"],
    )
    text = printed.getvalue()
    assert safe and "this recipe uses eager and padded (train): isolated" in text
    recipe.write_text(RECIPE.format(attention="sdpa", strategy="balanced").replace("llama", "biogpt"))
    safe, text = audit(recipe)
    assert not safe and "this recipe uses sdpa and flat (train): leaks" in text


@pytest.mark.parametrize("device", ["cuda:99", "tpu"])
def test_a_device_that_is_not_there_is_our_error(device):
    with pytest.raises(ModelError, match="--device: is not available on this machine"):
        show_audit("llama", Console(file=StringIO()), implementations=None, layouts=None, device=device)
