"""Does attention leak between the documents of a batch? Measured on the model itself, not looked up in a list.

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
model's dtype explains; `packtrain.modeling.audit.probe` has the experiments themselves.

The same model also shows whether padding reaches real tokens: under a mask on either side of a document, and as the
unmasked tail of diffusion models.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from packtrain.errors import ModelError
from packtrain.modeling.attention.kernels import HALF
from packtrain.modeling.attention.varlen import NAME, check_implementation, choose_implementation
from packtrain.modeling.audit import probe
from packtrain.modeling.audit.causes import advice, cause
from packtrain.modeling.audit.kinds import kind_of, shortest_prefix
from packtrain.modeling.audit.models import tiny_model
from packtrain.modeling.audit.report import (
    ISOLATED,
    LEAKS,
    REFUSED,
    UNCLEAR,
    WRONG,
    AuditReport,
    Finding,
    PaddingEffect,
)
from packtrain.modeling.audit.settings import (
    COUNTED,
    base,
    countable,
    gathered,
    in_mode,
    quietly,
    register_counted,
    switchable,
    using,
)
from packtrain.modeling.audit.subject import Subject, short
from packtrain.modeling.equality import nonzero_adapters
from packtrain.modeling.mixers.finding import find_mixers
from packtrain.modeling.mixers.padding import Padding, find_padding
from packtrain.modeling.per_document import compute_per_document, depends_on_length, small_thresholds

__all__ = ["AuditReport", "Finding", "audit_model", "isolate", "quick_check", "tiny_model"]

logger = logging.getLogger(__name__)

OTHERS = ("sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")
PADDED = ", padded inside"  # behind the name of an implementation
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
    """Tries every combination on `model`, as it is: its weights, its dtype, its device.

    Args:
        layouts: keys of `probe.LAYOUTS`.
        implementations: names for `attn_implementation`; None for packtrain_varlen, what transformers picks for the
            model by itself, and all that it has built in.
        modes: keys of `MODES`. Adapters are tried on a copy, and left out for models above `LARGE` weights.
        padding: whether to measure what padding does.

    Raises:
        ModelError: the model cannot run even a single document, or there is no such implementation, layout or mode.
    """
    if not isinstance(base(model), PreTrainedModel):
        raise ModelError("must be a transformers model", key="model", value=type(base(model)).__name__)
    _check_names("layouts", layouts, probe.LAYOUTS)
    _check_names("modes", modes, MODES)
    if isinstance(implementations, str):
        raise ModelError("must be a list of names", key="implementations", value=implementations)
    register_counted()
    for implementation in implementations or ():
        check_implementation(implementation)
    with nonzero_adapters(model), small_thresholds(model) as threshold:
        without = _differs_in_company(model) if threshold is not None else 0.0
        with compute_per_document(model) as computed:
            report = _audit(model, layouts, implementations, modes, padding)
    if threshold is None or not computed.what:
        return report
    note = (
        f"above {threshold:,} tokens {' and '.join(computed.what)} are those of each document here, as in recipes and "
        f"`attach`; elsewhere outputs differ by up to {without:.2g}"
    )
    return replace(report, notes=[*report.notes, note])


def _check_names(key: str, given: Sequence[str], known: Collection[str]) -> None:
    """Raises ModelError unless `given` are names of those that are known, at least one of them."""
    if isinstance(given, str) or not given or set(given) - set(known):
        raise ModelError(
            "must be a list of some of these names", key=key, value=given, fix=f"choose from {', '.join(known)}"
        )


def _differs_in_company(model: PreTrainedModel) -> float:
    """Measures how far documents on both sides of a model's thresholds are in one batch from those alone, as it is."""
    with quietly():
        subject = Subject.of(model)
        return max(_examine(subject, subject.own, layout, "eval").off for layout in ("flat", "padded"))


def _audit(
    model: PreTrainedModel,
    layouts: Sequence[str],
    implementations: Sequence[str] | None,
    modes: Sequence[str],
    padding: bool,
) -> AuditReport:
    subject = Subject.of(model)
    implementations = list(dict.fromkeys(implementations or [NAME, subject.own, *OTHERS]))
    if sum(weight.numel() for weight in model.parameters()) > LARGE:
        modes = [mode for mode in modes if "adapter" not in MODES[mode]]
    if "use_cache" not in inspect.signature(base(model).forward).parameters:
        modes = [mode for mode in modes if mode != "cache"]
    findings: list[Finding] = []
    with quietly():
        for mode in modes:
            adapted = _adapted(subject, mode)
            if isinstance(adapted, str):
                refused: dict[str, Any] = {"verdict": REFUSED, "error": adapted, "mode": mode}
                findings += [Finding(implementation=i, layout=l, **refused) for i in implementations for l in layouts]
                continue
            findings += [_examine(adapted, i, layout, mode) for i in implementations for layout in layouts]
        inside, said = _padded_inside(subject, findings, modes)
        running = [i for i in implementations if any(f.implementation == i and f.verdict != REFUSED for f in findings)]
        effects = [effect for i in running for effect in padding_effects(subject, i)] if padding else []
        noted = said + (notes(subject) if padding else [])
    findings = [replace(finding, cause=cause(finding, findings, model)) for finding in findings]
    findings += inside
    return AuditReport(
        model=getattr(model.config, "name_or_path", "") or type(model).__name__,
        architecture=model.config.model_type,
        transformers=transformers.__version__,
        position_start=subject.start,
        findings=findings,
        padding=effects,
        notes=noted,
        advice=advice(findings),
    )


def _adapted(subject: Subject, mode: str) -> Subject | str:
    """Returns the subject with the adapter of a mode, or why it takes none."""
    try:
        return subject.adapted(MODES[mode].get("adapter"))
    except Exception as error:  # peft refuses in many ways
        return short(error)


def _padded_inside(subject: Subject, findings: list[Finding], modes: Sequence[str]) -> tuple[list[Finding], list[str]]:
    """Examines a model that is not isolated in flat batches with `packtrain_varlen` with its mixers padded inside; returns
    also what these are."""
    ours = [f for f in findings if f.implementation == NAME and f.layout == "flat" and f.mode in ("eval", "train")]
    if not ours or all(finding.safe or finding.verdict == UNCLEAR for finding in ours):
        return [], []
    padded = _pad_inside(subject)
    if padded is None:
        return [], []
    padding, proof = padded
    found = []
    try:
        for mode in modes:
            adapted = _adapted(subject, mode)
            if isinstance(adapted, str):
                place: dict[str, Any] = {"implementation": proof.implementation, "layout": "flat", "mode": mode}
                found.append(Finding(**place, verdict=REFUSED, error=adapted))
            else:
                found.append(_examine(adapted, proof.implementation, "flat", mode))
    finally:
        padding.remove()
    return [replace(one, implementation=one.implementation + PADDED) for one in found], [padding.says()]


def quick_check(
    model: nn.Module,
    layout: str,
    attn_implementation: str | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
    longest: int | None = None,
) -> Finding:
    """Checks a model as training does before its first step: the real one, one layout, the implementation in force.

    A large model runs its first layers only, as many as show every kind of layer it has: a leak is a property of a
    layer's attention and mask, which layers of a kind share.

    Args:
        layout: "flat" or "padded".
        attn_implementation: to check another than the one in force.
        compute_dtype: what training computes in; where that is half precision and the weights are not, the check runs
            under autocast as training does, and so by the same kernels. None for the weights' own.
        longest: tokens of the longest row there will be; None if that is not known. Arithmetic that changes above a length
            (`packtrain.modeling.per_document`) is checked on both sides of it, where rows get that long.
    """
    with _as_training(model, compute_dtype) as (half, checked), nonzero_adapters(model):
        implementation = attn_implementation or base(model).config._attn_implementation
        return replace(_check(model, half, implementation, layout, longest), checked=checked)


def _check(
    model: nn.Module, half: torch.dtype | None, implementation: str, layout: str, longest: int | None
) -> Finding:
    """Examines one layout, on both sides of the lengths at which the model's arithmetic changes."""
    with small_thresholds(model, longest=longest) as threshold:
        finding = _examine(Subject.of(model, half), implementation, layout, "eval")
    if threshold is not None and finding.verdict in (LEAKS, WRONG):
        shorter = _examine(Subject.of(model, half), implementation, layout, "eval")
        if shorter.safe:
            return replace(finding, cause=depends_on_length(threshold), threshold=threshold)
        finding = shorter
    return replace(finding, cause=cause(finding, [finding], base(model)))


def isolate(
    model: nn.Module, *, compute_dtype: torch.dtype | None = None, longest: int | None = None
) -> tuple[Finding, Padding | None]:
    """Checks a model for flat batches as `quick_check` does, and pads inside what mixes positions where it has to be.

    A model that runs with `packtrain_varlen` and is isolated keeps its modules as they are. Otherwise the smallest modules
    are padded inside with which it is isolated: its outputs, and the gradients of its weights with non-zero adapters. A
    model that does not look up its attention by name computes a mask of all documents at best, so padding is tried first.
    A model that cannot run with `packtrain_varlen` is left with the attention of transformers with which padding helps.

    Returns:
        The finding, and what was padded inside; None where nothing was, or nothing helps.
    """
    with _as_training(model, compute_dtype) as (half, checked), nonzero_adapters(model):
        own = base(model).config._attn_implementation
        finding = replace(_check(model, half, own, "flat", longest), checked=checked)
        ours, by_length = own == NAME, finding.threshold is not None
        if (finding.safe and ours) or by_length or finding.verdict == UNCLEAR or (not ours and switchable(model, NAME)):
            return finding, None
        padded = _pad_inside(Subject.of(model, half))
    if padded is None:
        return finding, None
    padding, proof = padded
    if proof.implementation != own:
        base(model).set_attn_implementation(proof.implementation)
    return replace(proof, checked=checked), padding if checked is None else padding.in_all_layers(model)


@contextmanager
def _as_training(
    model: nn.Module, compute_dtype: torch.dtype | None
) -> Iterator[tuple[torch.dtype | None, str | None]]:
    """Runs a model as training does while open: under its autocast, a large one with its first layers only. Yields the
    dtype of the autocast and what is checked."""
    register_counted()
    weight = next(model.parameters())
    half = compute_dtype if compute_dtype in HALF and compute_dtype != weight.dtype else None
    large = sum(getattr(weight, "ds_numel", weight.numel()) for weight in model.parameters()) > LARGE
    autocast = nullcontext() if half is None else torch.autocast(weight.device.type, half)
    with quietly(), autocast, _first_layers(model) if large else nullcontext() as checked, gathered(model):
        yield half, checked


def _pad_inside(subject: Subject) -> tuple[Padding, Finding] | None:
    """Finds what has to be padded inside, and leaves it so; None where nothing helps.

    Layers that cannot run with `packtrain_varlen` (sparse attention that chooses keys by the mask) are tried with the
    model's attention of transformers, which the finding then names.
    """
    by_name = subject.own == NAME or switchable(subject.model, COUNTED.name)
    first = NAME if by_name else subject.own
    for implementation in dict.fromkeys((first, subject.reference)):
        if (found := _pad_inside_with(subject, implementation)) is not None:
            return found
    return None


def _pad_inside_with(subject: Subject, implementation: str) -> tuple[Padding, Finding] | None:
    model, half = subject.model, subject.dtype in HALF
    try:
        with using(model, countable(model) if implementation == NAME else implementation):
            found = find_mixers(model, subject.documents)
    except Exception as error:  # a model that its own attention alone can run
        logger.debug("%s, %s: %s", type(model).__name__, implementation, error)
        return None

    def holds(finding: Finding) -> bool:
        allowed = probe.precision(subject.dtype) * (5 if half else 1)
        return finding.safe and (finding.gradient_difference or 0.0) <= allowed

    return find_padding(model, found, lambda: _examine(subject, implementation, "flat", "train"), holds)


def _examine(subject: Subject, implementation: str, layout: str, mode: str) -> Finding:
    settings = MODES[mode]
    place: dict[str, Any] = {"implementation": implementation, "layout": layout, "mode": mode}
    name = countable(subject.model) if implementation == NAME else implementation
    model, options = subject.model, {"start": subject.start, "pad": subject.pad}
    options["use_cache"] = settings.get("use_cache", False)
    modes = {"train": settings.get("train", False), "checkpointing": settings.get("checkpointing", False)}
    calls = COUNTED.calls
    try:
        device = next(model.parameters()).device
        choose_implementation(implementation, "flat", device, subject.dtype)  # not every one runs everywhere
        with using(model, name), in_mode(model, **modes):
            with torch.no_grad():
                laid = probe.LAYOUTS[layout](subject.documents, subject.start, subject.pad)
                together = probe.each(probe.outputs(model, laid, options["use_cache"]), laid.places)
                calls = COUNTED.calls - calls
                matrix = probe.dependence(model, probe.LAYOUTS[layout], subject.documents, **options)
            gradient = _gradient_difference(subject, laid) if modes["train"] else None
    except Exception as error:  # whatever a model raises is what it has to say about this combination
        return Finding(**place, verdict=REFUSED, error=short(error))
    pairs = zip(together, subject.expected, strict=True)
    difference = max(probe.largest(ours, theirs) for ours, theirs in pairs)
    others = matrix.masked_fill(torch.eye(len(matrix), dtype=torch.bool), 0.0)
    sees = [(i, j) for i, j in (others > subject.tolerance).nonzero().tolist()]
    off = difference > 10 * subject.tolerance or (gradient or 0.0) > 100 * probe.precision(subject.dtype)
    if not subject.context > 3 * subject.tolerance or subject.tolerance == float("inf"):
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
        calls=calls if name == COUNTED.name else None,
        scale=subject.scale,
    )


def _gradient_difference(subject: Subject, laid: probe.Laid) -> float:
    """Returns the relative norm of the difference between the gradients of documents together and alone."""
    model = subject.model
    ours = probe.gradients(model, probe.each(probe.outputs(model, laid), laid.places))
    with using(model, subject.reference):
        theirs = probe.gradients(model, probe.alone(model, subject.documents))
    return ((ours - theirs).norm() / theirs.norm()).item()


@contextmanager
def _first_layers(model: nn.Module) -> Iterator[str | None]:
    """Leaves the model only its first layers while open: the shortest prefix with every kind, and at least two."""
    total = base(model).config.get_text_config().num_hidden_layers
    stacks = [
        (parent, name, stack)
        for parent in model.modules()
        for name, stack in parent.named_children()
        if isinstance(stack, nn.ModuleList) and len(stack) == total
    ]
    kept = max(2, shortest_prefix([kind_of(layer) for layer in stacks[0][2]]) if stacks else 0)
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


# ---------------------------------------------------------------------------------------------------- padding


def padding_effects(subject: Subject, implementation: str) -> Iterator[PaddingEffect]:
    """Measures what padding does on either side of a document, and as an unmasked tail."""
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
    """Says what padding does apart from the outputs."""
    losses = router_losses(subject.model, subject.documents, subject.start, subject.pad)
    if losses is None or abs(losses[0] - losses[1]) <= 1e-5 * abs(losses[0]):
        return []
    return [f"the router's auxiliary loss counts padding: {losses[0]:.4f}, with more padding {losses[1]:.4f}"]


def router_losses(model: nn.Module, documents: list[Tensor], start: int, pad: int) -> tuple[float, float] | None:
    """Measures the auxiliary loss of a mixture of experts on a padded batch, and with ten more columns of padding; None
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
