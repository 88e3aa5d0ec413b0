"""Does filler reach real tokens? Padding under a mask on either side, and the unmasked tail of diffusion models."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from packtrain.modeling.audit import probe
from packtrain.modeling.audit.report import PaddingEffect
from packtrain.modeling.audit.settings import base, in_mode, using
from packtrain.modeling.audit.subject import Subject

logger = logging.getLogger(__name__)


def padding_effects(subject: Subject, implementation: str) -> Iterator[PaddingEffect]:
    """What filler does on either side of a document, and as an unmasked tail."""
    model, documents, start, pad = subject.model, subject.documents, subject.start, subject.pad
    other = int(documents[0][0])

    def tail(these: list[Tensor], start: int, pad: int, *, extra: int = 0) -> probe.Laid:
        laid = probe.padded(these, start, pad, extra=extra)
        return probe.Laid(batch={"input_ids": laid.batch["input_ids"]}, places=laid.places)

    layouts = {
        "right": probe.padded,
        "left": lambda *args, **options: probe.padded(*args, left=True, **options),
        "tail": tail,
    }
    for side, layout in layouts.items():
        try:
            with using(model, implementation), in_mode(model, train=False), torch.no_grad():
                plain, content, amount = (
                    probe.each(probe.outputs(model, laid), laid.places)
                    for laid in (
                        layout(documents, start, pad),
                        layout(documents, start, other),
                        layout(documents, start, pad, extra=5),
                    )
                )
        except Exception as error:
            logger.debug("%s, %s: %s", implementation, side, error)  # the findings say what is not supported
            continue
        by_content = max(map(probe.largest, plain, content))
        by_amount = max(map(probe.largest, plain, amount))
        yield PaddingEffect(
            implementation=implementation,
            side=side,
            by_content=by_content,
            by_amount=by_amount,
            reaches=max(by_content, by_amount) > subject.tolerance,
        )


def notes(subject: Subject) -> list[str]:
    """What filler does beside the outputs."""
    losses = router_losses(subject.model, subject.documents, subject.start, subject.pad)
    if losses is None or abs(losses[0] - losses[1]) <= 1e-5 * abs(losses[0]):
        return []
    return [f"the router's auxiliary loss counts filler: {losses[0]:.4f}, with more padding {losses[1]:.4f}"]


def router_losses(model: nn.Module, documents: list[Tensor], start: int, pad: int) -> tuple[float, float] | None:
    """The auxiliary loss of a mixture of experts on a padded batch, and with ten more columns of padding; None
    for a model that has none."""
    if getattr(base(model).config.get_text_config(), "router_aux_loss_coef", None) is None:
        return None
    found = []
    with in_mode(model, train=True), torch.no_grad():
        for extra in (0, 10):
            batch = probe.padded(documents, start, pad, extra=extra).batch
            try:
                found.append(model(**batch, labels=batch["input_ids"], output_router_logits=True).aux_loss.item())
            except (AttributeError, TypeError):
                return None
    return found[0], found[1]
