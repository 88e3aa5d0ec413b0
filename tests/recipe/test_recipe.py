"""What is right in a recipe is read right, and its fields are the libraries' own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from packtrain.recipe.fields import describe, library_fields
from packtrain.recipe.reader import fields_of, load_recipe
from packtrain.recipe.recipe import OWN_SECTIONS, Recipe
from tests.recipe.bad_recipes import GOOD, problems, write

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def test_values_and_defaults(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD))
    assert recipe.model.model_name_or_path == "org/model"
    assert (recipe.data.max_length, recipe.data.overflow, recipe.data.eval_size) == (2048, "error", 0)
    assert (recipe.batching.strategy, recipe.batching.examples_per_step) == ("balanced", 64)
    assert recipe.lora is None
    assert recipe.training == {
        "seed": 42,
        "gradient_accumulation_steps": "auto",
        "output_dir": "results/run",
    }


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("1e-4", 1e-4),
        ("1.0e-4", 1e-4),
        ("'1e-4'", 1e-4),
        ("2E+2", 200.0),
        (".5", 0.5),
        ("3", 3),
        ("0x10", 16),
        ("0o10", 8),
        ("010", 10),
    ],
)
def test_numbers_are_yaml_1_2_numbers(tmp_path, written, read):
    recipe = load_recipe(write(tmp_path, GOOD), [f"training.learning_rate={written}"])
    assert recipe.training["learning_rate"] == read
    assert type(recipe.training["learning_rate"]) is type(read)


def test_words_that_yaml_1_1_turns_into_something_else_stay_words(tmp_path):
    for word in ("no", "on", "12:30", "2024-05-01", "1_000", "0b1", "="):
        recipe = load_recipe(write(tmp_path, GOOD), [f"training.run_name={word}"])
        assert recipe.training["run_name"] == word


def test_whole_numbers_may_be_written_as_floats(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD), ["batching.max_tokens=1e4", "training.max_steps='100'"])
    assert recipe.batching.max_tokens == 10_000 and type(recipe.batching.max_tokens) is int
    assert recipe.training["max_steps"] == 100 and type(recipe.training["max_steps"]) is int


@pytest.mark.parametrize(("written", "read"), [("200", 200), ("0.1", 0.1), ("'0.1'", 0.1), ("0", 0)])
def test_eval_size_keeps_rows_and_shares_apart(tmp_path, written, read):
    recipe = load_recipe(write(tmp_path, GOOD), [f"data.eval_size={written}"])
    assert recipe.data.eval_size == read and type(recipe.data.eval_size) is type(read)


def test_overrides_full_flat_nested_and_null(tmp_path):
    text = GOOD.replace("{model_name_or_path: org/model}", "{config: {model_type: llama}, tokenizer_vocab_size: 300}")
    overrides = [
        "batching.max_tokens=8192",
        "examples_per_step=16",  # flat, ours
        "learning_rate=2e-5",  # flat, TrainingArguments
        "lora_alpha=32",  # flat, LoraConfig
        "model.config.hidden_size=64",
        "config.num_hidden_layers=2",
        "lora.target_modules=[q_proj, v_proj]",
        "revision=null",  # model.revision: ours hides LoraConfig's
        "max_tokens=4096",  # the last one wins
    ]
    recipe = load_recipe(write(tmp_path, text), overrides)
    assert recipe.batching.max_tokens == 4096 and recipe.batching.examples_per_step == 16
    assert recipe.training["learning_rate"] == 2e-5
    assert recipe.lora == {"lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}
    assert recipe.model.config == {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2}
    assert recipe.sources.path == str(tmp_path / "recipe.yaml") and recipe.sources.overrides == tuple(overrides)
    assert load_recipe(write(tmp_path, text), [*overrides, "lora=null"]).lora is None


def test_a_leaf_of_two_sections_is_ambiguous(tmp_path):
    leaves = [name for section in (*OWN_SECTIONS, "objective") for name in fields_of(section)]
    assert {name for name in leaves if leaves.count(name) > 1} == {"name"}
    message = str(problems(write(tmp_path, GOOD), ["name=main"]))
    assert "is a key of several sections" in message and "data.name or objective.name" in message


def test_a_recipe_is_plain_data_and_comes_back(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD), ["lora.r=4", "data.eval_size=0.1"])
    again = Recipe.model_validate(json.loads(json.dumps(recipe.to_dict())))
    assert again.to_dict() == recipe.to_dict() and again.hash == recipe.hash
    stored = tmp_path / "stored.yaml"
    stored.write_text(yaml.safe_dump(recipe.to_dict()))
    assert load_recipe(stored).hash == recipe.hash


def test_hash_tells_recipes_apart_and_ignores_how_they_are_written(tmp_path):
    plain = load_recipe(write(tmp_path, GOOD)).hash
    assert load_recipe(write(tmp_path, GOOD + "batching: {max_tokens: 16384.0}  # the default\n")).hash == plain
    assert load_recipe(write(tmp_path, GOOD), ["batching.max_tokens=16383"]).hash != plain


def test_recipes_are_frozen(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD))
    with pytest.raises(ValueError, match="frozen"):
        recipe.batching.max_tokens = 1


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_the_project_loads(path):
    assert load_recipe(path, ["data.path=rows.jsonl"]).sources.path == str(path)


def test_there_are_recipes():
    assert {"quickstart", "sft", "sft_lora", "gsm8k_local"} <= {path.stem for path in RECIPES}


def test_a_mixture_is_read_and_comes_back(tmp_path):
    text = GOOD.replace(
        "path: rows.jsonl", "mixture: [{path: [a, 'b/*'], weight: 0.5, num_rows: '1e3'}, {path: c, weight: 2}]"
    )
    recipe = load_recipe(write(tmp_path, text))
    first, second = recipe.data.mixture
    assert (first.path, first.weight, first.num_rows, second.weight, second.split) == (["a", "b/*"], 0.5, 1000, 2, None)
    assert recipe.data.path is None and Recipe.model_validate(recipe.to_dict()).data == recipe.data
    assert json.loads(json.dumps(recipe.to_dict()))["data"]["mixture"][1]["path"] == "c"
    other = load_recipe(write(tmp_path, text), ["data.mixture=[{path: c, weight: 1}]"])
    assert other.hash != recipe.hash and len(other.data.mixture) == 1
    listed = load_recipe(write(tmp_path, GOOD), ["data.path=[a.jsonl, 'b/*.parquet']", "data.eval_path=[c]"])
    assert listed.data.path == ["a.jsonl", "b/*.parquet"] and listed.data.eval_path == ["c"]


@pytest.mark.parametrize(
    "keep",
    [
        {"by": "random", "share": 0.5, "seed": 3},
        {"by": "perplexity", "share": 0.5, "which": "middle", "scores": "x.parquet"},
    ],
)
def test_what_is_kept_is_read_and_comes_back(tmp_path, keep):
    """Also with every default written out, as in the recipe of a run."""
    recipe = load_recipe(write(tmp_path, GOOD), [f"data.keep={json.dumps(keep)}"])
    assert recipe.data.keep.model_dump(exclude_none=True) == keep
    written = json.dumps(recipe.to_dict()["data"]["keep"])
    assert load_recipe(write(tmp_path, GOOD), [f"data.keep={written}"]).data == recipe.data
    assert load_recipe(write(tmp_path, GOOD)).hash != recipe.hash


def test_a_schedule_is_read_and_comes_back(tmp_path):
    text = "batching.schedule=[{until: 0.1, max_length: '64'}, {until: '0.4', max_length: 1e2}]"
    recipe = load_recipe(write(tmp_path, GOOD), [text])
    assert [(phase.until, phase.max_length) for phase in recipe.batching.schedule] == [(0.1, 64), (0.4, 100)]
    written = json.dumps(recipe.to_dict()["batching"]["schedule"])
    assert load_recipe(write(tmp_path, GOOD), [f"batching.schedule={written}"]).batching == recipe.batching
    assert load_recipe(write(tmp_path, GOOD)).hash != recipe.hash


# Reflection


def test_reflected_fields_are_the_libraries_own():
    """Against the real classes; the names by which a field can be given are those of `__init__`."""
    import inspect

    from peft import LoraConfig
    from transformers import TrainingArguments

    for name, cls in (
        ("transformers.training_args.TrainingArguments", TrainingArguments),
        ("peft.tuners.lora.config.LoraConfig", LoraConfig),
    ):
        assert set(library_fields(name)) == set(inspect.signature(cls).parameters)


@pytest.mark.parametrize(
    ("section", "field", "described"),
    [
        ("training", "learning_rate", "a number"),
        ("training", "max_steps", "a whole number"),
        ("training", "bf16", "true or false"),
        ("training", "eval_strategy", "one of no, steps, epoch"),
        ("training", "report_to", "text or a list of text"),
        ("training", "gradient_accumulation_steps", "a whole number above 0 or auto"),
        ("lora", "bias", "one of none, all, lora_only"),
        ("lora", "target_modules", "a list of text or text"),
        ("lora", "task_type", "one of SEQ_CLS, SEQ_2_SEQ_LM, CAUSAL_LM"),
    ],
)
def test_reflected_types_are_checked_where_they_are_simple(section, field, described):
    assert describe(fields_of(section)[field]).startswith(described)


def test_unknown_classes_have_no_fields():
    assert library_fields("no_such_package.module.Class") == {}
    assert library_fields("transformers.training_args.NoSuchClass") == {}


def test_reading_a_recipe_imports_no_heavy_library(tmp_path):
    program = (
        "import sys\n"
        "from packtrain.recipe.reader import load_recipe\n"
        f"load_recipe({str(write(tmp_path, GOOD))!r}, ['lora.r=8', 'learning_rate=1'])\n"
        "print([name for name in ('torch', 'transformers', 'peft', 'datasets', 'accelerate') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
