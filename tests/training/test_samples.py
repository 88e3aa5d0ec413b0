"""Answers at every evaluation: those of the model as it stands, and training is the same with them and without."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from packtrain.errors import RecipeError
from packtrain.generation.batches import generate
from packtrain.generation.prompts import encode_prompts
from packtrain.generation.trained import load_trained
from packtrain.recipe.reader import load_recipe
from packtrain.training.run import train

RECIPE = """
model:
  config: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4,
           attention_dropout: 0.2}
  tokenizer_vocab_size: 300
data: {path: "packtrain:arithmetic", num_rows: 60, eval_size: 10, max_length: 512, overflow: drop}
batching: {examples_per_step: 10, max_tokens: 1024}
training: {output_dir: OUT, use_cpu: true, learning_rate: 1e-2, max_steps: 4, logging_steps: 1, report_to: none,
  save_strategy: "no", eval_strategy: steps, eval_steps: 2}
"""
PROMPTS = ["What is 2 plus 2?", "Tom has three apples."]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.replace("OUT", str(tmp_path / "run")))
    return path


def test_samples_are_the_answers_of_the_model_and_change_nothing(file, tmp_path):
    """Also its dropout draws the same numbers; control: another seed has other weights."""
    out = io.StringIO()
    asked = f"training.sample_prompts={json.dumps(PROMPTS)}"
    sampled = train(load_recipe(file, [asked]), console=Console(file=out, width=300))
    rows = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["prompt"]) for row in rows] == [(step, text) for step in (0, 2, 4) for text in PROMPTS]
    assert out.getvalue().count("sample at step ") == 6

    trained = load_trained(tmp_path / "run")
    prompts = encode_prompts(trained.tokenizer, PROMPTS, trained.prompts)
    found = dict(generate(trained.model, trained.tokenizer, prompts, max_new_tokens=128))
    answers = [trained.tokenizer.decode(found[number], skip_special_tokens=True) for number in (0, 1)]
    assert [row["answer"] for row in rows[-2:]] == answers
    assert [row["answer"] for row in rows[:2]] != answers  # of the model before training

    def weights(*overrides: str) -> dict[str, torch.Tensor]:
        train(load_recipe(file, [f"output_dir={tmp_path / 'other'}", *overrides]), overwrite=True)
        return load_file(tmp_path / "other/model/model.safetensors")

    mine, plain, other = load_file(f"{sampled.model_dir}/model.safetensors"), weights(), weights("seed=7")
    assert all(torch.equal(mine[name], plain[name]) for name in plain)
    assert not (tmp_path / "other/samples.jsonl").exists()
    assert any(mine[name].shape == other[name].shape and not torch.equal(mine[name], other[name]) for name in other)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["objective.name=masked_diffusion"],
            "needs an objective that predicts the next token, not `masked_diffusion`",
        ),
        (["eval_size=0", "eval_strategy=no"], "is answered at every evaluation, and the recipe has no evaluation data"),
        (["training.sample_prompts=[]"], "training.sample_prompts"),
        (["training.sample_prompts=3"], "must be a list of text"),
    ],
)
def test_samples_that_could_not_be_written_are_refused(file, overrides, expected):
    with pytest.raises(RecipeError, match=expected):
        load_recipe(file, ["training.sample_prompts=[a]", *overrides])
