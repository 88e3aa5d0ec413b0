"""Do documents of a batch see each other? Asked of the model itself, not of a list of known models.

    report = audit_model(tiny_model("llama"))
    print("\\n".join(report.lines()))
    quick_check(model, "flat").refuse()          # what training does before its first step

For every attention implementation, layout and mode, one of

- **isolated**: each document's outputs (and the gradients) are those it has alone, and no change of one
  document moves another's;
- **leaks**: some document's outputs depend on another's tokens; which ones, and how strongly;
- **wrong**: no leak, and yet not what the document gives alone (positions, window, scaling);
- **not supported**: the model or the implementation refuses, with the reason;
- **unclear**: the outputs barely depend on the context at all, so that a leak could not be seen.

Numbers are the largest absolute differences of logits. A difference counts when it exceeds what rounding of the
model's dtype explains; `packtrain.modeling.audit_probe` has the experiments themselves.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from packtrain.errors import ModelError
from packtrain.modeling import audit_probe as probe
from packtrain.modeling.attention import NAME
from packtrain.modeling.audit_causes import advice, cause
from packtrain.modeling.audit_models import tiny_model
from packtrain.modeling.audit_report import (
    ISOLATED,
    LEAKS,
    REFUSED,
    UNCLEAR,
    WRONG,
    AuditReport,
    Finding,
    PaddingEffect,
)

__all__ = ["AuditReport", "Finding", "PaddingEffect", "audit_model", "quick_check", "tiny_model"]

logger = logging.getLogger(__name__)
MODES: dict[str, dict] = {
    "eval": {},
    "train": {"train": True},
    "checkpointing": {"train": True, "checkpointing": True},
    "cache": {"use_cache": True},
    "lora": {"train": True, "adapter": "lora"},
    "prompt tuning": {"train": True, "adapter": "prompt tuning"},
}
LARGE = 100_000_000  # weights; above, adapters are not tried on a copy, and `quick_check` runs the first layers


def audit_model(
    model: PreTrainedModel,
    *,
    layouts: Sequence[str] = tuple(probe.LAYOUTS),
    implementations: Sequence[str] | None = None,
    modes: Sequence[str] = tuple(MODES),
    padding: bool = True,
) -> AuditReport:
    """Try every combination on `model`, as it is: its weights, its dtype, its device.

    Args:
        layouts: keys of `audit_probe.LAYOUTS`.
        implementations: names for `attn_implementation`; None for what transformers picks for the model by itself,
            eager, sdpa and packtrain_varlen.
        modes: keys of `MODES`. Adapters are tried on a copy, and left out for models above `LARGE` weights.
        padding: whether to measure what filler does.

    Raises:
        ModelError: the model cannot run even a single document.
    """
    probe.register_counted()
    subject = _Subject.of(model)
    if implementations is None:
        implementations = list(dict.fromkeys([NAME, subject.own, "sdpa", "eager"]))
    if sum(weight.numel() for weight in model.parameters()) > LARGE:
        modes = [mode for mode in modes if "adapter" not in MODES[mode]]
    if "use_cache" not in inspect.signature(probe.base(model).forward).parameters:
        modes = [mode for mode in modes if mode != "cache"]
    findings = []
    for mode in modes:
        try:
            adapted = subject.adapted(MODES[mode].get("adapter"))
        except Exception as error:  # peft refuses in many ways
            refused = {"verdict": REFUSED, "error": _short(error), "mode": mode}
            findings += [Finding(implementation=i, layout=l, **refused) for i in implementations for l in layouts]
            continue
        findings += [_examine(adapted, i, layout, mode) for i in implementations for layout in layouts]
    findings = [replace(finding, cause=cause(finding, findings, model)) for finding in findings]
    return AuditReport(
        model=getattr(model.config, "name_or_path", "") or type(model).__name__,
        architecture=model.config.model_type,
        transformers=transformers.__version__,
        position_start=subject.start,
        findings=findings,
        padding=[effect for i in implementations for effect in _padding(subject, i)] if padding else [],
        notes=_notes(subject) if padding else [],
        advice=advice(findings),
    )


def quick_check(model: nn.Module, layout: str, attn_implementation: str | None = None) -> Finding:
    """The check that training makes before its first step, on the real model: one layout, the implementation in force.

    A large model runs its first layers only, as many as show every kind of layer it has: a leak is a property of a
    layer's attention and mask, which layers of a kind share.

    Args:
        layout: "flat" or "padded".
        attn_implementation: to check another than the one in force.
    """
    probe.register_counted()
    large = sum(weight.numel() for weight in model.parameters()) > LARGE
    with _first_layers(model) if large else _all_layers() as checked:
        subject = _Subject.of(model)
        implementation = attn_implementation or subject.own
        finding = _examine(subject, implementation, layout, "eval")
        return replace(finding, cause=cause(finding, [finding], probe.base(model)), checked=checked)


# ------------------------------------------------------------------------------------------------ one model


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """A model, its documents, and what it says of each of them alone with an attention that is not ours."""

    model: nn.Module
    own: str
    reference: str
    documents: list[Tensor]
    start: int
    pad: int
    expected: list[Tensor]
    context: float

    @classmethod
    def of(cls, model: nn.Module) -> _Subject:
        inner = probe.base(model)
        documents = probe.sample_documents(model)
        pad = getattr(inner.config.get_text_config(), "pad_token_id", None)
        reference = probe.reference_implementation(model)
        try:
            with probe.using(model, reference), probe.mode(model, train=False), torch.no_grad():
                start = probe.position_start(model, documents)
                expected = probe.alone(model, documents)
                context = _context(model, documents, expected)
        except Exception as error:
            raise ModelError(f"cannot run a single document: {_short(error)}", value=type(inner).__name__) from error
        return cls(
            model=model,
            own=inner.config._attn_implementation,
            reference=reference,
            documents=documents,
            start=start,
            pad=pad if isinstance(pad, int) and pad >= 0 else 0,
            expected=expected,
            context=context,
        )

    def adapted(self, adapter: str | None) -> _Subject:
        """The same with an adapter on a copy of the model, drawn so that it matters."""
        if adapter is None:
            return self
        import peft

        if adapter == "lora":
            config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        else:
            config = peft.PromptTuningConfig(task_type=peft.TaskType.CAUSAL_LM, num_virtual_tokens=3)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _Subject.of(peft.get_peft_model(copy.deepcopy(self.model), config))

    @property
    def scale(self) -> float:
        return max(output.abs().max().item() for output in self.expected)

    @property
    def tolerance(self) -> float:
        return probe.precision(self.model) * max(self.scale, 1e-3)


def _context(model: nn.Module, documents: list[Tensor], expected: list[Tensor]) -> float:
    """How far the last output of a document moves when everything before its last token changes."""
    moved = [torch.cat([changed[:-1], own[-1:]]) for own, changed in zip(documents, _changed(documents), strict=True)]
    found = probe.alone(model, moved)
    return max(probe.largest(a[-1], b[-1]) for a, b in zip(found, expected, strict=True))


def _changed(documents: list[Tensor]) -> list[Tensor]:
    return [probe.change(documents, which)[which] for which in range(len(documents))]


def _examine(subject: _Subject, implementation: str, layout: str, mode: str) -> Finding:
    settings = MODES[mode]
    place = {"implementation": implementation, "layout": layout, "mode": mode}
    name = probe.countable(subject.model) if implementation == NAME else implementation
    model, options = subject.model, {"start": subject.start, "pad": subject.pad}
    options["use_cache"] = settings.get("use_cache", False)
    modes = {"train": settings.get("train", False), "checkpointing": settings.get("checkpointing", False)}
    calls = probe.COUNTED.calls
    try:
        with probe.using(model, name), probe.mode(model, **modes):
            with torch.no_grad():
                laid = probe.LAYOUTS[layout](subject.documents, subject.start, subject.pad)
                together = probe.each(probe.outputs(model, laid, options["use_cache"]), laid.places)
                calls = probe.COUNTED.calls - calls
                matrix = probe.dependence(model, probe.LAYOUTS[layout], subject.documents, **options)
            gradient = _gradient_difference(subject, laid) if modes["train"] else None
    except Exception as error:  # whatever a model raises is what it has to say about this combination
        return Finding(**place, verdict=REFUSED, error=_short(error))
    pairs = zip(together, subject.expected, strict=True)
    difference = max(probe.largest(ours, theirs) for ours, theirs in pairs)
    others = matrix.masked_fill(torch.eye(len(matrix), dtype=torch.bool), 0.0)
    sees = [(i, j) for i, j in (others > subject.tolerance).nonzero().tolist()]
    off = difference > 10 * subject.tolerance or (gradient or 0.0) > 100 * probe.precision(model)
    if subject.context <= 3 * subject.tolerance:
        verdict = UNCLEAR
    else:
        verdict = LEAKS if sees else WRONG if off else ISOLATED
    return Finding(
        **place,
        verdict=verdict,
        difference=difference,
        leak=others.max().item(),
        sees=sees,
        gradient_difference=gradient,
        calls=calls if name == probe.COUNTED.name else None,
        scale=subject.scale,
    )


def _gradient_difference(subject: _Subject, laid: probe.Laid) -> float:
    """Relative norm of the difference between the gradients of documents together and alone."""
    model = subject.model
    ours = probe.gradients(model, probe.each(probe.outputs(model, laid), laid.places))
    with probe.using(model, subject.reference):
        theirs = probe.gradients(model, probe.alone(model, subject.documents))
    return ((ours - theirs).norm() / theirs.norm()).item()


def _padding(subject: _Subject, implementation: str) -> Iterator[PaddingEffect]:
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
            with probe.using(model, implementation), probe.mode(model, train=False), torch.no_grad():
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


def _notes(subject: _Subject) -> list[str]:
    """What filler does beside the outputs."""
    losses = probe.router_losses(subject.model, subject.documents, subject.start, subject.pad)
    if losses is None or abs(losses[0] - losses[1]) <= 1e-5 * abs(losses[0]):
        return []
    return [f"the router's auxiliary loss counts filler: {losses[0]:.4f}, with more padding {losses[1]:.4f}"]


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


@contextmanager
def _all_layers() -> Iterator[None]:
    yield None


@contextmanager
def _first_layers(model: nn.Module) -> Iterator[str | None]:
    """While open, the model has only its first layers: the shortest prefix with every kind, and at least two."""
    config = probe.base(model).config.get_text_config()
    total, types = config.num_hidden_layers, getattr(config, "layer_types", None)
    stacks = [
        (parent, name, stack)
        for parent in model.modules()
        for name, stack in parent.named_children()
        if isinstance(stack, nn.ModuleList) and len(stack) == total
    ]
    kinds = [(type(layer), types[i] if types else None) for i, layer in enumerate(stacks[0][2])] if stacks else []
    kept = max([2, *(kinds.index(kind) + 1 for kind in set(kinds))])
    if not stacks or kept >= total:
        yield None
        return
    try:
        for parent, name, stack in stacks:
            setattr(parent, name, nn.ModuleList(list(stack)[:kept]))
        yield f"first {kept} of {total} layers"
    finally:
        for parent, name, stack in stacks:
            setattr(parent, name, stack)
