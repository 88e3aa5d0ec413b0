"""Models with heads, ragged batches, and what a model makes of them, padded and unpadded."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from packtrain.modeling.audit.models import enlarge, tiny_model
from packtrain.modeling.flatten import FLAT
from packtrain.modeling.unpad import unpad

PAD, EXACT = 0, 1e-6
LENGTHS = (7, 3, 19, 12)
HEADS: dict[str, Any] = {
    "causal": transformers.AutoModelForCausalLM,
    "masked": transformers.AutoModelForMaskedLM,
    "sequence": transformers.AutoModelForSequenceClassification,
    "token": transformers.AutoModelForTokenClassification,
    "answers": transformers.AutoModelForQuestionAnswering,
    "backbone": transformers.AutoModel,
}


def headed(architecture: str, head: str, **fields: Any) -> PreTrainedModel:
    """Makes a tiny model with this head, in eval mode, the same at every call."""
    config = tiny_model(architecture).config
    for name, value in {"pad_token_id": PAD, "num_labels": 2 if head == "answers" else 3, **fields}.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = HEADS[head].from_config(config)
        enlarge(model)
    return model.eval()


def ragged(head: str = "causal", *, left: bool = False, lengths: tuple[int, ...] = LENGTHS) -> dict[str, Tensor]:
    """Makes a padded batch `[B, T]` with labels for this head; the first token of a row has none."""
    generator, width = torch.Generator().manual_seed(0), max(lengths)
    ids = torch.full((len(lengths), width), PAD)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, length in enumerate(lengths):
        columns = slice(width - length, width) if left else slice(0, length)
        ids[row, columns] = torch.randint(5, 110, (length,), generator=generator)
        mask[row, columns] = 1
        labels[row, columns] = ids[row, columns]
        labels[row, columns.start] = -100
    batch = {"input_ids": ids, "attention_mask": mask}
    if head == "backbone":
        return batch
    if head == "answers":
        return batch | {"start_positions": mask.argmax(1), "end_positions": mask.argmax(1)}
    if head == "sequence":
        return batch | {"labels": torch.arange(len(lengths)) % 3}
    return batch | {"labels": torch.where(labels >= 0, labels % 3, labels) if head == "token" else labels}


def given(model: nn.Module, batch: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """Returns by name what a model gives for a batch: outputs (of real tokens), hidden states, gradients of every weight.

    The gradients are those of the loss or, without labels, of fixed random weights times all outputs.
    """
    model.zero_grad()
    options = {"output_hidden_states": True} | options
    output, real = model(**batch, **options), batch["attention_mask"].bool()
    found = {name: part for name, part in output.items() if torch.is_tensor(part)}
    found |= {f"hidden {layer}": part for layer, part in enumerate(output.get("hidden_states") or ())}
    found = {name: part[real] if part.shape[:2] == real.shape else part for name, part in found.items()}
    loss = output.get("loss")
    if loss is None:
        generator = torch.Generator().manual_seed(1)
        parts = [part for name, part in found.items() if not name.startswith("hidden")]
        loss = sum((part * torch.randn(part.shape, generator=generator)).sum() for part in parts)
    loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    found = {name: part.detach().clone() for name, part in found.items()}
    return found | {
        f"gradient {name.replace('base_model.model.', '')}": part.clone() for name, part in gradients.items()
    }


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Returns the largest difference relative to the largest entry: of each output, and of all gradients together."""
    assert one.keys() == other.keys(), one.keys() ^ other.keys()
    steepest = max((float(part.abs().max()) for name, part in one.items() if name.startswith("gradient")), default=0.0)
    shares = [0.0]
    for name, part in one.items():
        assert part.shape == other[name].shape, name
        if part.numel():
            scale = steepest if name.startswith("gradient") else float(part.abs().max())
            shares.append(float((part - other[name]).abs().max()) / (scale or 1.0))
    return max(shares)


class Count:
    """Counts calls of a module that are flat."""

    def __init__(self) -> None:
        self.flat = 0

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.flat += kwargs.get(FLAT) is not None


def flat_calls(model: nn.Module, module: str, batch: dict[str, Any], **options: Any) -> int:
    """Returns how often a module ran flat for a batch."""
    count = Count()
    handle = model.get_submodule(module).register_forward_pre_hook(count, with_kwargs=True)
    model(**batch, **options)
    handle.remove()
    return count.flat


class Leak:
    """A hook behind that of `unpad` that tells attention of one document only."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        true = kwargs[FLAT]
        whole = true[[0, -1]]
        whole._packtrain_rows = true._packtrain_rows  # type: ignore[attr-defined]
        longest = int(whole[-1])
        offsets = {FLAT: whole, "cu_seq_lens_k": whole, "max_length_q": longest, "max_length_k": longest}
        return args, kwargs | offsets


def difference(model: PreTrainedModel, batch: dict[str, Any], **options: Any) -> float:
    """Returns how far a model that is unpadded for the while is from itself; asserts that it ran flat."""
    padded = given(model, batch, **options)
    with unpad(model) as unpadding:
        assert flat_calls(model, unpadding.modules[0], batch) == 1
        return apart(padded, given(model, batch, **options))
