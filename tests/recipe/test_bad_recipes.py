"""Everything wrong in a recipe is found at once and named; nonsense is never more than that."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packtrain.errors import RecipeError
from packtrain.packing.lengths import LONGEST, MOST_EPOCHS
from packtrain.packing.strategies import STRATEGIES
from packtrain.recipe import reader
from packtrain.recipe.reader import load_recipe
from tests.recipe.bad_recipes import BAD, GOOD, problems, write


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
    assert "Is a directory" in str(problems(tmp_path)) and "give the path of" in str(problems(tmp_path))
    (tmp_path / "recipe.yaml").write_text(GOOD)  # as `packtrain evaluate out/run` names it
    assert f"the folder of a run: give {tmp_path / 'recipe.yaml'}" in str(problems(tmp_path))
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
