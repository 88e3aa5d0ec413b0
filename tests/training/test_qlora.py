"""A quantised model with an adapter: refused where it can't be, the same updates in every layout, resumed and merged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from packtrain.errors import ModelError, RecipeError
from packtrain.modeling import loading
from packtrain.modeling.loading import load_config, load_model
from packtrain.recipe.reader import load_recipe
from packtrain.training.memory.plan import MicroBatchSize, describe_model, plan_memory
from packtrain.training.run import build, fit
from tests.launch.helpers import LORA, RECIPE
from tests.training.helpers import curve

FOUR_BITS = "model.quantization={load_in_4bit: true, bnb_4bit_quant_type: nf4, bnb_4bit_use_double_quant: true}"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A recipe that fine-tunes a pretrained model: a tiny one, saved with its tokenizer."""
    directory = tmp_path_factory.mktemp("base")
    scratch = directory / "scratch.yaml"
    scratch.write_text(RECIPE)
    sizes = [
        "model.config.hidden_size=64",
        "model.config.intermediate_size=128",
        f"training.output_dir={directory}/run",
    ]
    build(load_recipe(scratch, sizes)).save_model(str(directory / "model"))
    recipe = directory / "recipe.yaml"
    model, data = RECIPE.split("data:")
    recipe.write_text(f"model: {{model_name_or_path: {directory / 'model'}}}\ndata:{data}")
    return recipe


def trainer(recipe: Path, output_dir: Path, *options: str):
    settings = [f"training.output_dir={output_dir}", "training.max_steps=4", FOUR_BITS, LORA, *options]
    return build(load_recipe(recipe, settings), resume=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([FOUR_BITS], "model.quantization.*needs an adapter: quantised weights cannot be trained"),
        (
            [FOUR_BITS, "lora={}", "model.quantization.load_in_4bits=true"],
            "load_in_4bits.*is not a field.*\n.*load_in_4bit",
        ),
        ([FOUR_BITS, "lora={}", "model.quantization.bnb_4bit_quant_type=nf5"], "must be one of nf4, fp4"),
        (["lora={}", "model.quantization={bnb_4bit_quant_type: nf4}"], "must say to how many bits"),
        (["lora={}", "model.quantization={load_in_4bit: true, load_in_8bit: true}"], "must say to how many bits"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, options, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{model_name_or_path: somewhere}}\ndata:{RECIPE.split('data:')[1]}")
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe, options)


def test_a_model_from_scratch_is_not_quantised(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    with pytest.raises(RecipeError, match="model.quantization.*needs a pretrained model"):
        load_recipe(recipe, [FOUR_BITS, LORA])


def test_the_package_is_named_where_it_is_missing(base, monkeypatch):
    section = load_recipe(base, [FOUR_BITS, LORA]).model
    monkeypatch.setattr(loading, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ModelError, match=r"needs the package bitsandbytes.*\n.*packtrain\[qlora\]"):
        load_model(section, load_config(section), attn_implementation="sdpa")


def test_zero3_is_refused(base, monkeypatch):
    section = load_recipe(base, [FOUR_BITS, LORA]).model
    monkeypatch.setattr(loading, "is_bitsandbytes_available", lambda: True)
    monkeypatch.setattr(loading, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ModelError, match="does not go with ZeRO-3.*\n.*ZeRO-2 or DDP"):
        load_model(section, load_config(section), attn_implementation="sdpa")


@pytest.fixture
def bitsandbytes(monkeypatch):
    """As on other CPUs: with AVX-512 BF16 it rounds the scales to bfloat16 in the first pass that does not train, which only
    flat batches have before training, as they are tried out."""
    library = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(library.nn.modules, "has_avx512bf16", lambda: False)
    return library


def test_what_is_quantised_and_what_trains(base, tmp_path, bitsandbytes):
    model = trainer(base, tmp_path).model
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer.base_layer, bitsandbytes.nn.Linear4bit)
    assert layer.base_layer.weight.dtype == torch.uint8 and layer.base_layer.weight.quant_state.nested
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    others = [weight for weight in model.parameters() if weight.is_floating_point()]
    assert {weight.dtype for weight in others} == {torch.float32}


@pytest.mark.ci
@pytest.mark.slow  # trains three times
def test_layouts_do_not_change_the_updates(base, tmp_path, bitsandbytes):
    """Control: without quantisation losses are others."""
    padded = curve(trainer(base, tmp_path / "padded", "batching.strategy=pad_longest"))
    flat = curve(trainer(base, tmp_path / "flat", "training.gradient_checkpointing=true"))
    whole = curve(trainer(base, tmp_path / "whole", "model.quantization=null"))
    assert len(flat.loss) == 4 and flat.difference(padded) < 1e-4 < 1e-3 < flat.difference(whole)


@pytest.mark.ci
@pytest.mark.slow  # trains twice
def test_a_run_is_resumed_and_its_adapter_merged(base, tmp_path, bitsandbytes):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    saving = ("training.save_strategy=steps", "training.save_steps=2")
    unbroken = trainer(base, tmp_path / "run", *saving)
    fit(unbroken)
    resumed = trainer(base, tmp_path / "again", *saving)
    fit(resumed, str(tmp_path / "run/checkpoint-2"))
    losses = [{e["step"]: e["loss"] for e in t.state.log_history if "loss" in e} for t in (unbroken, resumed)]
    assert losses[1][4] == losses[0][4] and losses[0][4] != losses[0][3]
    for (name, one), (_, other) in zip(
        unbroken.model.named_parameters(), resumed.model.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name

    unbroken.save_model(str(tmp_path / "adapter"))
    directory = load_recipe(base).model.model_name_or_path
    whole = AutoModelForCausalLM.from_pretrained(directory)
    ids = torch.arange(3, 23).unsqueeze(0)
    with torch.no_grad():
        before = whole(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(whole, tmp_path / "adapter").eval()
        expected = adapted(input_ids=ids).logits
        merged = adapted.merge_and_unload()(input_ids=ids).logits
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(before - merged).max() > 1e-3


@pytest.mark.ci
@pytest.mark.slow  # counts activations twice
@pytest.mark.parametrize("twice", [True, False], ids=["double quantisation", "plain"])
def test_the_plan_of_memory_counts_bits(base, tmp_path, bitsandbytes, twice):
    """Parameters to the byte but for a few scales, which a tiny model has many of; control: as if not quantised."""
    options = [f"model.quantization.bnb_4bit_use_double_quant={str(twice).lower()}"]
    run = trainer(base, tmp_path, *options)
    held = 0
    for weight in run.model.parameters():
        held += weight.numel() * weight.element_size()
        if (state := getattr(weight, "quant_state", None)) is not None:
            held += state.absmax.numel() * state.absmax.element_size()
            held += state.state2.absmax.numel() * 4 if state.nested else 0
    (planned, whole) = (
        plan_memory(
            describe_model(load_recipe(base, [FOUR_BITS, LORA, *options, *more])),
            MicroBatchSize(tokens=64, supervised=64, rows=1, width=64),
            engine="ddp",
            ranks=1,
            half=False,
            checkpointing=False,
        )
        .lines[0]
        .bytes
        for more in ([], ["model.quantization=null"])
    )
    assert planned == pytest.approx(held, rel=0.002) and whole > 1.5 * held
