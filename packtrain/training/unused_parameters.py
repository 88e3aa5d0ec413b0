"""Does every micro-batch use every trained parameter? Then DDP needs not look for those without a gradient.

transformers lets it look, in the graph of every update, where the recipe doesn't set `ddp_find_unused_parameters`; torch
warns on every rank where nothing is found. A mixture of experts that are modules of their own leaves most of them out for a
single token, and so does a pooler that no loss sees: there it goes on looking.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from packtrain.modeling.audit import probe
from packtrain.modeling.audit.settings import in_mode, quietly, reference_implementation, using
from packtrain.modeling.isolation import cannot_ask

logger = logging.getLogger(__name__)


def uses_every_parameter(model: nn.Module) -> bool:
    """Returns whether the logits of a single token depend on all trained parameters; False where that can't be asked."""
    if cannot_ask(model) is not None:
        return False
    (token,) = probe.sample_documents(model, lengths=(1,))
    try:
        with quietly(), using(model, reference_implementation(model)), in_mode(model, train=False), torch.enable_grad():
            reached = {id(leaf) for leaf in reached_from(model(input_ids=token[None]).logits)}
    except Exception as error:  # whatever a model raises; who trains it next will say it
        logger.debug("%s: %s", type(model).__name__, error)
        return False
    return all(id(parameter) in reached for parameter in model.parameters() if parameter.requires_grad)


def reached_from(output: Tensor) -> Iterator[Tensor]:
    """Yields the leaves that get a gradient from a tensor: what DDP finds in every update."""
    waiting, seen = [output.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            yield leaf
        waiting += [following for following, _ in node.next_functions]
