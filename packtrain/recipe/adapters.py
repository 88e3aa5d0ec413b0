"""Adapters that a run goes on from: their folder, and their settings as a recipe's section `lora:`."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from packtrain.errors import ModelError, PacktrainError

CONFIG = "adapter_config.json"
_OF_THE_FILE = ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_type", "peft_version")


def adapter_folder(name: str | Path) -> Path | None:
    """Returns the folder that holds an adapter: the one named, or `model/` in that of a run; None where there is none."""
    folder = Path(name).expanduser()
    return next((place for place in (folder, folder / "model") if (place / CONFIG).is_file()), None)


def adapter_settings(folder: Path, fields: Collection[str] = ()) -> dict[str, Any]:
    """Reads the settings of an adapter, as far as they are fields of `peft.LoraConfig` and say anything.

    Args:
        folder: see `adapter_folder`.
        fields: the names that LoraConfig has; empty for all.

    Raises:
        PacktrainError: the file can't be read, or the adapter is of another kind than LoRA.
    """
    settings = read_config(folder)
    if settings.get("peft_type") != "LORA":
        raise PacktrainError(
            f"is an adapter of the kind {settings.get('peft_type')}, not LoRA", where=str(folder / CONFIG)
        )
    return {
        name: sorted(value) if name == "target_modules" and isinstance(value, list) else value
        for name, value in sorted(settings.items())
        if name not in _OF_THE_FILE and value not in (None, {}, []) and (not fields or name in fields)
    }


def read_config(folder: Path) -> dict[str, Any]:
    """Reads `adapter_config.json`.

    Raises:
        PacktrainError: it is no JSON mapping.
    """
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PacktrainError(f"can't be read: {error}", where=str(folder / CONFIG)) from None
    if not isinstance(settings, dict):
        raise PacktrainError("is not a mapping", where=str(folder / CONFIG))
    return settings


def refuse_adapters(name: str) -> None:
    """Raises ModelError where the folder of a pretrained model holds an adapter, or is the folder of a run."""
    folder, found = Path(name), adapter_folder(name)
    if (folder / "config.json").is_file():
        return
    key = "model.model_name_or_path"
    if found is not None:
        base = read_config(found).get("base_model_name_or_path") or "its base model"
        fix = f"set it to {base}, and `model.merge_adapter` or `model.continue_adapter` to this folder"
        raise ModelError("is an adapter, not a model", key=key, value=name, fix=fix)
    if (folder / "model" / "config.json").is_file():
        raise ModelError("is the folder of a run", key=key, value=name, fix=f"set it to {folder / 'model'}")
