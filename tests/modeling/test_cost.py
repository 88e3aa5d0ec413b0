"""Costs counted on the model itself: those of the formula where it holds, and about linear where mixers are."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from transformers import CONFIG_MAPPING

from packtrain.modeling.cost import PLAIN, cost_of, count_cost, find_cost
from packtrain.packing.cost import Cost
from packtrain.recipe.sections import ModelSection


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PACKTRAIN_CACHE", str(tmp_path))


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "qwen3_moe", "gpt2"])
def test_the_count_is_the_formula_for_plain_transformers(architecture):
    config = CONFIG_MAPPING[architecture]()
    assert architecture in PLAIN
    counted, formula = count_cost(config), Cost.of_config(config)
    assert counted.linear == pytest.approx(formula.linear, rel=0.01)  # routers
    assert counted.quadratic == pytest.approx(formula.quadratic)


@pytest.mark.parametrize(("architecture", "attention"), [("lfm2", 1), ("qwen3_next", 0.25)])
def test_hybrids_are_linear_where_their_mixers_are(architecture, attention):
    """The formula takes every layer for attention."""
    config = CONFIG_MAPPING[architecture]()
    counted = count_cost(config)
    assert counted.quadratic == pytest.approx(attention * Cost.of_config(config).quadratic)
    if architecture == "lfm2":
        half = CONFIG_MAPPING["lfm2"](layer_types=["conv", "full_attention"] * 16)
        assert count_cost(half).quadratic == pytest.approx(counted.quadratic / 2)


def test_state_space_models_have_a_cost():
    config = CONFIG_MAPPING["mamba2"](num_hidden_layers=4)
    counted = count_cost(config)
    assert counted.quadratic * 10_000 < 0.1 * counted.linear  # FLOPs of a document of 10,000 tokens
    no_heads = CONFIG_MAPPING["mamba"](num_hidden_layers=2, hidden_size=64)  # neither heads nor an MLP
    assert cost_of(no_heads).linear > 2 * 64 * 64


def test_widths_that_differ_between_layers():
    config = CONFIG_MAPPING["gemma3n_text"](
        num_hidden_layers=2, num_kv_shared_layers=0, intermediate_size=[64, 192], activation_sparsity_pattern=[0.0] * 2,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    one_width = Cost.of_config(config.to_dict() | {"intermediate_size": 128})
    assert Cost.of_config(config) == one_width and cost_of(config).linear > 0


def test_a_count_is_kept(tmp_path, monkeypatch):
    config = CONFIG_MAPPING["lfm2"](num_hidden_layers=2, layer_types=["conv", "full_attention"])
    counted = cost_of(config)
    monkeypatch.setattr("packtrain.modeling.cost.count_cost", lambda config: pytest.fail("counted again"))
    assert cost_of(config) == counted and len(list((tmp_path / "costs").iterdir())) == 1
    with pytest.raises(pytest.fail.Exception):  # control: another config
        cost_of(CONFIG_MAPPING["lfm2"](num_hidden_layers=2, layer_types=["conv", "conv"]))


def test_what_cannot_be_counted_costs_its_tokens(monkeypatch):
    def refuse(config):
        raise RuntimeError("no values")

    monkeypatch.setattr("packtrain.modeling.cost.count_cost", refuse)
    assert cost_of(CONFIG_MAPPING["mamba"]()) == Cost()


def test_a_warm_plan_needs_no_torch():
    section = ModelSection(
        config={"model_type": "lfm2", "num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
    )
    assert find_cost(section) == cost_of(
        CONFIG_MAPPING["lfm2"](**{k: v for k, v in section.config.items() if k != "model_type"})
    )
    program = (
        "import sys; from packtrain.modeling.cost import find_cost; from packtrain.recipe.sections import ModelSection; "
        f"print(find_cost(ModelSection(config={section.config!r}))); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(find_cost(section))
