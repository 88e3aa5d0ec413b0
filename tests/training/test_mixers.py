"""Models that mix tokens by more than attention train flat as they train padded, and as on single documents."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from packtrain.recipe.reader import load_recipe
from packtrain.training.run import build, fit
from results.mixers.equality import FAMILIES, UPDATES, examine, one_by_one

LONG = (pytest.mark.slow, pytest.mark.ci)
SHORT = ("lfm2", "gptj")
CASES = [pytest.param(family, marks=() if family in SHORT else LONG) for family in FAMILIES]


@pytest.mark.parametrize("family", CASES)
def test_flat_padded_and_one_by_one_are_the_same_updates(family):
    found = examine(family)
    assert max(found.pad_longest, found.balanced) < 1e-5
    assert found.leaking > 1e-3  # control: documents that are said to be one
    assert found.losses[1] - found.losses[0] > 1e-3


def test_the_loop_over_single_documents_makes_20_updates():
    alone = one_by_one("gptj")
    assert len(alone.losses) == len(alone.norms) == UPDATES == 20


RECIPES = {
    "gptj": ("{model_type: gptj, n_embd: 32, n_layer: 2, n_head: 4, rotary_dim: 8}", "2 mixers (GPTJAttention)"),
    "falcon": (
        "{model_type: falcon, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4}",
        "2 mixers (FalconAttention)",
    ),
    "lfm2": (
        "{model_type: lfm2, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2, "
        "intermediate_size: 48, layer_types: [conv, full_attention]}",
        "1 mixer (Lfm2ShortConv)",
    ),
    "gpt_neox": (
        "{model_type: gpt_neox, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4, intermediate_size: 48}",
        None,
    ),
}


@pytest.mark.parametrize("family", RECIPES)
def test_a_recipe_with_a_flat_strategy_trains(tmp_path, family):
    config, inside = RECIPES[family]
    path = tmp_path / "recipe.yaml"
    path.write_text(f"""
model: {{config: {config}, tokenizer_vocab_size: 320}}
data: {{path: "packtrain:arithmetic", num_rows: 16, max_length: 256, overflow: drop}}
batching: {{strategy: balanced, examples_per_step: 4, max_tokens: 512}}
training: {{output_dir: {tmp_path / "run"}, max_steps: 2, report_to: none, save_strategy: "no", use_cpu: true}}
""")
    console = Console(record=True, width=200, quiet=False, file=io.StringIO())
    trainer = build(load_recipe(path), console=console)
    said = next(line for line in console.export_text().splitlines() if line.startswith("documents of a flat batch"))
    assert "isolated" in said
    assert said.endswith(f"padded inside: {inside}") if inside else "padded inside" not in said
    fit(trainer)
    assert trainer.state.global_step == 2
