"""A model under audit: its documents, and what it says of each of them alone."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from packtrain.errors import ModelError, clip
from packtrain.modeling.audit import probe
from packtrain.modeling.audit.settings import base, in_mode, reference_implementation, using
from packtrain.modeling.loading import of_weights, weights_not_finite
from packtrain.modeling.positions import position_start


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model, its documents, and what it says of each of them alone with an attention that is not ours.

    `dtype` is what it computes in: that of its weights, or of the autocast around it.
    """

    model: nn.Module
    dtype: torch.dtype
    own: str
    reference: str
    documents: list[Tensor]
    start: int
    pad: int
    expected: list[Tensor]
    context: float

    @classmethod
    def of(cls, model: nn.Module, dtype: torch.dtype | None = None) -> Subject:
        inner = base(model)
        documents = probe.sample_documents(model)
        pad = getattr(inner.config.get_text_config(), "pad_token_id", None)
        reference = reference_implementation(model)
        try:
            with using(model, reference), in_mode(model, train=False), torch.no_grad():
                start = position_start(model)
                expected = probe.alone(model, documents)
                context = _context(model, documents, expected)
        except Exception as error:
            raise ModelError(f"cannot run a single document: {short(error)}", value=type(inner).__name__) from error
        if any(output.isnan().any() for output in expected):
            bad = weights_not_finite(model)
            what = f"answers a single document with NaN{of_weights(bad)}"
            fix = "restore these weights" if bad else "compute in bfloat16 or float32 (model.dtype, training.bf16)"
            raise ModelError(what, key="model", value=type(inner).__name__, fix=fix)
        return cls(
            model=model,
            dtype=dtype or next(model.parameters()).dtype,
            own=inner.config._attn_implementation,
            reference=reference,
            documents=documents,
            start=start,
            pad=pad if isinstance(pad, int) and pad >= 0 else 0,
            expected=expected,
            context=context,
        )

    def adapted(self, adapter: str | None) -> Subject:
        """Returns the same with an adapter on a copy of the model, drawn so that it matters."""
        if adapter is None:
            return self
        import peft

        if adapter == "lora":
            config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        else:
            task = peft.TaskType.CAUSAL_LM if base(self.model).can_generate() else peft.TaskType.FEATURE_EXTRACTION
            config = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Subject.of(peft.get_peft_model(copy.deepcopy(self.model), config))

    @property
    def scale(self) -> float:
        return max(output.abs().max().item() for output in self.expected)

    @property
    def tolerance(self) -> float:
        return probe.precision(self.dtype) * max(self.scale, 1e-3)


def _context(model: nn.Module, documents: list[Tensor], expected: list[Tensor]) -> float:
    """Measures how far the last output of a document moves when everything before its last token changes."""
    moved = [torch.cat([changed[:-1], own[-1:]]) for own, changed in zip(documents, _changed(documents), strict=True)]
    found = probe.alone(model, moved)
    return max(probe.largest(a[-1], b[-1]) for a, b in zip(found, expected, strict=True))


def _changed(documents: list[Tensor]) -> list[Tensor]:
    return [probe.change(documents, which)[which] for which in range(len(documents))]


def short(error: BaseException) -> str:
    if isinstance(error, ModelError):
        return error.what
    lines = str(error).strip().splitlines() or [""]
    return clip(f"{type(error).__name__}: {lines[0]}", 200)
