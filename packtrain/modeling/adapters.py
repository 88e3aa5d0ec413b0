"""Going on from an adapter that was trained before: merged into its base, or trained further."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from packtrain.errors import ModelError
from packtrain.modeling.hub import explained
from packtrain.modeling.stored_weights import base_weights
from packtrain.modeling.trained_on import read_trained_on
from packtrain.recipe.adapters import CONFIG, adapter_folder, read_config
from packtrain.recipe.sections import ModelSection

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)


def merge_adapter(model: PreTrainedModel, section: ModelSection) -> PreTrainedModel:
    """Merges the adapter of `model.merge_adapter` into the model, if the recipe names one.

    Raises:
        ModelError: the adapter doesn't fit the model, or ZeRO-3 has sharded the weights already.
    """
    if section.merge_adapter is None:
        return model
    from peft import PeftModel

    folder = _folder(section, "merge_adapter")
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    with explained("model.merge_adapter", section.merge_adapter):
        merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    for name, weight in merged.named_parameters():  # peft has frozen the base
        weight.requires_grad_(name in trained)
    merged.name_or_path = ""  # no longer the model of that name: a new adapter must not say that it fits it
    return merged


def continue_adapter(model: PeftModel, section: ModelSection) -> None:
    """Gives a new adapter the weights of `model.continue_adapter`, if the recipe names one.

    Raises:
        ModelError: the adapter lacks weights or has others, or ZeRO-3 has sharded the weights already.
    """
    if section.continue_adapter is None:
        return
    from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    folder, key = _folder(section, "continue_adapter"), "model.continue_adapter"
    with explained(key, section.continue_adapter):
        weights = load_peft_weights(str(folder), device="cpu")
    own = get_peft_model_state_dict(model)
    different: list[Any] = sorted(own.keys() ^ weights.keys())
    different += [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
    if different:
        what = f"does not fit this model: {len(different)} weights differ in name or shape, such as {different[0]}"
        raise ModelError(what, key=key, value=section.continue_adapter, fix="name the adapter's own base model")
    set_peft_model_state_dict(model, weights)


def _folder(section: ModelSection, name: str) -> Path:
    """Returns the adapter's folder; warns where it names another base than the recipe."""
    given, key = getattr(section, name), f"model.{name}"
    folder = adapter_folder(given)
    if folder is None:  # since the recipe was read
        raise ModelError("holds no adapter", key=key, value=given, fix=f"name a folder with {CONFIG}")
    if is_deepspeed_zero3_enabled():
        fix = "launch with ZeRO-2 or DDP, or run `packtrain merge` once and train its model"
        raise ModelError("does not go with ZeRO-3, which has sharded the weights", key=key, value=given, fix=fix)
    base = read_config(folder).get("base_model_name_or_path")
    if base and Path(base).absolute() != Path(str(section.model_name_or_path)).absolute():
        logger.warning("%s was trained on %s, and is used on %s", key, base, section.model_name_or_path)
    alone = section.model_copy(update={"merge_adapter": None, "continue_adapter": None})
    known = read_trained_on(folder)
    if known and known.base_weights and Path(str(section.model_name_or_path)).is_dir():
        if known.base_weights != base_weights(alone):
            logger.warning(
                "%s was trained on other weights than those of %s, and is used on them", key, section.model_name_or_path
            )
    return folder
