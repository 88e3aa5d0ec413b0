"""Why documents leak and what to do: read off the other findings and off the source of the model.

A cause is named where something shows it: the same combination without the cache isolates; the model's file
builds its mask without `position_ids`; its layers are recurrent. Where nothing does, none is named.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Sequence
from functools import lru_cache

from torch import nn
from transformers import PreTrainedModel

from packtrain.modeling.attention.varlen import NAME
from packtrain.modeling.audit.report import Finding

RECURRENT = re.compile("Mamba|SSM|Ssm|Rwkv|LSTM|Recurrent|DeltaNet|ShortConv|Lightning|LinearAttention")

WORKS_ON_MASKS = f"its layers work on the mask itself, which {NAME} does not build"
REFUSALS = {  # how errors begin
    "ImportError": "the kernel is not installed",
    "ModuleNotFoundError": "the kernel is not installed",
    "IndexError": "positions run past the end of the model's table",
}


def cause(finding: Finding, findings: Sequence[Finding], model: PreTrainedModel) -> str | None:
    """Explains why a finding is not isolated; None where nothing shows it."""
    if finding.verdict == "not supported":
        refusal = finding.error or ""
        if finding.implementation == NAME and refusal.startswith("TypeError: 'NoneType'"):
            return WORKS_ON_MASKS
        return next((why for error, why in REFUSALS.items() if refusal.startswith(error)), None)
    if finding.verdict not in ("leaks", "wrong"):
        return None

    def isolated(**changed) -> bool:
        wanted = {name: getattr(finding, name) for name in ("implementation", "layout", "mode")} | changed
        return any(f.verdict == "isolated" and all(getattr(f, k) == v for k, v in wanted.items()) for f in findings)

    if finding.mode == "prompt tuning":
        return "virtual tokens stand before the first document only, and peft drops position_ids"
    if finding.mode == "cache" and (isolated(mode="eval") or isolated(mode="eval", layout="flat")):
        return "the cache is on, and transformers separates documents only without one"
    if finding.layout == "masked" and isolated(layout="flat"):
        return "there is an attention mask, and transformers separates documents only without one"
    if recurrent := recurrent_layers(model):
        return recurrent_cause(model, recurrent)
    if finding.implementation == NAME and finding.calls == 0:
        return "the model never calls the registered attention function: its layers have their own attention"
    if finding.verdict == "wrong":
        if "position_ids" not in inspect.signature(model.forward).parameters:
            return "the model does not take position_ids, so positions run on from document to document"
        if finding.implementation == NAME and any(isolated(implementation=name) for name in ("sdpa", "eager")):
            return WORKS_ON_MASKS
        return None
    if finding.implementation == NAME and finding.layout == "flat":
        return "something other than its attention leaks between documents"
    masks = mask_builders(type(model))
    if finding.layout != "padded":
        if any("bidirectional" in name for name, _ in masks):
            return "the bidirectional mask is built without position_ids"
        if masks and not any(positions for _, positions in masks):
            return "the causal mask is built without position_ids"
        if not masks:
            return "the model builds its mask by itself, without position_ids"
    return None


def recurrent_layers(model: nn.Module) -> list[str]:
    """Returns the class names of layers that carry a state or a convolution along the row."""
    found = {type(m).__name__ for m in model.modules() if isinstance(m, nn.Conv1d)}
    names = {type(m).__name__ for m in model.modules() if type(m).__module__.startswith("transformers.")}
    return sorted({name for name in names if RECURRENT.search(name) and not name.endswith(MODELS)} or found)


MODELS = ("Model", "ForCausalLM", "ForMaskedLM", "Layer", "Block", "Norm", "RMSNorm", "RMSNormGated")


def recurrent_cause(model: nn.Module, layers: list[str]) -> str:
    source = source_of(type(model)) or ""
    shown = ", ".join(layers[:2])
    if "seq_idx" in source or "cu_seqlens" in source or "cu_seq_lens" in source:
        return f"{shown} separates documents only in its CUDA kernels, which are not in use here"
    return f"{shown} runs along the row from document to document, and does not take seq_idx"


@lru_cache
def source_of(model_class: type) -> str | None:
    try:
        return inspect.getsource(sys.modules[model_class.__module__])
    except (OSError, TypeError):
        return None


@lru_cache
def mask_builders(model_class: type) -> list[tuple[str, bool]]:
    """Finds transformers' mask builders that the model's file calls, each with whether it hands over `position_ids`."""
    source = source_of(model_class)
    if source is None:
        return []
    tree = ast.parse(source)
    in_a_dict = any(
        isinstance(key, ast.Constant) and key.value == "position_ids"
        for node in ast.walk(tree)
        if isinstance(node, ast.Dict)
        for key in node.keys
    )
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "id", "")
        if re.fullmatch(r"create_\w*mask", name) or name == "mask_function":
            keywords = [keyword.arg for keyword in node.keywords]
            positions = "position_ids" in keywords or (None in keywords and in_a_dict)
            found.append((name, positions and "bidirectional" not in name))
    return found


def advice(findings: Sequence[Finding]) -> list[str]:
    """Says what to do, in the order in which a user would want to."""
    without_cache = [f for f in findings if f.mode in ("eval", "train", "checkpointing")]
    combinations = {(f.implementation, f.layout) for f in without_cache}

    def safe(implementation: str, layout: str) -> bool:
        tried = [f for f in without_cache if (f.implementation, f.layout) == (implementation, layout)]
        return bool(tried) and all(f.verdict == "isolated" for f in tried)

    lines = []
    flat = sorted(i for i, layout in combinations if layout == "flat" and safe(i, layout))
    if NAME in flat:
        lines.append(f"flat batches are safe with {NAME} (attn_implementation: auto)")
        flat.remove(NAME)
    if flat:
        lines.append(f"flat batches {'are also' if lines else 'are'} safe with {' and '.join(flat)}")
    if not lines and any(layout == "flat" for _, layout in combinations):
        lines.append("flat batches are not safe: use a padded strategy (pad_longest, group_by_length)")
    padded = sorted(i for i, layout in combinations if layout == "padded" and safe(i, layout))
    if padded:
        lines.append(f"padded batches are safe with {' and '.join(padded)}")
    by_cache = [f for f in findings if f.mode == "cache" and f.layout == "flat" and f.verdict == "leaks"]
    if by_cache:
        lines.append(
            f"keep use_cache=False (a cache leaks with {', '.join(sorted({f.implementation for f in by_cache}))})"
        )
    return lines
