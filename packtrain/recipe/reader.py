"""Reads a recipe, applies overrides, and collects every problem before it raises."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from packtrain.errors import UNSET, PacktrainError, RecipeError
from packtrain.recipe.contradictions import SECRETS, contradictions
from packtrain.recipe.sections import (
    DEFAULTS,
    LIBRARY_SECTIONS,
    OWN_SECTIONS,
    SECTIONS,
    TRAINING_DEFAULTS,
    Recipe,
    Sources,
    fields_of,
)
from packtrain.recipe.values import check, did_you_mean
from packtrain.recipe.yaml_source import Source

_REQUIRED = {
    "data.path": "name a file, a directory, a Hub dataset or `packtrain:arithmetic`, here or by `--set data.path=...`",
    "training.output_dir": "say where the run is stored, for example `output_dir: results/my_run`",
}

_PER_UPDATE, _PER_MICRO_BATCH = "the examples of one update over all devices", "the most tokens of one micro-batch"
# What other trainers, or older releases, call it -> (our key, what to know about it).
_OTHER_WORDS = {
    "batch_size": ("batching.examples_per_step", _PER_UPDATE),
    "train_batch_size": ("batching.examples_per_step", _PER_UPDATE),
    "micro_batch_size": ("batching.max_tokens", _PER_MICRO_BATCH),
    "packing": ("batching.strategy", "for example balanced or bfd"),
    "padding_free": ("batching.strategy", "padding_free"),
    "group_by_length": ("batching.strategy", "group_by_length"),
    "max_seq_length": ("data.max_length", ""),
    "max_seq_len": ("data.max_length", ""),
    "sequence_len": ("data.max_length", ""),
    "dataset": ("data.path", ""),
    "dataset_name": ("data.path", ""),
    "base_model": ("model.model_name_or_path", ""),
    "torch_dtype": ("model.dtype", ""),
    "lr": ("training.learning_rate", ""),
    "epochs": ("training.num_train_epochs", ""),
    "num_epochs": ("training.num_train_epochs", ""),
    "warmup_ratio": ("training.warmup_steps", "below 1 it is a share of all steps"),
    "no_cuda": ("training.use_cpu", ""),
    "lora_r": ("lora.r", ""),
    "lora_target_modules": ("lora.target_modules", ""),
}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe.

    Args:
        path: a YAML file.
        overrides: `section.key=value`, or `key=value` (our own keys first, then TrainingArguments' and
            LoraConfig's). The value is YAML; `section=null` takes a section away.

    Raises:
        RecipeError: bears every problem of the file and the overrides in `.problems`.
    """
    source = Source.from_file(path)
    if not isinstance(source.tree, dict):
        if not source.problems:
            what = "is empty" if source.tree is None else "is not a mapping of sections"
            fix = f"a recipe has the sections {', '.join(SECTIONS)}"
            source.problems.append(PacktrainError(what, where=source.name, fix=fix))
        raise RecipeError(source.problems)
    for override in overrides:
        _override(source, override)

    checked = _Checked(source)
    for key, what, fix in contradictions(checked.settings()):
        checked.report(key, what, fix)
    if source.problems:
        raise RecipeError(source.problems)

    own = {section: checked.values_of(section) for section in OWN_SECTIONS}
    training = TRAINING_DEFAULTS | checked.values_of("training")
    lora = checked.values_of("lora") if "lora" in source.tree else None
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
                what, fix = "stands in several sections", "write " + " or ".join(f"{home}.{key}" for home in homes)
            source.problems.append(PacktrainError(what, where="--set", key=key, fix=fix))
            return
        path = (homes[0], *path)
    source.override(path, value, "--set")


def _homes(name: str) -> list[str]:
    """The sections a key may stand in; a key of our own hides the libraries'."""
    own = [section for section in OWN_SECTIONS if name in fields_of(section)]
    return own or [section for section in SECTIONS if name in fields_of(section)]


def _advice(section: str | None, name: str) -> tuple[str, str | None]:
    """For an unknown key: what to write instead, and the key it probably stands for."""
    here = list(fields_of(section) if section else SECTIONS)
    if name in _OTHER_WORDS:
        meant, hint = _OTHER_WORDS[name]
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
    return f"known here: {', '.join(here)}", None


class _Checked:
    """The recipe's values, each checked by itself."""

    def __init__(self, source: Source):
        self.source = source
        self.given: dict[str, Any] = {}  # "section.key" -> converted value
        self.doubtful: set[str] = set()  # keys and sections that were meant but are unreadable
        for name, body in source.tree.items():
            if name in SECTIONS:
                self._section(name, body)
            else:
                self._unknown(None, name, body)
        for key, fix in _REQUIRED.items():
            if key not in self.given and not self._in_doubt(key):
                self.report(key, "is missing", fix)

    def values_of(self, section: str) -> dict[str, Any]:
        prefix = section + "."
        return {key.removeprefix(prefix): v for key, v in self.given.items() if key.startswith(prefix)}

    def settings(self) -> dict[str, Any]:
        """Every value given, and our defaults; without those in doubt, on which nothing can be concluded."""
        return {key: value for key, value in (DEFAULTS | self.given).items() if not self._in_doubt(key)}

    def report(self, key: str, what: str, fix: str | None, value: object = UNSET) -> None:
        if value is UNSET and key not in SECRETS:
            value = self.given.get(key, UNSET)
        where = self.source.where(tuple(key.split(".")))
        self.source.problems.append(PacktrainError(what, where=where, key=key, value=value, fix=fix))

    def _in_doubt(self, key: str) -> bool:
        return key in self.doubtful or key.split(".")[0] in self.doubtful

    def _section(self, section: str, body: object) -> None:
        if body is None and section == "lora":
            fix = "write `lora: {}` for peft's defaults, or leave the section out for full fine-tuning"
            self.report("lora", "is empty", fix)
            return
        if not isinstance(body, dict | None):
            self.report(section, "must be a section with keys of its own", None, value=body)
            self.doubtful.add(section)
            return
        fields = fields_of(section)
        for name, value in (body or {}).items():
            key = f"{section}.{name}"
            if fields and name not in fields:
                self._unknown(section, name, value)
                continue
            converted, what, fix = check(fields.get(name, Any), value)
            if what is None:
                self.given[key] = converted
            else:
                self.report(key, what, fix, value=value)
                self.doubtful.add(key)

    def _unknown(self, section: str | None, name: str, value: object) -> None:
        fix, meant = _advice(section, name)
        key = f"{section}.{name}" if section else name
        shown = UNSET if isinstance(value, dict | list) or meant in SECRETS else value
        self.report(key, "is not a key" if section else "is not a section", fix, value=shown)
        if meant:
            self.doubtful.add(meant)
