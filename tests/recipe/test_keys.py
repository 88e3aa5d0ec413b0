"""`packtrain keys` and the schema say what the reader takes: both read the sections themselves."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from packtrain.errors import PacktrainError
from packtrain.objectives import OBJECTIVES
from packtrain.recipe.keys import keys_of, schema
from packtrain.recipe.reader import fields_of, load_recipe
from packtrain.recipe.recipe import DEFAULTS, OWN_SECTIONS, SECTIONS
from packtrain.recipe.sections import MixtureSource

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


def test_a_key_that_is_listed_is_read(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {config: {model_type: llama}, tokenizer_vocab_size: 300}\ndata: {path: packtrain:trend}\n"
    )
    for key in keys_of("batching"):
        if key.default != "null":
            load_recipe(recipe, [f"training.output_dir={tmp_path}", f"batching.{key.name}={key.default}"])


def test_an_unknown_section_is_named(capsys):
    from packtrain.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["keys", "batchin"])
    assert ended.value.code == PacktrainError.exit_code and "did you mean batching?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["keys"])
    assert "examples_per_step" in capsys.readouterr().out


def test_the_schema_knows_the_keys_of_a_source():
    made = schema()
    (entry,) = made["$defs"].values()
    assert set(entry["properties"]) == set(MixtureSource.model_fields) and entry["required"] == ["path", "weight"]
    (reference,) = {text for text in re.findall(r'"\$ref": "(.*?)"', json.dumps(made))}
    assert reference.removeprefix("#/$defs/") in made["$defs"]
