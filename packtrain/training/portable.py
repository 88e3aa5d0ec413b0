"""A recipe as others may read it, in stored results and model cards: without paths of this machine and without secrets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from packtrain.recipe.recipe import Recipe
from packtrain.training.checkpoints import redacted


def shown_path(path: str | Path) -> str:
    """Write a local path for others: as given where it lies below the working directory, else the name alone."""
    path = Path(path)
    return path.name if path.is_absolute() or ".." in path.parts else path.as_posix()


def portable(recipe: Recipe, show: Callable[[str], str] = shown_path, *, given: bool = False) -> dict[str, Any]:
    """Return the recipe as plain data in which no path shows anything of this machine.

    Args:
        show: writes a local path.
        given: leave out the defaults.
    """

    def written(value: Any) -> Any:
        if isinstance(value, list):
            return [written(each) for each in value]
        return show(value) if Path(value).is_absolute() or Path(value).exists() else value

    data = redacted(recipe.to_dict(given=given))
    model, rows = data.get("model", {}), data.get("data", {})
    for section, key in (
        *((each, "path") for each in (rows, *(rows.get("mixture") or ()))),
        (rows, "eval_path"),
        (rows.get("keep") or {}, "scores"),
        (model, "model_name_or_path"),
        (model, "tokenizer_name_or_path"),
        (model, "chat_template"),
        (model, "merge_adapter"),
        (model, "continue_adapter"),
    ):
        if section.get(key) is not None:
            section[key] = written(section[key])
    data["training"] = {
        key: show(value) if isinstance(value, str) and Path(value).is_absolute() else value
        for key, value in data["training"].items()
        if key != "output_dir"
    }
    return data


def portable_text(recipe: Recipe) -> str:
    """Return the recipe as YAML for others: the keys that say something, without paths of this machine and secrets."""
    sections = {
        name: {key: value for key, value in section.items() if value is not None}
        for name, section in portable(recipe).items()
        if section
    }
    return yaml.safe_dump(sections, sort_keys=False)
