"""Every key of a recipe with its type, default and meaning, read off the sections themselves.

packtrain keys batching                          # for people
packtrain keys --schema recipe.schema.json       # a JSON schema, for editors

An editor with the YAML language server checks and completes a recipe whose first line names the schema next to it:

    # yaml-language-server: $schema=recipe.schema.json

So do the recipes that come with packtrain, and those of `packtrain init`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import PydanticInvalidForJsonSchema, TypeAdapter
from pydantic.errors import PydanticSchemaGenerationError

from packtrain.objectives import OBJECTIVES
from packtrain.recipe.fields import describe
from packtrain.recipe.reader import fields_of
from packtrain.recipe.recipe import LIBRARY_SECTIONS, OWN_SECTIONS, SECTIONS, TRAINING_DEFAULTS
from packtrain.recipe.sections import TrainingKeys

SCHEMA_FILE = "recipe.schema.json"
# pydantic leaves limits behind a validator as they are written.
_LIMITS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key of a section.

    Attributes:
        owner: the objective whose key it is, or the class of the library; None for a key of packtrain's.
        default: as it is written in YAML; None where there is none to show.
    """

    section: str
    name: str
    type: str
    default: str | None
    text: str
    owner: str | None = None


def keys_of(section: str) -> Iterator[Key]:
    """Yields the keys of a section; those of the libraries with their names and types alone."""
    if section in OWN_SECTIONS:
        yield from _own(section, fields_of(section), OWN_SECTIONS[section].model_fields)
    elif section == "objective":
        for name, objective in OBJECTIVES.items():
            yield from _own(section, fields_of(section, name), objective.model_fields, owner=name)
    else:
        library = LIBRARY_SECTIONS[section].rpartition(".")[2]
        own = TrainingKeys.model_fields if section == "training" else {}
        yield from _own(section, fields_of(section), own)
        for name, kind in sorted(fields_of(section).items()):
            if name in own:
                continue
            default = _yaml(TRAINING_DEFAULTS[name]) if section == "training" and name in TRAINING_DEFAULTS else None
            yield Key(section=section, name=name, type=describe(kind), default=default, text="", owner=library)


def schema() -> dict[str, Any]:
    """Returns the JSON schema of a recipe, for editors that check and complete YAML."""
    sections: dict[str, Any] = {}
    defined: dict[str, Any] = {}  # sections within sections
    for section in SECTIONS:
        # of a key that several objectives have, what the first says
        fields, known = fields_of(section), {key.name: key for key in reversed([*keys_of(section)])}
        properties = {name: _schema(kind) | _about(known[name]) for name, kind in fields.items()}
        for each in properties.values():
            defined |= each.pop("$defs", {})
        sections[section] = {"type": "object", "properties": properties, "additionalProperties": not fields}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A recipe of packtrain",
        "type": "object",
        "properties": sections,
        "$defs": defined,
        "additionalProperties": False,
        "required": ["data", "training"],
    }


def schema_text() -> str:
    """Returns the JSON schema as it is stored in a file."""
    return json.dumps(schema(), indent=1) + "\n"


def _own(section: str, types: dict[str, Any], fields: dict[str, Any], owner: str | None = None) -> Iterator[Key]:
    for name, field in fields.items():
        default = None if field.is_required() else _yaml(field.get_default())
        text = field.description or ("What is learnt." if name == "name" else "")
        yield Key(section=section, name=name, type=describe(types[name]), default=default, text=text, owner=owner)


def _yaml(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _schema(kind: Any) -> dict[str, Any]:
    try:
        return _renamed(TypeAdapter(kind).json_schema())
    except (PydanticInvalidForJsonSchema, PydanticSchemaGenerationError):  # a type that only the library checks
        return {}


def _renamed(made: Any) -> Any:
    if isinstance(made, dict):
        return {_LIMITS.get(name, name): _renamed(value) for name, value in made.items()}
    return [_renamed(value) for value in made] if isinstance(made, list) else made


def _about(key: Key) -> dict[str, Any]:
    text = " ".join(part for part in (key.text, f"Default: {key.default}." if key.default else "") if part)
    return {"description": text} if text else {}
