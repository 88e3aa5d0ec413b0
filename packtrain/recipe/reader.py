"""Reads a recipe, applies overrides, and collects every problem before it raises."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, Field

from packtrain.errors import UNSET, PacktrainError, PlanError, RecipeError
from packtrain.objectives import DEFAULT, OBJECTIVES
from packtrain.packing.strategies import STRATEGIES, Strategy, resolve_strategy
from packtrain.recipe.adapters import adapter_folder, adapter_settings
from packtrain.recipe.fields import Flag, Positive, Seed, Text, Whole, check, did_you_mean, library_fields
from packtrain.recipe.recipe import (
    DEFAULTS,
    LIBRARY_SECTIONS,
    OWN_SECTIONS,
    SECTIONS,
    TRAINING_DEFAULTS,
    Recipe,
    Sources,
)
from packtrain.recipe.rules import SECRETS, contradictions
from packtrain.recipe.sections import Section, TrainingKeys
from packtrain.recipe.shipped import find_recipe
from packtrain.recipe.yaml_source import Source

_REQUIRED = {
    "data.path": "name a file, a directory, a Hub dataset or `packtrain:arithmetic`, here or by `--set data.path=...`",
    "training.output_dir": "say where the run is stored, for example `output_dir: results/my_run`",
}

_PER_UPDATE, _PER_MICRO_BATCH = "the examples of one update over all devices", "the most tokens of one micro-batch"
_SAME_EXAMPLES = "it does not change which examples an update has"
# What other trainers, or older releases, call it -> (our key, what to know about it).
_OTHER_WORDS = {
    "batch_size": ("batching.examples_per_step", _PER_UPDATE),
    "train_batch_size": ("batching.examples_per_step", _PER_UPDATE),
    "micro_batch_size": ("batching.max_tokens", _PER_MICRO_BATCH),
    "packing": ("batching.strategy", "`packtrain plan RECIPE --all` compares them"),
    "seq_length": ("data.max_length", ""),
    "seq_len": ("data.max_length", ""),
    "cutoff_len": ("data.max_length", ""),
    "model_max_length": ("data.max_length", ""),
    "max_seq_length": ("data.max_length", ""),
    "max_seq_len": ("data.max_length", ""),
    "sequence_len": ("data.max_length", ""),
    "dataset": ("data.path", ""),
    "datasets": ("data.mixture", "sources with weights; `data.path` takes a list of files"),
    "interleave_probs": ("data.mixture", "each source with its `weight`"),
    "mix_strategy": ("data.mixture", "each source with its `weight`"),
    "dataset_name": ("data.path", ""),
    "dataset_path": ("data.path", ""),
    "data_path": ("data.path", ""),
    "train_file": ("data.path", ""),
    "base_model": ("model.model_name_or_path", ""),
    "model_name": ("model.model_name_or_path", ""),
    "model_path": ("model.model_name_or_path", ""),
    "torch_dtype": ("model.dtype", ""),
    "load_in_4bit": ("model.quantization", "{load_in_4bit: true}"),
    "load_in_8bit": ("model.quantization", "{load_in_8bit: true}"),
    "lr": ("training.learning_rate", ""),
    "grad_accum": ("training.gradient_accumulation_steps", _SAME_EXAMPLES),
    "gradient_accumulation": ("training.gradient_accumulation_steps", _SAME_EXAMPLES),
    "optimizer": ("training.optim", ""),
    "epochs": ("training.num_train_epochs", ""),
    "num_epochs": ("training.num_train_epochs", ""),
    "warmup_ratio": ("training.warmup_steps", "below 1 it is a share of all steps"),
    "no_cuda": ("training.use_cpu", ""),
    "peft": ("lora", "a section"),
    "peft_config": ("lora", "a section"),
    "lora_r": ("lora.r", ""),
    "lora_rank": ("lora.r", ""),
    "lora_target": ("lora.target_modules", ""),
    "lora_target_modules": ("lora.target_modules", ""),
}

# What other trainers call the keys of one section, under names that mean something else elsewhere.
_OTHER_WORDS_OF: dict[str, dict[str, tuple[str, str]]] = {
    "model": {
        "name": ("model.model_name_or_path", ""),
        "path": ("model.model_name_or_path", ""),
        "model": ("model.model_name_or_path", ""),
    },
    "data": {
        "file": ("data.path", ""),
        "files": ("data.path", "a file, a directory, or a list of them"),
        "train": ("data.path", ""),
    },
    "training": {"warmup": ("training.warmup_steps", "below 1 it is a share of all steps")},
    "lora": {
        "rank": ("lora.r", ""),
        "alpha": ("lora.lora_alpha", ""),
        "dropout": ("lora.lora_dropout", ""),
        "target": ("lora.target_modules", ""),
        "modules": ("lora.target_modules", ""),
    },
}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe.

    Args:
        path: a YAML file, or the name of a recipe that comes with packtrain (`quickstart`).
        overrides: `section.key=value`, or `key=value` (our own keys first, then TrainingArguments' and
            LoraConfig's). The value is YAML; `section=null` takes a section away.

    Raises:
        RecipeError: with every problem of the file and the overrides in `.problems`.
        PacktrainError: no path, or a text where a list of overrides belongs.
    """
    if not isinstance(path, str | Path):
        fix = "write its sections to a YAML file, and give the path of that"
        raise PacktrainError("must be a path or a name", key="path", value=type(path).__name__, fix=fix)
    if isinstance(overrides, str):
        raise PacktrainError("must be a list", key="overrides", value=overrides, fix=f"give [{overrides!r}]")
    source = Source.from_file(find_recipe(path))
    if not isinstance(source.tree, dict):
        if not source.problems:
            what = "is empty" if source.tree is None else "is not a mapping of sections"
            fix = f"a recipe has the sections {', '.join(SECTIONS)}"
            source.problems.append(PacktrainError(what, where=source.name, fix=fix))
        raise RecipeError(source.problems)
    for override in overrides:
        _override(source, override)

    checked = _Checked(source)
    adapter = checked.adapter()
    settings = checked.settings() | ({"lora": True} if adapter else {})
    for key, what, fix in contradictions(settings, checked.strategy(settings)):
        checked.report(key, what, fix)
    if source.problems:
        raise RecipeError(source.problems)

    own = {section: checked.values_of(section) for section in (*OWN_SECTIONS, "objective")}
    own["objective"] = {"name": DEFAULT} | own["objective"]
    training = TRAINING_DEFAULTS | checked.values_of("training")
    lora = checked.values_of("lora") if "lora" in source.tree else adapter
    recipe = Recipe.model_validate({**own, "training": training, "lora": lora})
    recipe._sources = Sources(path=str(path), overrides=tuple(overrides))
    return recipe


def _override(source: Source, override: str) -> None:
    """Applies one `key=value`; what is wrong with it joins the recipe's problems."""
    key, equals, value = override.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        fix = "write section.key=value, for example batching.max_tokens=8192"
        source.problems.append(PacktrainError("is not an override", where="--set", value=override, fix=fix))
        return
    if path[0] not in SECTIONS:
        homes = _homes(path[0])
        if len(homes) != 1:
            what, fix = "is not a key of any section", _advice(None, path[0])[0]
            if homes:
                what, fix = "is a key of several sections", "write " + " or ".join(f"{home}.{key}" for home in homes)
            source.problems.append(PacktrainError(what, where="--set", key=key, fix=fix))
            return
        path = (homes[0], *path)
    source.override(path, value, "--set")


# Where a recipe may say more, or must say more, than the library's annotation.
_REFINED: dict[str, dict[str, Any]] = {
    "training": {
        "output_dir": Annotated[Text, AfterValidator(os.path.expanduser)],
        "seed": Seed,
        "data_seed": Seed | None,
        "dataloader_num_workers": Annotated[Whole, Field(ge=0), "a whole number from 0 on"],
        "gradient_accumulation_steps": Positive | Literal["auto"],
        "fsdp": Flag | Text | list[Text],  # annotated `str | None`, documented as `fsdp=True`
    },
    "lora": {},
}


@functools.cache
def fields_of(section: str, objective: str | None = None) -> dict[str, Any]:
    """Returns key -> type of a section. Empty where the library is not installed.

    Args:
        objective: whose keys the section `objective:` has; None for those of all of them.
    """
    if section in OWN_SECTIONS:
        return get_type_hints(OWN_SECTIONS[section], include_extras=True)
    if section == "objective":
        owners = [OBJECTIVES[objective]] if objective else reversed(OBJECTIVES.values())
        keys = {key: hint for owner in owners for key, hint in _keys_of(owner).items()}
        return {"name": Literal[tuple(OBJECTIVES)]} | {key: hint for key, hint in keys.items() if key != "name"}
    fields = library_fields(LIBRARY_SECTIONS[section])
    own = _keys_of(TrainingKeys) if section == "training" else {}
    return fields | _REFINED[section] | own if fields else {}


def _keys_of(section: type[Section]) -> dict[str, Any]:
    hints = get_type_hints(section, include_extras=True)
    return {key: hints[key] for key in section.model_fields}


def _section_within(kind: Any, shape: type = dict) -> tuple[type[Section], type] | None:
    """Returns the class of a value that is a section, with dict, or of the entries of a list of sections, with list."""
    if isinstance(kind, type) and issubclass(kind, Section):
        return kind, shape
    shape = list if get_origin(kind) is list else shape
    return next(filter(None, (_section_within(part, shape) for part in get_args(kind))), None)


def _homes(name: str) -> list[str]:
    """Returns the sections a key may stand in; a key of our own hides the libraries'."""
    own = [section for section in (*OWN_SECTIONS, "objective") if name in fields_of(section)]
    return own or [section for section in SECTIONS if name in fields_of(section)]


def _advice(section: str | None, name: str) -> tuple[str, str | None]:
    """Returns what to write instead of an unknown key, and the key it probably stands for."""
    here = list(fields_of(section) if section else SECTIONS)
    if name in STRATEGIES:
        return f"use `batching.strategy: {name}`", "batching.strategy"
    words = _OTHER_WORDS | _OTHER_WORDS_OF.get(section or "lora", {})
    if name in words:
        meant, hint = words[name]
        return f"use `{meant}`" + (f" ({hint})" if hint else ""), meant
    if homes := _homes(name):
        return f"it belongs under `{homes[0]}:`", f"{homes[0]}.{name}"
    if near := did_you_mean(name, here):
        return f"did you mean `{near}`?", f"{section}.{near}" if section else near
    if near := did_you_mean(name, [key for other in SECTIONS for key in fields_of(other)]):
        meant = f"{_homes(near)[0]}.{near}"
        return f"did you mean `{meant}`?", meant
    if section in LIBRARY_SECTIONS:
        return f"`{section}:` takes the fields of {LIBRARY_SECTIONS[section].rpartition('.')[2]}", None
    return f"its keys are {', '.join(here)}" if section else f"the sections are {', '.join(here)}", None


class _Checked:
    """Checks a recipe's values one by one, and collects what is wrong with them in the source's problems."""

    def __init__(self, source: Source):
        self.source = source
        self.given: dict[str, Any] = {}  # "section.key" -> converted value
        self.doubtful: set[str] = set()  # keys and sections that were meant but cannot be read
        self.objective = self._objective(source.tree.get("objective"))
        for name, body in source.tree.items():
            if name in SECTIONS:
                self._section(name, body)
            else:
                self._unknown(None, name, body)
        for key, fix in _REQUIRED.items():
            if key == "data.path" and (self.given.get("data.mixture") or self._in_doubt("data.mixture")):
                continue
            if self.given.get(key) is None and not self._in_doubt(key):
                self.report(key, "is missing", fix)

    def _objective(self, body: object) -> str | None:
        """Returns the objective whose keys the section has; None where it can't be read, and every objective's will do."""
        name = body.get("name", DEFAULT) if isinstance(body, dict) else DEFAULT
        return name if isinstance(name, str) and name in OBJECTIVES else None

    def strategy(self, settings: dict[str, Any]) -> Strategy | None:
        """Returns the recipe's strategy; reports one that isn't there."""
        try:
            return resolve_strategy(settings["batching.strategy"])
        except PlanError as error:
            self.report("batching.strategy", error.what, error.fix)
        except KeyError:
            pass
        return None

    def adapter(self) -> dict[str, Any] | None:
        """Returns the settings of the adapter that is trained further, as a section `lora:`; None where there is none."""
        found = None
        for key in ("model.merge_adapter", "model.continue_adapter"):
            name = self.given.get(key)
            if name is None:
                continue
            folder = adapter_folder(name)
            if folder is None:
                fix = "name the output_dir of a run with LoRA, or a folder with adapter_config.json"
                self.report(key, "holds no adapter", fix)
                continue
            try:
                found = adapter_settings(folder, fields_of("lora"))
            except PacktrainError as error:
                self.source.problems.append(error)
        return found if self.given.get("model.continue_adapter") else None

    def values_of(self, section: str) -> dict[str, Any]:
        """Returns key -> converted value of a section, as far as given."""
        prefix = section + "."
        return {key.removeprefix(prefix): v for key, v in self.given.items() if key.startswith(prefix)}

    def settings(self) -> dict[str, Any]:
        """Returns every value given, our defaults, and as `lora` whether there is such a section.

        None is in doubt: nothing can be concluded from those.
        """
        known = DEFAULTS | self.given | {"lora": "lora" in self.source.tree}
        return {key: value for key, value in known.items() if not self._in_doubt(key)}

    def report(self, key: str, what: str, fix: str | None, value: object = UNSET) -> None:
        """Adds a problem, with the place of its key and the value given."""
        if value is UNSET and key not in SECRETS:
            value = self.given.get(key, UNSET)
        where = self.source.where(tuple(key.split(".")))
        self.source.problems.append(PacktrainError(what, where=where, key=key, value=value, fix=fix))

    def _in_doubt(self, key: str) -> bool:
        return key in self.doubtful or key.split(".")[0] in self.doubtful

    def _section(self, section: str, body: object) -> None:
        """Checks one section."""
        if body is None and section == "lora":
            fix = "write `lora: {}` for peft's defaults, or leave the section out for full fine-tuning"
            self.report("lora", "is empty", fix)
            return
        if not isinstance(body, dict | None):
            self.report(section, "must be a mapping of keys to values", None, value=body)
            self.doubtful.add(section)
            return
        fields = fields_of(section, self.objective if section == "objective" else None)
        for name, value in (body or {}).items():
            key = f"{section}.{name}"
            if section == "objective" and name not in fields and name in fields_of(section):
                self.report(key, *self._of_another(name), value=value)
                continue
            if fields and name not in fields:
                self._unknown(section, name, value)
                continue
            within = _section_within(fields.get(name, Any))
            if within is not None and isinstance(value, within[1]) and value != []:
                self._within(key, within[0], value)
                continue
            converted, what, fix = check(fields.get(name, Any), value)
            if what is None:
                self.given[key] = converted
            else:
                self.report(key, what, fix, value=value)
                self.doubtful.add(key)

    def _within(self, key: str, section: type[Section], value: Any) -> None:
        """Checks a value that is a section, or a list of sections."""
        before = len(self.source.problems)
        if isinstance(value, list):
            found: Any = [self._entry(f"{key}.{number}", section, body) for number, body in enumerate(value)]
        else:
            found = self._entry(key, section, value)
        if len(self.source.problems) > before:
            self.doubtful.add(key)
        else:
            self.given[key] = found

    def _entry(self, key: str, section: type[Section], body: object) -> dict[str, Any]:
        """Checks the keys of a section within a section; returns those given, converted."""
        if not isinstance(body, dict):
            self.report(key, "must be a mapping of keys to values", None, value=body)
            return {}
        fields, found = get_type_hints(section, include_extras=True), {}
        for name, value in body.items():
            if name not in fields:
                near = did_you_mean(name, fields)
                fix = f"did you mean `{near}`?" if near else f"its keys are {', '.join(fields)}"
                self.report(f"{key}.{name}", "is not a key", fix, value=value)
                continue
            found[name], what, fix = check(fields[name], value)
            if what is not None:
                self.report(f"{key}.{name}", what, fix, value=value)
        for name, field in section.model_fields.items():
            if field.is_required() and name not in body:
                self.report(f"{key}.{name}", "is missing", f"`{key}` needs it")
        return found

    def _of_another(self, key: str) -> tuple[str, str]:
        """Returns what is wrong with a key of another objective, and the fix."""
        owners = [name for name, owner in OBJECTIVES.items() if key in owner.model_fields]
        what = f"is a key of `{'` and `'.join(owners)}`, not of `{self.objective}`"
        return what, f"leave it out, or choose `objective.name: {owners[0]}`"

    def _unknown(self, section: str | None, name: str, value: object) -> None:
        """Reports a key, or a section, that isn't known."""
        fix, meant = _advice(section, name)
        key = f"{section}.{name}" if section else name
        shown = UNSET if isinstance(value, dict | list) or meant in SECRETS else value
        self.report(key, "is not a key" if section else "is not a section", fix, value=shown)
        if meant:
            self.doubtful.add(meant)
