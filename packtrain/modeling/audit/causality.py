"""Is a model causal? Measured: does a later token change the outputs before it?

BERT and its family take a causal head without `is_decoder` and then see every answer that they are trained to predict: the
loss goes to 0 and nothing is learnt.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from packtrain.errors import ModelError
from packtrain.modeling.audit import probe
from packtrain.modeling.audit.settings import base, in_mode, quietly, reference_implementation, using
from packtrain.modeling.equality import nonzero_adapters

logger = logging.getLogger(__name__)


def sees_ahead(model: nn.Module) -> float | None:
    """Measures how far the last token of a document moves outputs before it, as a share of the largest output.

    Returns None for a causal model, and for one that cannot run a document here.
    """
    (document,) = probe.sample_documents(model, lengths=(9,))
    changed = torch.cat([document[:-1], probe.change([document], 0)[0][-1:]])
    try:
        with quietly(), using(model, reference_implementation(model)), in_mode(model, train=False):
            with nonzero_adapters(model), torch.no_grad():
                one, other = probe.alone(model, [document, changed])
    except Exception as error:  # whatever a model raises; who trains it next will say it
        logger.debug("%s: %s", type(model).__name__, error)
        return None
    moved = probe.largest(one[:-1], other[:-1]) / max(float(one.abs().max()), 1e-12)
    return moved if moved > probe.precision(next(model.parameters()).dtype) else None


def check_causal(model: nn.Module) -> None:
    """Refuses a model that sees the tokens that it is trained to predict.

    Raises:
        ModelError: a later token changes outputs before it.
    """
    moved = sees_ahead(model)
    if moved is None:
        return
    inner = base(model)
    what = (
        f"{type(inner).__name__} sees the tokens it is to predict: a later token moves outputs before it by {moved:.0%}"
    )
    by_flag = getattr(inner.config, "is_decoder", None) is False
    fix = "set it to true, or choose a causal model" if by_flag else "choose a causal model"
    raise ModelError(what, key="model.config.is_decoder" if by_flag else "model", fix=fix)
