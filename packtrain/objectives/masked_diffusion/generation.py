"""Answers of a masked-diffusion model of transformers: prompts and canvases to batches, batches to logits.

    samples = generate(model, prompts, 128, Sampling(steps=128, end_token_ids=ends), mask_token_id=mask)
    samples.answers()                        # token ids before the end of each

The steps are those of `sampling`. Prompts of different lengths are written together: packed where the model attends by
`packtrain_varlen`, else those of one length at a time, since many diffusion models ignore masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from packtrain.errors import PacktrainError
from packtrain.modeling.attention.varlen import NAME
from packtrain.objectives.logits import logits_at
from packtrain.objectives.masked_diffusion.sampling import Samples, Sampling, denoise
from packtrain.recipe.sections import MAX_TOKENS


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    canvas_length: int,
    sampling: Sampling,
    *,
    mask_token_id: int,
    shift: bool = False,
    generator: torch.Generator | None = None,
    max_tokens: int = MAX_TOKENS,
) -> Samples:
    """Answers prompts of any lengths together.

    Args:
        model: bidirectional (see `make_bidirectional`). With `packtrain_varlen` prompts of all lengths share a forward
            pass; with any other attention only those of the same length do.
        prompts: token ids.
        canvas_length: tokens of every answer, end and tail included.
        sampling: how.
        shift: for models trained with `shift`: a token is predicted one position before it.
        generator: on the model's device.
        max_tokens: of one forward pass; more rows than fit are passed one after the other.
    """
    if any(len(prompt) == 0 for prompt in prompts) and shift:
        raise PacktrainError("a model that predicts the next token needs a prompt to begin from", key="prompts")
    device = next(model.parameters()).device
    asked = [torch.as_tensor(prompt, dtype=torch.int64, device=device) for prompt in prompts]

    def predict(rows: Tensor, canvases: Tensor, start: int, stop: int) -> Tensor:
        chosen = [asked[row] for row in rows.tolist()]
        at = (start, stop, shift)
        logits = _canvas_logits(model, chosen, canvases, *at, max_tokens)
        if sampling.cfg_scale:
            blind = [torch.full_like(prompt, mask_token_id) for prompt in chosen]
            without = _canvas_logits(model, blind, canvases, *at, max_tokens)
            logits = without + (sampling.cfg_scale + 1) * (logits - without)
        return logits

    was_training = model.training
    model.eval()
    canvas = torch.full((len(prompts), canvas_length), mask_token_id, device=device)
    samples = denoise(predict, canvas, sampling, mask_token_id=mask_token_id, generator=generator)
    model.train(was_training)
    return samples


def _canvas_logits(
    model: nn.Module, prompts: list[Tensor], canvases: Tensor, start: int, stop: int, shift: bool, max_tokens: int
) -> Tensor:
    """Computes logits of `canvases[:, start:stop]` behind their prompts, `[R, stop - start, V]`."""
    room, device = canvases.shape[1], canvases.device
    lengths = [len(prompt) + room for prompt in prompts]
    packed = getattr(model.config, "_attn_implementation", None) == NAME
    groups = _groups(lengths, max_tokens, packed=packed)
    parts = []
    for group in groups:
        ends = torch.tensor([lengths[row] for row in group], device=device).cumsum(0)  # [S]
        index = ends[:, None] + torch.arange(start, stop, device=device) - room - int(shift)  # [S, stop - start]
        batch = _batch_of([torch.cat([prompts[row], canvases[row]]) for row in group])
        parts.append(logits_at(model, batch, index.flatten()).view(*index.shape, -1))
    order = torch.tensor([row for group in groups for row in group], device=device)
    return torch.cat(parts)[order.argsort()]


def _groups(lengths: list[int], max_tokens: int, *, packed: bool) -> list[list[int]]:
    """Groups rows that share a forward pass: within `max_tokens`, and of one length unless they can be packed."""
    groups: list[list[int]] = []
    for row in range(len(lengths)) if packed else sorted(range(len(lengths)), key=lengths.__getitem__):
        group = groups[-1] if groups else None
        full = group is None or sum(lengths[other] for other in group) + lengths[row] > max_tokens
        if full or not (packed or lengths[group[0]] == lengths[row]):
            groups.append([])
        groups[-1].append(row)
    return groups


def _batch_of(documents: list[Tensor]) -> dict[str, object]:
    """Lays equally long documents out as plain rows, which any model takes; others flat, end to end."""
    lengths = [len(document) for document in documents]
    device = documents[0].device
    if len(set(lengths)) == 1:
        return {"input_ids": torch.stack(documents)}
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(device=device, dtype=torch.int32)
    return {
        "input_ids": torch.cat(documents)[None],
        "position_ids": torch.cat([torch.arange(length, device=device) for length in lengths])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
