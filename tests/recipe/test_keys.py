"""`packtrain keys` and the schema say what the reader takes: both read the sections themselves."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from packtrain.cli import main
from packtrain.errors import PacktrainError
from packtrain.objectives import OBJECTIVES
from packtrain.recipe.keys import SCHEMA_FILE, keys_of, schema, schema_text
from packtrain.recipe.reader import fields_of, load_recipe
from packtrain.recipe.recipe import DEFAULTS, OWN_SECTIONS, SECTIONS
from packtrain.recipe.sections import KeepSection, MixtureSource, PhaseSection
from packtrain.recipe.yaml_source import Source

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
OWN = (*OWN_SECTIONS, "objective")


@pytest.mark.parametrize("section", OWN)
def test_every_key_of_ours_has_a_meaning_and_its_default(section):
    keys = list(keys_of(section))
    assert {key.name for key in keys} == set(fields_of(section))
    for key in keys:
        assert key.text.endswith("."), key
        full = f"{section}.{key.name}"
        if full in DEFAULTS and key.name != "name":
            assert yaml.safe_load(key.default) == DEFAULTS[full], key


def test_objectives_say_whose_key_it_is():
    owners = {key.owner: set() for key in keys_of("objective")}
    for key in keys_of("objective"):
        owners[key.owner].add(key.name)
    assert owners == {name: set(objective.model_fields) for name, objective in OBJECTIVES.items()}


def test_libraries_keys_are_listed_by_name():
    assert {"learning_rate", "output_dir", "bf16"} <= {key.name for key in keys_of("training")}
    assert {"r", "lora_alpha", "target_modules"} <= {key.name for key in keys_of("lora")}


def test_the_schema_has_every_key_and_no_other():
    made = json.loads(json.dumps(schema()))
    assert set(made["properties"]) == set(SECTIONS)
    for section in SECTIONS:
        part = made["properties"][section]
        assert set(part["properties"]) == set(fields_of(section)) and part["additionalProperties"] is False
    assert made["properties"]["batching"]["properties"]["max_tokens"]["exclusiveMinimum"] == 0
    assert made["properties"]["objective"]["properties"]["name"]["description"] == "What is learnt. Default: causal_lm."


def test_the_stored_schema_is_the_one_that_is_made():
    """Renew it by `packtrain keys --schema recipes/recipe.schema.json`."""
    pinned = dict(line.split("==") for line in (ROOT / "launch/constraints.txt").read_text().split() if "==" in line)
    if other := [name for name in ("transformers", "peft", "pydantic") if version(name) != pinned[name]]:
        pytest.skip(f"other releases than in launch/constraints.txt, whose fields are stored: {', '.join(other)}")
    assert (ROOT / "recipes" / SCHEMA_FILE).read_text(encoding="utf-8") == schema_text()


def named_schema(recipe: Path) -> Path:
    """Returns the file by which editors check a recipe."""
    first, _, _ = recipe.read_text(encoding="utf-8").partition("\n")
    assert first.startswith("# yaml-language-server: $schema="), first
    return recipe.parent / first.partition("=")[2]


def rejected(recipe: Path) -> list[str]:
    """Returns what the schema that a recipe names has against it."""
    made = json.loads(named_schema(recipe).read_text(encoding="utf-8"))
    validator = pytest.importorskip("jsonschema").Draft202012Validator(made)
    validator.check_schema(made)
    return [error.message for error in validator.iter_errors(Source.from_file(recipe).tree)]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_name_the_schema_and_follow_it(recipe):
    assert named_schema(recipe) == ROOT / "recipes" / SCHEMA_FILE
    assert rejected(recipe) == []


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        ("max_tokens: ", "max_token: ", "'max_token' was unexpected"),
        ("num_train_epochs: ", "num_epochs: ", "'num_epochs' was unexpected"),
        ("lora:", "lorra:", "'lorra' was unexpected"),
        ("max_tokens: 16384", "max_tokens: 0", "0 is less than or equal to the minimum of 0"),
        ("overflow: error", "overflow: cut", "'cut' is not one of"),
    ],
)
def test_init_writes_a_recipe_with_its_schema(good, bad, message, tmp_path, monkeypatch):
    """From an empty folder; control: a misspelled key and a wrong value are rejected."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["init", "mine"])
    recipe = tmp_path / "mine.yaml"
    assert not ended.value.code and named_schema(recipe) == tmp_path / SCHEMA_FILE
    assert rejected(recipe) == []
    text = recipe.read_text(encoding="utf-8")
    assert good in text
    recipe.write_text(text.replace(good, bad), encoding="utf-8")
    assert any(message in problem for problem in rejected(recipe))


def test_a_key_that_is_listed_is_read(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {config: {model_type: llama}, tokenizer_vocab_size: 300}\ndata: {path: packtrain:trend}\n"
    )
    for key in keys_of("batching"):
        if key.default != "null":
            load_recipe(recipe, [f"training.output_dir={tmp_path}", f"batching.{key.name}={key.default}"])


def test_an_unknown_section_is_named(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["keys", "batchin"])
    assert ended.value.code == PacktrainError.exit_code and "did you mean batching?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["keys"])
    assert "examples_per_step" in capsys.readouterr().out


def test_the_schema_knows_the_keys_of_sections_within_sections():
    made = schema()
    needed = {MixtureSource: ["path", "weight"], KeepSection: ["by", "share"], PhaseSection: ["until", "max_length"]}
    assert set(made["$defs"]) == {section.__name__ for section in needed}
    for section, required in needed.items():
        entry = made["$defs"][section.__name__]
        assert set(entry["properties"]) == set(section.model_fields) and entry["required"] == required
    references = set(re.findall(r'"\$ref": "(.*?)"', json.dumps(made)))
    assert references == {f"#/$defs/{section.__name__}" for section in needed}
