"""A checked recipe: one frozen section for every room, and where it was read from."""

from __future__ import annotations

import functools
import hashlib
import json
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, PrivateAttr

from packtrain.errors import PacktrainError
from packtrain.objectives import DEFAULT, OBJECTIVES, Objective
from packtrain.recipe import fields
from packtrain.recipe.sections import BatchingSection, DataSection, ModelSection, Schedule, Section

if TYPE_CHECKING:
    AnyObjective = Objective
else:  # of all there are
    AnyObjective = Annotated[functools.reduce(operator.or_, OBJECTIVES.values()), Field(discriminator="name")]


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where a recipe came from, for messages and for the record."""

    path: str
    overrides: tuple[str, ...] = ()


class Recipe(Section):
    """A checked recipe. `load_recipe` makes one; `Recipe.model_validate(recipe.to_dict())` gives it back."""

    model: ModelSection
    data: DataSection
    batching: BatchingSection = BatchingSection()
    objective: AnyObjective = OBJECTIVES[DEFAULT].model_validate({})
    lora: fields.Mapping | None = None  # any peft.LoraConfig field; absent for full fine-tuning
    training: fields.Mapping  # any transformers.TrainingArguments field
    _sources: Sources | None = PrivateAttr(default=None)

    @property
    def sources(self) -> Sources | None:
        """The path and overrides it was read from; None for a recipe made in Python."""
        return self._sources

    @property
    def schedule(self) -> Schedule:
        """The seed and the length of the run, as a plan needs them."""
        return Schedule.of(self.training)

    def to_dict(self, *, given: bool = False) -> dict[str, Any]:
        """Returns plain data for JSON or YAML, with every default written out, or only what differs from them (`given`)."""
        data = self.model_dump(mode="json", exclude_defaults=given)
        if "objective" in data:
            data["objective"] = {"name": self.objective.name} | data["objective"]  # a default of its class
        return data

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the canonical JSON of `to_dict()`: equal recipes, equal hash."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def check_recipe(recipe: object) -> None:
    """Raises PacktrainError for what is no checked recipe, such as its name or a dictionary."""
    if not isinstance(recipe, Recipe):
        fix = "give packtrain.load_recipe(path): of a YAML file, or of the name of a recipe that comes with packtrain"
        value = recipe if isinstance(recipe, str) else type(recipe).__name__
        raise PacktrainError("must be a checked recipe", key="recipe", value=value, fix=fix)


OWN_SECTIONS: dict[str, type[Section]] = {"model": ModelSection, "data": DataSection, "batching": BatchingSection}
LIBRARY_SECTIONS = {
    "training": "transformers.training_args.TrainingArguments",
    "lora": "peft.tuners.lora.config.LoraConfig",
}
SECTIONS = (*OWN_SECTIONS, "objective", *LIBRARY_SECTIONS)
TRAINING_DEFAULTS = {"seed": 42, "gradient_accumulation_steps": "auto"}
# "section.key" -> default, of our own keys. A key that two objectives share has one default.
DEFAULTS: dict[str, Any] = {
    f"{section}.{name}": field.get_default()
    for section, owners in {
        **{name: [own] for name, own in OWN_SECTIONS.items()},
        "objective": OBJECTIVES.values(),
    }.items()
    for owner in reversed(list(owners))
    for name, field in owner.model_fields.items()
    if not field.is_required()
}
