"""The auxiliary loss of a mixture of experts, which packtrain's losses don't have."""

from __future__ import annotations

from transformers import PreTrainedConfig

from packtrain.errors import ModelError

COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


def refuse_router_loss(config: PreTrainedConfig) -> None:
    """Raises ModelError for a model whose own loss adds one for its routers.

    Such a loss is not a sum over tokens: it compares shares of a whole micro-batch, filler included, so it would change
    with the layout. Leaving it out without a word would train another model than the config asks for.
    """
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        weights = [getattr(part, name) for name in COEFFICIENTS if hasattr(part, name)]
        if getattr(part, "output_router_logits", False) and (any(weights) or not weights):
            raise ModelError(
                "asks for a router loss, which compares whole micro-batches and so depends on how they are laid out",
                key="model.config.output_router_logits",
                value=True,
                fix="set it to False, in the config or on the model (`model.config.output_router_logits = False`)",
            )
