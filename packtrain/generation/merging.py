"""An adapter merged into its base: one ordinary model, checked by its logits before it is written."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from packtrain.errors import ModelError
from packtrain.generation.trained import Trained
from packtrain.modeling.trained_on import TrainedOn

_TOKENS = 64  # of the probe
_CLOSE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}  # of the logits' largest value


def merge(trained: Trained, directory: str | Path) -> float:
    """Merges the adapter of `trained` into its base and saves model and tokenizer to `directory`.

    Returns:
        The largest difference of a logit, relative to the largest logit, between the model with its adapter and the
        model as it is read back.

    Raises:
        ModelError: there is no adapter, `directory` is not empty, or the merged model computes something else.
    """
    if not trained.has_adapter:
        raise ModelError(
            "has no adapter, so there is nothing to merge",
            key="RUN_OR_MODEL",
            fix="use it as it is: `packtrain generate` and `packtrain push` take it",
        )
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(
            "is not an empty folder", key="--out", value=str(target), fix="name a new folder, or remove this one"
        )
    model: Any = trained.model
    if getattr(model.get_base_model(), "is_quantized", False):
        what = "is quantised, and a merge would round the adapter's weights to its few levels"
        raise ModelError(what, key="RUN_OR_MODEL", fix="load the base unquantised and merge into that")
    probe = _probe(model, len(trained.tokenizer))
    before = _logits(model, probe)
    merged = cast(PreTrainedModel, copy.deepcopy(model).merge_and_unload())
    difference = _difference(_logits(merged, probe), before)
    limit = _CLOSE[merged.dtype]
    if not difference <= limit:
        what = f"computes something else once merged: its logits differ by {difference:.1e} of the largest"
        raise ModelError(what, key="RUN_OR_MODEL", fix="keep the adapter apart, or merge in float32 (--dtype float32)")
    merged.save_pretrained(str(target))
    trained.tokenizer.save_pretrained(str(target))
    if trained.prompts:
        TrainedOn(prompts=trained.prompts).save(target)
    read = type(merged).from_pretrained(str(target), dtype=merged.dtype).to(before.device).eval()
    difference = _difference(_logits(read, probe), before)
    if not difference <= limit:
        what = f"reads back as another model: its logits differ by {difference:.1e} of the largest"
        raise ModelError(what, key="--out", value=str(target), fix="please report this with the model's name")
    return difference


def _probe(model: PreTrainedModel, vocabulary: int) -> torch.Tensor:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (1, _TOKENS), generator=generator).to(device)


@torch.inference_mode()
def _logits(model: torch.nn.Module, probe: torch.Tensor) -> torch.Tensor:
    return model(input_ids=probe, use_cache=False).logits.float()


def _difference(logits: torch.Tensor, reference: torch.Tensor) -> float:
    return float((logits - reference).abs().max() / reference.abs().max())
