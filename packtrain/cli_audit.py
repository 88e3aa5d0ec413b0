"""What `packtrain audit` prints: does this model keep the documents of a batch apart, and with which attention?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from packtrain.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from packtrain.recipe import Recipe


def show_audit(
    target: str,
    console: Console,
    *,
    implementations: list[str] | None,
    layouts: list[str] | None,
    device: str,
) -> bool:
    """Audit a recipe, a Hub name, a local directory or a bare architecture name; False where the recipe's own
    combination of model, layout and attention does not keep documents apart.

    Raises:
        RecipeError, ModelError: the target can't be read or built.
    """
    import torch

    from packtrain.modeling.audit import audit_model, quick_check
    from packtrain.modeling.audit_probe import LAYOUTS

    if unknown := sorted(set(layouts or ()) - set(LAYOUTS)):
        raise ModelError("is not a layout", key="--layout", value=unknown[0], fix=f"some of {', '.join(LAYOUTS)}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = _recipe(target)
    model = (_of_recipe(recipe, device) if recipe else _of_name(target)).to(device)
    report = audit_model(model, implementations=implementations, layouts=layouts or tuple(LAYOUTS))
    for line in report.lines():
        console.print(line, highlight=False, soft_wrap=True)
    if recipe is None:
        return True
    own = quick_check(model, _layout(recipe))
    line = f"the recipe's own, {own.implementation} and {own.layout}: {own.what()}"
    console.print(line, style="bold", soft_wrap=True)
    return own.safe


def _recipe(target: str) -> Recipe | None:
    if Path(target).suffix not in (".yaml", ".yml"):
        return None
    from packtrain.recipe import load_recipe

    return load_recipe(target)


def _layout(recipe: Recipe) -> str:
    from packtrain.packing.strategies import resolve_strategy

    return resolve_strategy(recipe.batching.strategy).layout


def _of_recipe(recipe: Recipe, device: torch.device | str) -> PreTrainedModel:
    """The recipe's model with the attention it would train with; from scratch it needs no data for this."""
    import torch

    from packtrain.modeling.attention import choose_implementation
    from packtrain.modeling.loading import load_config, load_model

    model = recipe.model
    pretrained = model.model_dump(include={"model_name_or_path", "revision", "trust_remote_code"})
    dtype = torch.float32 if model.dtype == "auto" else getattr(torch, model.dtype)
    chosen = choose_implementation(model.attn_implementation, layout=_layout(recipe), device=device, dtype=dtype)
    config = load_config(**pretrained, config=model.config)
    return load_model(config, **pretrained, dtype=model.dtype, attn_implementation=chosen)


def _of_name(target: str) -> PreTrainedModel:
    """A model by Hub name or directory, or a tiny random one of a bare architecture name (`llama`, `mamba2`)."""
    from transformers import CONFIG_MAPPING

    from packtrain.modeling.audit import tiny_model
    from packtrain.modeling.loading import load_config, load_model

    if target in CONFIG_MAPPING and not Path(target).exists():
        return tiny_model(target)
    return load_model(load_config(model_name_or_path=target), model_name_or_path=target, attn_implementation=None)
