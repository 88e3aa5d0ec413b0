"""Masked diffusion: learn to restore masked answers, whatever the layout.

    loss = 1/documents * sum over documents of  1/canvas * sum over masked tokens of  -log p(token | rest) / p

which is LLaDA's fine-tuning loss (Nie et al., arXiv:2502.09992, eq. 5 and its reference code): one noise level p per
document, the tail masked, supervised and counted in the canvas like the answer, the prompt never masked. Noise and
weights are in the batch already (see `noise`); what is left to do here is a weighted cross-entropy.

    model = make_bidirectional(model)                       # any decoder of transformers
    masking = Masking(mask_token_id=tokenizer.mask_token_id)
    PackTrainer(
        model, args, plan=plan,
        train_examples=TailedExamples(examples, tail, canvas, seed=seed),
        collator=NoisingCollator(masking, tail, seed=seed, layout=plan.layout, pad_token_id=0),
        loss=masked_diffusion(masking),
    )
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from packtrain.data.formats import IGNORED
from packtrain.errors import ModelError
from packtrain.objectives.logits import output_head, token_losses
from packtrain.objectives.masked_diffusion.generation import generate
from packtrain.objectives.masked_diffusion.noise import Masking
from packtrain.objectives.masked_diffusion.sampling import Samples, Sampling
from packtrain.objectives.masked_diffusion.tails import CONTENT, EOS, TAIL
from packtrain.objectives.objective import Loss, TokenLosses

__all__ = [
    "Masking", "Samples", "Sampling", "generate", "make_bidirectional", "masked_diffusion", "sums_by_part",
]  # fmt: skip
PARTS = {"content": CONTENT, "eos": EOS, "tail": TAIL}


def masked_diffusion(masking: Masking) -> Loss:
    """Makes the loss for batches of a `NoisingCollator` with the same `masking`."""
    denominator = count_documents if masking.norm == "sequence" else count_canvas
    return Loss(
        losses=partial(masked_losses, shift=masking.shift),
        head=output_head,
        denominator=denominator,
        sums=lambda losses, batch: {
            "loss": torch.stack([losses.weighted_sum().detach().double(), denominator(batch)]),
            **{f"loss_{part}": pair for part, pair in sums_by_part(losses, batch).items()},
        },
    )


def masked_losses(
    model: nn.Module, batch: Mapping[str, torch.Tensor], *, head: nn.Module | None = None, shift: bool = False
) -> TokenLosses:
    """Scores every masked token; only these get logits.

    Args:
        model, head: see `logits_at`; the model attends both ways.
        batch: of a `NoisingCollator`, padded or flat.
        shift: read a token's prediction one position before it.
    """
    index = batch["supervised_index"]  # [N]
    left_out = {"parts", "has_padding"}
    if not batch["has_padding"]:
        left_out.add("attention_mask")  # no padding: a document to a row needs no mask, and LLaDA and Dream read none
    inputs = {key: value for key, value in batch.items() if key not in left_out}
    return token_losses(model, inputs, index, index - int(shift), head=head)


def count_documents(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Counts documents, a float64 scalar; one of padding only counts as none."""
    return (batch["example_ids"] >= 0).sum().double()


def count_canvas(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Counts the tokens of all canvases, masked or not, a float64 scalar."""
    return (batch["labels"] != IGNORED).sum().double()


def sums_by_part(losses: TokenLosses, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns `{"content", "eos", "tail"}` -> float64 `[2]`: sums over a part of weight x nll, and of weights, where masked.

    Sums over micro-batches and ranks, divided at the end, give the weighted mean nll of each part. A tail that is
    learnt long before the content is what early termination grows from, so these are worth a look each.
    """
    part = batch["parts"].flatten()[losses.index]  # [N]
    weights = losses.weights.double()
    both = torch.stack([weights * losses.nll.detach().double(), weights])  # [2, N]
    return {name: (both * (part == number)).sum(dim=1) for name, number in PARTS.items()}


def make_bidirectional(model: nn.Module) -> nn.Module:
    """Makes a decoder of transformers attend both ways, in place, and returns it.

    `config.is_causal = False` is transformers' own switch for its masks (`create_causal_mask` then builds
    bidirectional ones) and is saved with the model; the attention modules' flag is what the kernels read. Models that
    bring their own code (LLaDA, Dream) attend both ways by themselves and are left as they are.

    Raises:
        ModelError: an architecture without such attention (Mamba, RWKV, models with ALiBi).
    """
    if type(model).__module__.startswith("transformers_modules."):
        return model
    attentions = [module for module in model.modules() if hasattr(module, "is_causal")]
    if not attentions:
        what = "has no attention that can be made bidirectional"
        fix = "use a decoder whose attention goes through transformers' AttentionInterface (Llama, Qwen, Gemma ...)"
        raise ModelError(what, key="objective.name", value=type(model).__name__, fix=fix)
    config: Any = model.config
    for owner in (config, config.get_text_config(), *attentions):
        setattr(owner, "is_causal", False)  # noqa: B010 (no field of all of them)
    return model
