"""The proofs on the real weights: documents are isolated, and layers without padding give the same gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from packtrain.modeling.audit.audit import audit_model
from packtrain.modeling.unpad import unpad
from results.real_model.prepare import MODEL

IMPLEMENTATIONS, LAYOUTS, MODES = ("packtrain_varlen", "sdpa", "eager"), ("flat", "masked"), ("eval", "train")


def load(model: str = "") -> PreTrainedModel:
    """Loads the model in float32, as transformers does by itself."""
    return AutoModelForCausalLM.from_pretrained(model or str(MODEL), dtype=torch.float32)


def audit() -> dict[str, Any]:
    """Audits flat batches, and such with an attention mask of ones, which leak: a control that must be found."""
    report = audit_model(load(), implementations=IMPLEMENTATIONS, layouts=LAYOUTS, modes=MODES, padding=False)
    keys = ("implementation", "layout", "mode", "verdict", "difference", "leak", "gradient_difference", "scale")
    return {"findings": [{key: getattr(finding, key) for key in keys} for finding in report.findings]}


def unpadding(texts: Sequence[str]) -> dict[str, Any]:
    """Compares loss and gradients of a padded batch before and after `unpad`, and with documents end to end, unmasked.

    Args:
        texts: the rows of the batch; every token behind the first is supervised.

    Returns:
        tokens, padding; loss, loss_unpadded, loss_leaking; differs and leaking: the largest, over all parameters, of the
        norm of the difference to the padded batch's gradient, relative to the norm of that.
    """
    tokenizer, model = AutoTokenizer.from_pretrained(str(MODEL)), load().train()
    rows = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    batch = padded(rows, pad=tokenizer.pad_token_id)
    flat = torch.cat(rows)[None]
    starts = torch.tensor([0, *map(len, rows)]).cumsum(0)[:-1]
    labels = flat.clone()
    labels[0, starts] = -100
    loss, reference = gradients(model, batch)
    leaking, through = gradients(model, {"input_ids": flat, "labels": labels})
    with unpad(model):
        unpadded, inside = gradients(model, batch)
    return {
        "tokens": flat.numel(), "padding": 1 - flat.numel() / batch["input_ids"].numel(), "loss": loss,
        "loss_unpadded": unpadded, "loss_leaking": leaking, "differs": furthest(inside, reference),
        "leaking": furthest(through, reference),
    }  # fmt: skip


def padded(rows: Sequence[Tensor], pad: int) -> dict[str, Tensor]:
    """Pads rows on the right: `input_ids`, `attention_mask` and `labels`, int64 `[B, T]`."""
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=pad)
    mask = (torch.arange(ids.shape[1])[None] < torch.tensor([len(row) for row in rows])[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def gradients(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Returns the model's own loss of a batch, and the gradient of every parameter."""
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def furthest(found: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """Returns the largest relative difference of a parameter's gradient.

    Raises:
        AssertionError: other parameters have a gradient.
    """
    assert found.keys() == reference.keys()
    return max(float((found[name] - g).norm() / g.norm()) for name, g in reference.items())
