"""Recipes: everything wrong is found at once and named; what is right is read right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from packtrain.errors import RecipeError
from packtrain.packing.lengths import LONGEST, MOST_EPOCHS
from packtrain.packing.strategies import STRATEGIES
from packtrain.recipe import reader
from packtrain.recipe.fields import describe, library_fields
from packtrain.recipe.reader import fields_of, load_recipe
from packtrain.recipe.recipe import OWN_SECTIONS, Recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))

GOOD = """\
model: {model_name_or_path: org/model}
data: {path: rows.jsonl}
training: {output_dir: results/run}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(path: Path, overrides: list[str] | None = None) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides or [])
    return caught.value


# ---------------------------------------------------------------------------------------------- what is right


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


# ---------------------------------------------------------------------------------------------- what is wrong

# (what follows GOOD or replaces it, overrides, parts of the message)
BAD: dict[str, tuple[str, list[str], list[str]]] = {
    "empty": ("", [], ["is empty", "model, data, batching"]),
    "comment only": ("# nothing\n", [], ["is empty"]),
    "list": ("- a\n- b\n", [], ["is not a mapping of sections"]),
    "word": ("quickstart\n", [], ["is not a mapping of sections"]),
    "unclosed": ("model: {a: 1\n", [], ["cannot be read as YAML", "recipe.yaml:"]),
    "tab": ("model:\n\tdtype: auto\n", [], ["cannot be read as YAML", ":2", "indent with spaces"]),
    "two documents": (GOOD + "---\n" + GOOD, [], ["cannot be read as YAML"]),
    "alias": (GOOD + "batching: &b {max_tokens: 4096}\nobjective: *b\n", [], ["alias", "write the value out"]),
    "python object": (GOOD + "lora: !!python/object/apply:os.system [id]\n", [], ["tag", "plain values only"]),
    "timestamp tag": (GOOD + "batching: {strategy: !!timestamp 2024-01-01}\n", [], ["tag"]),
    "nested too deep": ("model: " + "[" * 500 + "]" * 500, [], ["nested deeper"]),
    "lone surrogate": (GOOD + 'objective: {name: "\\ud800"}\n', [], ["cannot be read as str"]),
    "impossible escape": (GOOD + 'objective: {name: "\\UFFFFFFFF"}\n', [], ["cannot be read as YAML"]),
    "key is a number": (GOOD + "batching: {1: 2}\n", [], ["a key must be a plain word", ":4", "got '1'"]),
    "key is a list": (GOOD + "batching: {[1, 2]: 2}\n", [], ["a key must be a plain word"]),
    "twice in a section": (
        GOOD + "batching:\n  max_tokens: 4096\n  max_tokens: 8192\n",
        [],
        ["recipe.yaml:6: batching.max_tokens: is given twice (got 8192)", "recipe.yaml:5"],
    ),
    "output_dir leads out": (
        GOOD,
        ["training.output_dir=runs/../../x"],
        ["training.output_dir: must be printable", "a plain path"],
    ),
    "run_name of two lines": (GOOD, ['training.run_name="a\\nb"'], ["training.run_name: must be printable"]),
    "section twice": (GOOD + "data: {path: other}\n", [], ["data: is given twice", "recipe.yaml:2"]),
    "unknown section": (GOOD + "bathcing: {}\n", [], ["bathcing: is not a section", "did you mean `batching`?"]),
    "key at the top": (
        GOOD + "learning_rate: 1e-4\n",
        [],
        ["recipe.yaml:4: learning_rate: is not a section", "it belongs under `training:`"],
    ),
    "misspelled key": (
        GOOD + "batching: {max_token: 4096}\n",
        [],
        ["recipe.yaml:4: batching.max_token: is not a key (got 4096)", "did you mean `max_tokens`?"],
    ),
    "key in the wrong section": (
        GOOD + "batching: {max_length: 512}\n",
        [],
        ["batching.max_length: is not a key", "it belongs under `data:`"],
    ),
    "near a key of another section": (
        GOOD + "batching: {lerning_rate: 1}\n",
        [],
        ["did you mean `training.learning_rate`?"],
    ),
    "unknown everywhere": (
        GOOD + "batching: {zzz: 1}\n",
        [],
        ["its keys are strategy, examples_per_step, max_tokens, tokens_per_step"],
    ),
    "older training key": (
        GOOD,
        ["training.evaluation_strategy=steps"],
        ["--set: training.evaluation_strategy: is not a key", "did you mean `eval_strategy`?"],
    ),
    "unknown training key": (GOOD, ["training.zzzz=1"], ["takes the fields of TrainingArguments"]),
    "misspelled lora key": (GOOD, ["lora.lora_alhpa=1"], ["did you mean `lora_alpha`?"]),
    "unknown lora key": (GOOD, ["lora.zzzz=1"], ["takes the fields of LoraConfig"]),
    "word of other trainers": (GOOD + "data2: {}\n", ["training.packing=true"], ["use `batching.strategy`"]),
    "section is a word": (GOOD + "batching: fast\n", [], ["batching: must be a mapping of keys"]),
    "lora without keys": (GOOD + "lora:\n", [], ["lora: is empty", "write `lora: {}`"]),
    "text for a whole number": (GOOD, ["batching.max_tokens=many"], ["must be a whole number above 0 (got 'many')"]),
    "grouped digits": (GOOD, ["batching.max_tokens=16_384"], ["must be a whole number above 0", "write 16384"]),
    "half a token": (GOOD, ["batching.max_tokens=10.5"], ["must be a whole number above 0 (got 10.5)"]),
    "bool for a whole number": (GOOD, ["batching.max_tokens=true"], ["must be a whole number above 0 (got True)"]),
    "no tokens": (GOOD, ["batching.max_tokens=0"], ["must be a whole number above 0 (got 0)"]),
    "list for a number": (GOOD, ["data.max_length=[1]"], ["must be a whole number above 0 (got [1])"]),
    "text for a number": (GOOD, ["training.learning_rate=fast"], ["must be a number (got 'fast')"]),
    "not a number": (GOOD, ["training.learning_rate=.nan"], ["must be a number (got nan)"]),
    "bool for a number": (GOOD, ["training.weight_decay=false"], ["must be a number (got False)"]),
    "yes": (GOOD, ["training.bf16=yes"], ["must be true or false (got 'yes')", "write true"]),
    "one": (GOOD, ["training.bf16=1"], ["must be true or false (got 1)"]),
    "number for text": (GOOD, ["training.run_name=2024"], ["must be text (got 2024)", 'quotes: "2024"']),
    "unknown choice": (GOOD, ["data.overflow=truncat"], ["must be one of error, truncate", "did you mean truncate?"]),
    "unknown choice of a library": (GOOD, ["lr_scheduler_type=cosin"], ["did you mean cosine?"]),
    "unknown bias": (GOOD, ["lora.bias=some"], ["must be one of none, all, lora_only"]),
    "too long a share": (GOOD, ["data.eval_size=1.5"], ["a whole number of rows or a share below 1"]),
    "fewer than no rows": (GOOD, ["data.eval_size=-1"], ["a whole number of rows or a share below 1"]),
    "empty path": (GOOD, ["data.path=''"], ["data.path: must not be empty"]),
    "blank output": (GOOD, ["training.output_dir='  '"], ["training.output_dir: must not be empty"]),
    "an empty list": (GOOD, ["data.path=[]"], ["data.path: must be text or a list of text"]),
    "a mixture and a path": (
        GOOD,
        ["data.mixture=[{path: a, weight: 1}]", "data.num_rows=3", "data.name=x", "data.eval_split=test"],
        [
            "data.path: contradicts",
            "data.num_rows: contradicts",
            "data.name: contradicts",
            "data.eval_split: does not say",
        ],
    ),
    "keys of a source": (
        GOOD.replace(
            "path: rows.jsonl", "mixture: [{path: a, weight: 0}, {path: 3, wieght: 1}, b, {weight: .inf, path: a}]"
        ),
        [],
        [
            "data.mixture.0.weight: must be a number above 0 (got 0)",
            "data.mixture.1.path: must be text or a list of text (got 3)",
            "data.mixture.1.wieght: is not a key (got 1)\n    fix: did you mean `weight`?",
            "data.mixture.1.weight: is missing",
            "data.mixture.2: must be a mapping of keys to values (got 'b')",
            "data.mixture.3.weight: must be a number above 0",
        ],
    ),
    "no source": (GOOD.replace("path: rows.jsonl", "mixture: []"), [], ["data.mixture: must be a list of mappings"]),
    "one source twice": (
        GOOD.replace(
            "path: rows.jsonl",
            "mixture: [{path: a, weight: 1}, {path: ./a, weight: 2}, {path: a, weight: 1, split: test}]",
        ),
        [],
        ["data.mixture.1: is the same source as `data.mixture.0`"],
    ),
    "nothing to keep by": (GOOD, ["data.keep={}"], ["data.keep.by: is missing", "data.keep.share: is missing"]),
    "a share that is all": (
        GOOD,
        ["data.keep={by: random, share: 1, whihc: low}"],
        ["share: must be a number above 0 and below 1 (got 1)", "keep.whihc: is not a key", "did you mean `which`?"],
    ),
    "a share alone": (GOOD, ["data.keep=0.7"], ["data.keep: must be a mapping with by and share (got 0.7)"]),
    "kept by nothing": (
        GOOD,
        ["data.keep={by: el2n, share: 0.7, seed: 3}"],
        ["data.keep.scores: is missing: there is no `el2n`", "packtrain score", "data.keep.seed: has no effect"],
    ),
    "kept at random by scores": (
        GOOD.replace("path: rows.jsonl", "mixture: [{path: a, weight: 1}]"),
        ["data.keep={by: random, share: 0.7, which: low, scores: x}"],
        ["keep.scores: has no effect", "keep.which: has no effect", "data.keep: contradicts `data.mixture`"],
    ),
    "streamed as if it were counted": (
        GOOD,
        [
            "data.streaming=true",
            "data.eval_size=5",
            "data.num_proc=2",
            "data.keep={by: random, share: 0.5}",
            "batching.strategy=bfd",
            "batching.shapes=4",
            "batching.schedule=[{until: 0.3, max_length: 8}]",
            "objective.name=masked_lm",
            "training.save_strategy=epoch",
            "training.dataloader_num_workers=2",
        ],
        [
            "training.max_steps: must be set with `data.streaming`",
            "data.eval_size: chooses among all rows",
            "name rows to evaluate on in `data.eval_path`",
            "data.num_proc: has no effect with `data.streaming`",
            "data.keep: chooses among all examples",
            "batching.strategy: packs the whole epoch, and streamed rows",
            "fix: choose a strategy that keeps the examples of each update: pad_max, pad_longest",
            "batching.shapes: is found from the lengths of all examples",
            "batching.schedule: takes the short examples",
            "objective.name: `masked_lm` looks at all examples first",
            "choose one that takes streamed rows (causal_lm)",
            "training.save_strategy: cannot be `epoch` with `data.streaming`",
            "fix: set it to `steps`, with `training.save_steps`",
            "training.dataloader_num_workers: has no effect with `data.streaming`",
        ],
    ),
    "a streamed mixture": (
        GOOD.replace("path: rows.jsonl", "mixture: [{path: a, weight: 1}]"),
        ["data.streaming=true", "training.max_steps=5"],
        ["data.mixture: cannot be streamed", "name the rows in `data.path`, which takes a list"],
    ),
    "a buffer of nothing": (GOOD, ["data.buffer_size=5"], ["data.buffer_size: has no effect without `data.streaming`"]),
    "a path taken away": (GOOD, ["data.path=null"], ["data.path: is missing"]),
    "no path": ("model: {model_name_or_path: m}\ntraining: {output_dir: x}\n", [], ["data.path: is missing"]),
    "no output": (
        "model: {model_name_or_path: m}\ndata: {path: x}\n",
        [],
        ["training.output_dir: is missing", "results/my_run"],
    ),
    "no model": ("data: {path: x}\ntraining: {output_dir: x}\n", [], ["model: names no model"]),
    "two models": (GOOD, ["model.config={model_type: llama}"], ["contradicts `model.model_name_or_path`"]),
    "config without type": (
        GOOD,
        ["model.model_name_or_path=null", "model.config={hidden_size: 64}", "model.tokenizer_vocab_size=300"],
        ["model.config: lacks `model_type`"],
    ),
    "config without tokenizer": (
        GOOD,
        ["model.model_name_or_path=null", "model.config={model_type: llama}"],
        ["comes without a tokenizer", "model.tokenizer_vocab_size"],
    ),
    "two tokenizers": (
        GOOD,
        ["tokenizer_vocab_size=300", "tokenizer_name_or_path=gpt2"],
        ["model.tokenizer_vocab_size: contradicts `model.tokenizer_name_or_path`"],
    ),
    "new tokenizer for an old model": (GOOD, ["tokenizer_vocab_size=300"], ["keeps its own tokenizer"]),
    "tiny vocabulary": (GOOD, ["tokenizer_vocab_size=100"], ["must be a whole number from 264 on (got 100)"]),
    "remote code": (GOOD, ["trust_remote_code=true"], ["must be pinned", "full commit hash"]),
    "remote code of a branch": (GOOD, ["trust_remote_code=true", "revision=main"], ["must be pinned"]),
    "revision of nothing": (
        GOOD,
        ["model_name_or_path=null", "config={model_type: llama}", "tokenizer_vocab_size=300", "revision=main"],
        ["model.revision: has no effect"],
    ),
    "two evaluation sets": (GOOD, ["eval_size=10", "eval_split=test"], ["contradicts `data.eval_split`"]),
    "evaluation on training data": (GOOD, ["eval_split=train"], ["data.eval_split: names the training data"]),
    "evaluation on the training file": (GOOD, ["eval_path=rows.jsonl"], ["data.eval_path: names the training data"]),
    "evaluation without data": (
        GOOD,
        ["training.eval_strategy=steps"],
        ["training.eval_strategy: needs evaluation data", "data.eval_size"],
    ),
    "best model without data": (GOOD, ["load_best_model_at_end=true"], ["needs evaluation data"]),
    "an example that can't fit": (
        GOOD,
        ["max_tokens=1024"],
        ["batching.max_tokens: is below `data.max_length` (2048)", "lower `data.max_length` to 1024"],
    ),
    "batch size": (
        GOOD,
        ["training.per_device_train_batch_size=4"],
        ["cannot be set", "batching.examples_per_step", "batching.max_tokens"],
    ),
    "sampling": (GOOD, ["train_sampling_strategy=group_by_length"], ["set `batching.strategy`"]),
    "group_by_length": (GOOD, ["training.group_by_length=true"], ["use `batching.strategy: group_by_length`"]),
    "batch size by trial": (GOOD, ["auto_find_batch_size=true"], ["lower `batching.max_tokens`"]),
    "unused columns": (GOOD, ["remove_unused_columns=true"], ["must stay False", "packed batches"]),
    "nan filter": (GOOD, ["logging_nan_inf_filter=true"], ["a loss of NaN would be logged as 0.0"]),
    "averaging": (GOOD, ["average_tokens_across_devices=false"], ["must stay True"]),
    "label smoothing": (GOOD, ["label_smoothing_factor=0.1"], ["must stay 0.0", "no label smoothing"]),
    "cache": (GOOD, ["training.use_cache=true"], ["joins the documents"]),
    "an update that the scaler would miss": (
        GOOD,
        ["fp16=true", "on_nonfinite=skip"],
        ["batching.on_nonfinite: cannot be `skip` with `training.fp16`"],
    ),
    "evaluation batches": (GOOD, ["per_device_eval_batch_size=4"], ["cannot be set", "set `batching.max_tokens`"]),
    "evaluation in halves": (GOOD, ["bf16_full_eval=true", "fp16_full_eval=true"], ["bf16_full_eval: must", "fp16_f"]),
    "evaluation by a switch": (GOOD, ["do_eval=true"], ["training.do_eval: cannot be set", "data.eval_size"]),
    "kept predictions": (GOOD, ["eval_accumulation_steps=4"], ["keeps no predictions"]),
    "wanted predictions": (GOOD, ["prediction_loss_only=false"], ["must stay True: evaluation sums losses"]),
    "inputs for metrics": (GOOD, ["include_for_metrics=[inputs]"], ["must stay []"]),
    "other metrics": (GOOD, ["batch_eval_metrics=true", "eval_use_gather_object=true"], ["batch_eval_m", "eval_use_g"]),
    "apart": (GOOD, ["eval_do_concat_batches=false"], ["must stay True: evaluation keeps no predictions"]),
    "lasting workers": (GOOD, ["dataloader_persistent_workers=true"], ["every epoch starts its own workers"]),
    "other workers": (GOOD, ["dataloader_multiprocessing_context=spawn"], ["Python's default method"]),
    "batches out of order": (GOOD, ["dataloader_in_order=false"], ["must stay True"]),
    "batches read again": (GOOD, ["ignore_data_skip=false"], ["must stay True", "resumes at the update"]),
    "another bar": (GOOD, ["disable_tqdm=false"], ["must stay True", "its own progress bar"]),
    "accelerate's loader": (
        GOOD,
        ["accelerator_config={split_batches: true, non_blocking: true}"],
        ["accelerator_config: cannot set `split_batches`", "leave `non_blocking` out"],
    ),
    "noise by rows": (GOOD, ["neftune_noise_alpha=5"], ["a row of this strategy holds many documents", "pad_longest"]),
    "no steps": (GOOD, ["max_steps=0"], ["training.max_steps: must be greater than 0 (got 0)"]),
    "longer than any": (GOOD, ["max_length=100000000", "max_tokens=100000000"], ["data.max_length: must be at most"]),
    "a variable": (GOOD, ["output_dir=$HOME/out"], ["training.output_dir: has a `$` in it"]),
    "two precisions": (GOOD, ["bf16=true", "fp16=true"], ["contradicts `training.bf16`"]),
    "no epochs": (GOOD, ["num_train_epochs=0"], ["trains for no epoch"]),
    "accumulation": (GOOD, ["gradient_accumulation_steps=some"], ["must be a whole number above 0 or auto"]),
    "override without value": (
        GOOD,
        ["batching.max_tokens"],
        ["--set: is not an override (got 'batching.max_tokens')"],
    ),
    "override without key": (GOOD, ["=3"], ["is not an override"]),
    "override with a hole": (GOOD, ["batching..max_tokens=3"], ["is not an override"]),
    "override of nothing": (GOOD, ["max_lenght=3"], ["not a key of any section", "did you mean `data.max_length`?"]),
    "override below a leaf": (
        GOOD,
        ["data.path.x=3"],
        ["data.path: is a value, not a mapping of keys (got 'rows.jsonl')"],
    ),
    "override that is no YAML": (
        GOOD,
        ["lora.target_modules=[q"],
        ["--set: lora.target_modules: cannot be read as YAML"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_recipes_say_what_is_wrong_and_what_to_do(tmp_path, name):
    text, overrides, parts = BAD[name]
    message = str(problems(write(tmp_path, text), overrides))
    for part in parts:
        assert part in message


def test_all_problems_are_reported_at_once_each_with_its_place(tmp_path):
    text = """\
modle: {model_name_or_path: org/model}
data:
  path: rows.jsonl
  overflow: cut
batching:
  max_tokens: many
  exmples_per_step: 8
training:
  learning_rate: fast
  bf16: true
  fp16: true
"""
    error = problems(write(tmp_path, text), ["lora.r=many"])
    found = {(problem.where.removeprefix(f"{tmp_path}/"), problem.key) for problem in error.problems}
    assert found == {
        ("recipe.yaml:1", "modle"),
        ("recipe.yaml:4", "data.overflow"),
        ("recipe.yaml:6", "batching.max_tokens"),
        ("recipe.yaml:7", "batching.exmples_per_step"),
        ("recipe.yaml:9", "training.learning_rate"),
        ("recipe.yaml:8", "training.output_dir"),
        ("recipe.yaml:11", "training.fp16"),
        ("--set", "lora.r"),
    }
    assert str(error).startswith("8 problems in the recipe")


def test_one_mistake_is_one_problem(tmp_path):
    """A misspelled or malformed key isn't reported again as missing, nor by the rules that would need it."""
    text = "model: {model_name_or_pth: org/m}\ndata: {pth: x}\ntraining: {output_dir: 3}\n"
    assert [problem.key for problem in problems(write(tmp_path, text)).problems] == [
        "model.model_name_or_pth",
        "data.pth",
        "training.output_dir",
    ]


def test_what_is_done_anyway_may_be_said(tmp_path):
    done = ["prediction_loss_only=true", "ignore_data_skip=true", "disable_tqdm=true", "dataloader_in_order=true"]
    done += ["bf16_full_eval=false", "include_for_metrics=[]", "accelerator_config={use_configured_state: false}"]
    assert load_recipe(write(tmp_path, GOOD), done).training["ignore_data_skip"]


def test_noise_goes_with_a_document_to_a_row(tmp_path):
    for name, strategy in STRATEGIES.items():
        overrides = ["neftune_noise_alpha=5", f"strategy={name}"]
        if strategy.layout == "flat":
            assert "neftune_noise_alpha" in str(problems(write(tmp_path, GOOD), overrides))
        else:
            assert load_recipe(write(tmp_path, GOOD), overrides).training["neftune_noise_alpha"] == 5


def test_wrapped_cuts_examples_so_they_fit(tmp_path):
    assert load_recipe(write(tmp_path, GOOD), ["max_tokens=1024", "strategy=wrapped"]).batching.max_tokens == 1024


def test_a_recipe_has_the_limits_of_the_plan(tmp_path):
    for key, limit, more in (
        ("data.max_length", LONGEST, [f"max_tokens={LONGEST + 1}"]),
        ("training.num_train_epochs", MOST_EPOCHS, []),
    ):
        load_recipe(write(tmp_path, GOOD), [*more, f"{key}={limit}"])
        (problem,) = problems(write(tmp_path, GOOD), [*more, f"{key}={limit + 1}"]).problems
        assert problem.key == key and f"must be at most {limit:,}" in problem.what


def test_remote_code_with_a_pinned_revision_is_allowed(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD), ["trust_remote_code=true", f"revision={'0a' * 20}"])
    assert recipe.model.trust_remote_code


@pytest.mark.parametrize("key", ["hub_token", "hub_tokn"])
def test_secrets_are_refused_and_not_shown(tmp_path, key):
    in_file = GOOD.replace("{output_dir: results/run}", f"{{output_dir: x, {key}: hf_secret}}")
    messages = [
        str(problems(write(tmp_path, in_file))),
        str(problems(write(tmp_path, GOOD), [f"training.{key}=hf_secret"])),
        str(problems(write(tmp_path, GOOD), [f"{key}=hf_secret"])),
    ]
    assert all(key in message and "hf_secret" not in message for message in messages)


def test_unreadable_files(tmp_path):
    assert "no such recipe" in str(problems(tmp_path / "absent.yaml"))
    write(tmp_path, GOOD).rename(tmp_path / "my_run.yaml")
    for name, meant in {"my_run.yam": str(tmp_path / "my_run.yaml"), "sft_lore": "sft_lora"}.items():
        assert f"did you mean {meant}?" in str(problems(tmp_path / name))
    assert "give a path" in str(problems(tmp_path / "absent.yaml"))
    (tmp_path / "out").mkdir()
    assert "give the path of a UTF-8 YAML file" in str(problems(tmp_path / "out"))  # a folder that is no run's
    write(tmp_path, GOOD).rename(tmp_path / "out/recipe.yaml")
    assert f"name the recipe of this run: {tmp_path / 'out/recipe.yaml'}" in str(problems(tmp_path / "out"))
    assert "Is a directory" in str(problems(tmp_path))
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"model: \xff\xfe")
    assert "utf-8" in str(problems(binary))


# --------------------------------------------------------------------------------------------------- nonsense

_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
_keys = st.text(max_size=12) | st.sampled_from(
    ["model", "data", "batching", "objective", "lora", "training", "path", "config", "max_tokens", "output_dir"]
    + ["learning_rate", "strategy", "hub_token", "eval_size", "model_type", "target_modules"]
)
_trees = st.recursive(
    _scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_keys, inner, max_size=5), max_leaves=20
)


@settings(max_examples=150)
@given(tree=_trees, overrides=st.lists(st.text(max_size=30), max_size=2))
def test_nonsense_data_is_never_more_than_a_recipe_error(tmp_path_factory, tree, overrides):
    _never_more_than_a_recipe_error(tmp_path_factory, json.dumps(tree, ensure_ascii=False), overrides)


@settings(max_examples=150)
@given(text=st.text(alphabet=st.sampled_from(list("abmodel:{}[]&*!|>-#'\"\\%@,?~ \n\t01.e\x85\ud7ff\U0001f986"))))
def test_nonsense_text_is_never_more_than_a_recipe_error(tmp_path_factory, text):
    _never_more_than_a_recipe_error(tmp_path_factory, text, [])
    _never_more_than_a_recipe_error(tmp_path_factory, GOOD, [f"data.path={text}", f"{text}=1"])


def _never_more_than_a_recipe_error(tmp_path_factory, text: str, overrides: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "nonsense.yaml"
    path.write_text(text, encoding="utf-8")
    try:
        load_recipe(path, overrides)
    except RecipeError as error:
        assert error.problems
        str(error).encode()


# ------------------------------------------------------------------------------------------------- reflection


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


def test_all_that_is_wrong_with_a_schedule_is_listed(tmp_path):
    """Control: the same phases in their order, for a strategy that keeps updates, are read by the test above."""
    phases = "[{until: 0.4, max_length: 100}, {until: 0.1, max_length: 64}, {until: 0.9, max_length: 99999}]"
    error = problems(write(tmp_path, GOOD), [f"batching.schedule={phases}", "strategy=bfd"])
    keys = ["", ".1.until", ".1.max_length", ".2.max_length"]
    assert [problem.key for problem in error.problems] == [f"batching.schedule{key}" for key in keys]
    assert all(problem.fix and problem.where for problem in error.problems)
    phases = "[{until: 1.5, max_length: 64}, {until: 0.5}, {max_length: 5, untill: 0.6}]"
    error = problems(write(tmp_path, GOOD), [f"batching.schedule={phases}"])
    keys = [".0.until", ".1.max_length", ".2.untill", ".2.until"]
    assert [problem.key for problem in error.problems] == [f"batching.schedule{key}" for key in keys]
    assert "did you mean `until`?" in str(error)


@pytest.mark.parametrize("value", ["1e30", "9" * 40])
def test_numbers_that_nothing_can_count_are_refused(tmp_path, value):
    error = problems(write(tmp_path, GOOD), [f"data.num_rows={value}", f"batching.max_tokens={value}"])
    assert [problem.key for problem in error.problems] == ["data.num_rows", "batching.max_tokens"]
    assert "data.num_rows: must be at most 1,099,511,627,776" in str(error)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lora.rank", "lora.r"),
        ("lora.lora_rank", "lora.r"),
        ("lora_rank", "lora.r"),
        ("rank", "lora.r"),
        ("lora.alpha", "lora.lora_alpha"),
        ("lora.dropout", "lora.lora_dropout"),
        ("lora.target", "lora.target_modules"),
        ("model.name", "model.model_name_or_path"),
        ("model.path", "model.model_name_or_path"),
        ("model.load_in_4bit", "model.quantization"),
        ("data.file", "data.path"),
        ("data.seq_length", "data.max_length"),
        ("training.cutoff_len", "data.max_length"),
        ("training.grad_accum", "training.gradient_accumulation_steps"),
        ("training.optimizer", "training.optim"),
        ("training.batch_size", "batching.examples_per_step"),
        ("training.lr", "training.learning_rate"),
        ("data.max_seq_length", "data.max_length"),
    ],
)
def test_a_word_of_another_trainer_names_our_key(tmp_path, key, meant):
    assert f"fix: use `{meant}`" in str(problems(write(tmp_path, GOOD), [f"{key}=8"]))


def test_words_of_other_trainers_are_no_keys_and_name_keys():
    """A key that a library has gained since would never be looked up there, and one it has lost can't be set."""
    words = {(None, word): meant for word, (meant, _) in reader._OTHER_WORDS.items()}
    words |= {(here, word): meant for here, each in reader._OTHER_WORDS_OF.items() for word, (meant, _) in each.items()}
    for (section, word), meant in words.items():
        assert section is None or word not in reader.fields_of(section), word
        home, _, key = meant.partition(".")
        assert home in reader.SECTIONS and (not key or key in reader.fields_of(home)), meant
