"""The auxiliary loss of a mixture of experts, which packtrain's losses don't have."""

from __future__ import annotations

from transformers import PreTrainedConfig

from packtrain.errors import ModelError

COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


def has_router_loss(config: PreTrainedConfig) -> bool:
    """Whether the model's own loss adds one for its routers.

    Such a loss is not a sum over tokens: it compares shares of a whole micro-batch, filler included, so it changes with
    the layout.
    """
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        weights = [getattr(part, name) for name in COEFFICIENTS if hasattr(part, name)]
        if getattr(part, "output_router_logits", False) and (any(weights) or not weights):
            return True
    return False


def refuse_router_loss(config: PreTrainedConfig) -> None:
    """Raises ModelError for a router loss: to leave it out without a word would train another model than was asked for."""
    if has_router_loss(config):
        raise ModelError(
            "asks for a router loss, which compares whole micro-batches and so depends on how they are laid out",
            key="model.config.output_router_logits",
            value=True,
            fix="set it to False, in the config or on the model (`model.config.output_router_logits = False`)",
        )
