"""A recipe's examples, as its task and a loop of one's own get them."""

from __future__ import annotations

import numpy as np
import pytest

import packtrain
from packtrain.errors import DataError, ModelError
from packtrain.modeling.tokenizer import load_tokenizer
from packtrain.recipe.sections import ModelSection
from packtrain.training.run import build

RECIPE = """
model:
  config: {model_type: llama, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2}
  tokenizer_vocab_size: 300
data: {path: packtrain:arithmetic, num_rows: 24, eval_size: 4, max_length: 512}
batching: {strategy: padding_free, examples_per_step: 5, max_tokens: 512}
training: {output_dir: OUT, num_train_epochs: 1, use_cpu: true}
"""


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("OUT", str(tmp_path / "run")))
    return path


def same(batches, examples) -> bool:
    """Whether flat batches hold the tokens and labels of the examples that they name."""
    for batch in batches:
        input_ids, labels = examples.gather(batch["example_ids"].numpy())
        if not np.array_equal(batch["input_ids"][0], input_ids) or not np.array_equal(batch["labels"][0], labels):
            return False
    return True


def test_examples_are_those_that_train_lays_out(recipe_file):
    """Control: the same examples under other numbers."""
    recipe = packtrain.load_recipe(recipe_file)
    trainer = build(recipe)
    training, held_out = list(trainer.get_train_dataloader()), list(trainer.get_eval_dataloader())
    mine, others = packtrain.load_examples(recipe)
    assert sorted(i for batch in training for i in batch["example_ids"].tolist()) == list(range(20))
    assert len(mine) == 20 and len(others) == 4
    assert same(training, mine) and same(held_out, others)
    assert all(-100 in mine[i]["labels"][1:] for i in range(20))  # the prompts
    assert not same(training, mine.take(np.arange(20)[::-1]))


def test_examples_are_laid_out_by_the_objective(recipe_file):
    """Control: the same rows without tails."""
    tails = ["objective.name=masked_diffusion", "objective.tail=rainbow", "objective.canvas=multiple_of"]
    diffusion = packtrain.load_recipe(recipe_file, [*tails, "objective.canvas_size=16"])
    plain = packtrain.load_recipe(recipe_file)
    ids, of_train = np.arange(20), build(diffusion).train_dataset
    for mine, theirs in zip(packtrain.load_examples(diffusion)[0].gather(ids), of_train.gather(ids), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert packtrain.load_examples(plain)[0].lengths.sum() < of_train.lengths.sum()


def test_a_recipe_that_holds_nothing_out_has_no_held_out_examples(recipe_file):
    examples, held_out = packtrain.load_examples(packtrain.load_recipe(recipe_file, ["eval_size=0"]))
    assert len(examples) == 24 and held_out is None


def test_rows_that_are_not_there_are_an_error(recipe_file):
    with pytest.raises(DataError, match="data.path"):
        packtrain.load_examples(packtrain.load_recipe(recipe_file, ["data.path=nowhere.jsonl"]))


@pytest.mark.parametrize(
    ("file", "message"), [("adapter_config.json", "is an adapter"), ("config.json", "is the folder of a run")]
)
def test_the_folder_of_a_run_is_no_model_to_start_from(file, message, tmp_path):
    """Said before its tokenizer is looked for, which lies in `model/` as well."""
    (tmp_path / "run/model").mkdir(parents=True)
    (tmp_path / "run/model" / file).write_text("{}")
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{model_name_or_path: {tmp_path / 'run'}}}\n"
        f"data: {{path: {tmp_path / 'rows.jsonl'}}}\ntraining: {{output_dir: {tmp_path / 'out'}}}\n"
    )
    with pytest.raises(ModelError, match=f"model.model_name_or_path: {message}"):
        packtrain.load_examples(packtrain.load_recipe(tmp_path / "recipe.yaml"))


@pytest.mark.parametrize("key", ["model_name_or_path", "tokenizer_name_or_path"])
def test_a_tokenizer_that_is_missed_is_named_by_the_key_that_was_given(key, tmp_path):
    with pytest.raises(ModelError) as caught:
        load_tokenizer(ModelSection(**{"model_name_or_path": "base", key: str(tmp_path)}))
    assert caught.value.key == f"model.{key}"
