"""Does attention leak between the documents of a batch? Checked on the model before its engine takes it.

DeepSpeed and FSDP take whole weights from the CPU, where the check can run, but for those that were sharded while they
were loaded (ZeRO-3, which runs them in its engine only).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from packtrain.errors import ModelError
from packtrain.modeling.attention.varlen import NAME
from packtrain.modeling.audit.audit import isolate, quick_check
from packtrain.modeling.audit.report import REFUSED
from packtrain.modeling.audit.settings import base, is_sharded_by_deepspeed
from packtrain.modeling.mixers.padding import Padding

NOT_CHECKED = "not checked: "


class Isolation(NamedTuple):
    """What was found: in words, and what was padded inside the model for it."""

    says: str
    padding: Padding | None = None

    @property
    def checked(self) -> bool:
        return not self.says.startswith(NOT_CHECKED)


def compute_dtype(args: TrainingArguments, weights: torch.dtype) -> torch.dtype:
    """Returns what attention computes in: the autocast dtype, else that of the weights."""
    if args.bf16 or args.fp16:
        return torch.bfloat16 if args.bf16 else torch.float16
    return weights


def cannot_ask(model: nn.Module) -> str | None:
    """Says why this rank can't run the model before its engine takes it; None where it can."""
    weights = list(model.parameters())
    if any(hasattr(weight, "ds_id") or isinstance(weight, DTensor) for weight in weights):
        return "weights are sharded already; `packtrain audit` tries the architecture on one process"
    if any(weight.is_meta for weight in weights):  # of FSDP, which loads them on one rank of every host
        return "weights are on another rank, which checks them"
    return None


def check_isolation(
    model: nn.Module,
    layout: str,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    allow_contamination: bool = False,
    longest: int | None = None,
) -> Isolation:
    """Checks whether documents are isolated, and pads inside a model for flat batches what mixes positions otherwise.

    Args:
        model: as it was loaded, not wrapped by an engine yet.
        layout: "flat" or "padded".
        device: where it will train; until then DeepSpeed and FSDP leave it on the CPU.
        dtype: what it will compute in there, see `compute_dtype`; None for that of its weights.
        allow_contamination: warn instead of refusing.
        longest: tokens of the longest row there will be; None if that is not known.

    Raises:
        ModelError: attention leaks between documents, or the model can't run at all.
    """
    sharded = is_sharded_by_deepspeed(model)
    if (reason := cannot_ask(model)) is not None and not sharded:
        return Isolation(f"{NOT_CHECKED}{reason}")
    weights = list(model.parameters())
    padding, before = None, base(model).config._attn_implementation
    try:
        if layout == "flat":
            finding, padding = isolate(model, compute_dtype=dtype, longest=longest)
        else:
            finding = quick_check(model, layout, compute_dtype=dtype, longest=longest)
    except ModelError as error:
        if weights[0].device.type == device.type:
            raise
        what = f"{error.what}, on the {weights[0].device.type} where weights are until training"
        return Isolation(f"{NOT_CHECKED}{what}")
    here = weights[0].device.type == device.type
    if finding.verdict == REFUSED and here and not allow_contamination:  # the first micro-batch would end in the same
        what = f"cannot run a {layout} batch with {finding.implementation}: {finding.error}"
        fix = (
            "choose a padded strategy (pad_longest)"
            if layout == "flat"
            else "see `packtrain audit` for what it can run"
        )
        raise ModelError(what, key="model", value=type(base(model)).__name__, fix=fix)
    finding.refuse(allow_contamination=allow_contamination)
    if padding is not None and sharded:
        padding.call_alike_on_all_ranks()
    said = "" if padding is None else f"; {padding.says()}"
    if padding is not None and before == NAME != finding.implementation:
        said += f", with {finding.implementation}, as {NAME} cannot compute its attention"
    return Isolation(f"{finding.what()}{said}", padding)
