"""Sampling from a masked-diffusion model: start from masks, write the surest tokens first.

LLaDA's sampler (Nie et al., arXiv:2502.09992, section 2.4 and `generate.py`), with Dream's measures of certainty
(arXiv:2508.15487). The canvas is cut into blocks, written from left to right; within a block every step predicts all
masked tokens and keeps the surest, as many as the schedule says:

    step   canvas, one block of 6, 3 steps      tokens that stay
    0      M M M M M M
    1      M M c M M E                          the 2 surest
    2      a M c d M E                          the next 2; written tokens are never changed
    3      a b c d e E

What a model is stays outside: `denoise` calls a function for logits. `generation` brings that function for models of
transformers, the study `results/rainbow` for exact posteriors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from packtrain.errors import PacktrainError

Predict = Callable[[Tensor, Tensor, int, int], Tensor]
Remasking = Literal["low_confidence", "random", "margin", "entropy"]
EndTokenPolicy = Literal["none", "suppress_logits", "suppress_confidence", "ban_pad"]
SUPPRESSED = -1e30  # below every measure of certainty, and above the -inf of what is no candidate


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The settings of the sampler.

    Attributes:
        steps: of the whole canvas, shared evenly by the blocks; at most one per token is of use.
        block_length: None for the whole canvas at once.
        remasking: what a token's certainty is: probability of the chosen token (`low_confidence`), `random`, lead
            over the second best (`margin`), or negative entropy (`entropy`).
        temperature: of the choice of tokens, by Gumbel noise in float64; 0 takes the likeliest.
        cfg_scale: classifier-free guidance against the masked prompt; doubles the cost.
        end_token_ids: an answer ends before the first of these, and early stop waits for it.
        pad_token_ids: the tail's other tokens.
        end_token_policy: `none`; `suppress_logits`: end tokens are never chosen; `suppress_confidence`: positions
            that chose an end or a pad are written last in their block; `ban_pad`: pad tokens are never chosen, and
            count in how sure a token is, so that positions that are all but certainly padding are written last (see
            `certainty_of`).
        early_stop: stop with a row when its first end token and all before it are written; nothing before an end
            can change any more, so the answer is the same, and `Samples.evaluations` what it took. With a temperature
            or `random` the answers are other draws of the same kind.

    Raises:
        PacktrainError: a `remasking` or `end_token_policy` that is none of these.
    """

    steps: int = 128
    block_length: int | None = None
    remasking: Remasking = "low_confidence"
    temperature: float = 0.0
    cfg_scale: float = 0.0
    end_token_ids: tuple[int, ...] = ()
    pad_token_ids: tuple[int, ...] = ()
    end_token_policy: EndTokenPolicy = "none"
    early_stop: bool = False

    def __post_init__(self):
        for key, known in (("remasking", get_args(Remasking)), ("end_token_policy", get_args(EndTokenPolicy))):
            if getattr(self, key) not in known:
                fix = f"choose one of {', '.join(known)}"
                raise PacktrainError("is not a valid choice", key=key, value=getattr(self, key), fix=fix)

    def blocks(self, canvas_length: int) -> tuple[int, int, int]:
        """Returns (blocks, tokens per block, steps per block). Raises PacktrainError where they don't come out even."""
        length = self.block_length or canvas_length
        if canvas_length % length:
            what = f"must divide the canvas of {canvas_length} tokens"
            raise PacktrainError(what, key="block_length", value=length, fix="choose a divisor, or another length")
        blocks = canvas_length // length
        if self.steps % blocks or self.steps < blocks:
            what = f"must be a multiple of the {blocks} blocks"
            raise PacktrainError(
                what, key="steps", value=self.steps, fix="choose the same number of steps for every block"
            )
        return blocks, length, self.steps // blocks


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Canvases as they were written.

    Attributes:
        tokens: int64 `[B, G]`, masks where early stop left them.
        unmasked_at: int64 `[B, G]`, the step, from 0, in which a token was written; -1 for never.
        evaluations: int64 `[B]`, forward passes of the model for each row (two per step with guidance).
        end_token_ids: as sampled with.
    """

    tokens: Tensor
    unmasked_at: Tensor
    evaluations: Tensor
    end_token_ids: tuple[int, ...] = field(default=())

    def lengths(self) -> Tensor:
        """Returns int64 `[B]`, tokens before the first end token; the canvas where there is none."""
        return first_end(self.tokens, self.end_token_ids)

    def answers(self) -> list[list[int]]:
        """Returns the tokens before the first end token of each row."""
        lengths = self.lengths().tolist()
        return [row[:length] for row, length in zip(self.tokens.tolist(), lengths, strict=True)]


@torch.no_grad()
def denoise(
    predict: Predict,
    canvas: Tensor,
    sampling: Sampling,
    *,
    mask_token_id: int,
    generator: torch.Generator | None = None,
) -> Samples:
    """Writes every mask of `canvas`.

    The mask is no token to write, so it is never chosen. LLaDA's code leaves that to the model: a mask that it chooses
    counts as written and stays one.

    Args:
        predict: `(rows int64 [R], their canvases int64 [R, G], start, stop) -> logits [R, stop - start, V]`.
        canvas: int64 `[B, G]`, usually all masks.
        sampling: how.
        mask_token_id: what a mask is.
        generator: of temperature and `random`; torch's global one by default.
    """
    canvas = canvas.clone()
    unmasked_at = torch.full_like(canvas, -1)
    evaluations = torch.zeros(len(canvas), dtype=torch.int64, device=canvas.device)
    blocks, length, steps = sampling.blocks(canvas.shape[1])
    rows = torch.arange(len(canvas), device=canvas.device)  # [R], still to be written
    for block in range(blocks):
        here = slice(block * length, (block + 1) * length)
        quota = share_evenly((canvas[:, here] == mask_token_id).sum(dim=1), steps)  # [B, steps]
        for step in range(steps):
            if not len(rows):
                break
            logits = predict(rows, canvas[rows], here.start, here.stop)  # [R, length, V]
            evaluations[rows] += 2 if sampling.cfg_scale else 1
            tokens, certainty = choose(logits, sampling, mask_token_id, generator)  # [R, length] each
            masked = canvas[rows, here] == mask_token_id
            written = surest(certainty.masked_fill(~masked, -torch.inf), quota[rows, step]) & masked
            canvas[rows, here] = torch.where(written, tokens, canvas[rows, here])
            unmasked_at[rows, here] = torch.where(written, block * steps + step, unmasked_at[rows, here])
            if sampling.early_stop:
                rows = rows[~is_finished(canvas[rows], sampling.end_token_ids, mask_token_id)]
    return Samples(
        tokens=canvas, unmasked_at=unmasked_at, evaluations=evaluations, end_token_ids=sampling.end_token_ids
    )


def choose(
    logits: Tensor, sampling: Sampling, mask_token_id: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Chooses the token of each position, int64 `[R, L]`, never a mask, and says how sure it is, float64 `[R, L]`."""
    logits = logits.to(torch.float64, copy=True)
    logits[..., mask_token_id : mask_token_id + 1] = -torch.inf  # nothing, where it is beyond the vocabulary
    if sampling.end_token_policy == "suppress_logits":
        logits[..., list(sampling.end_token_ids)] = -torch.inf
    banned = list(sampling.pad_token_ids) if sampling.end_token_policy == "ban_pad" else []
    noisy = add_gumbel_noise(logits, sampling.temperature, generator)
    tokens = noisy.index_fill(-1, noisy.new_tensor(banned, dtype=torch.int64), -torch.inf).argmax(dim=-1)
    certainty = certainty_of(logits, tokens, sampling.remasking, generator, banned=banned)
    if sampling.end_token_policy == "suppress_confidence":
        ends = torch.isin(tokens, tokens.new_tensor([*sampling.end_token_ids, *sampling.pad_token_ids]))
        certainty = certainty.masked_fill(ends, SUPPRESSED)
    return tokens, certainty


def add_gumbel_noise(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """Returns logits whose argmax is a draw from softmax(logits / temperature).

    LLaDA's `exp(logits) / (-log u)^temperature`, in logarithms; float64, as low precision distorts the draw
    (Zheng et al., arXiv:2409.02908).
    """
    if temperature == 0:
        return logits
    noise = torch.rand(logits.shape, dtype=torch.float64, device=logits.device, generator=generator)
    return logits - temperature * torch.log(-torch.log(noise))


def certainty_of(
    logits: Tensor,
    tokens: Tensor,
    remasking: str,
    generator: torch.Generator | None,
    *,
    banned: Sequence[int] = (),
) -> Tensor:
    """Returns how sure each token is, float64 `[R, L]`; see `Sampling.remasking`.

    Args:
        logits: of all tokens, `[R, L, V]`.
        tokens: the chosen ones, `[R, L]`.
        banned: tokens that were no choice. They keep their share of the probability, so that what is chosen where one of
            them belongs is unsure: the code of VoidPadding (arXiv:2606.17999) measures a token's probability so for
            LLaDA. Lead and entropy are ours: p(first) - p(second) of the allowed, and their mean log p.
    """
    if remasking == "random":
        return torch.rand(tokens.shape, dtype=torch.float64, device=tokens.device, generator=generator)
    probabilities = logits.softmax(dim=-1)  # [R, L, V]
    probabilities[..., list(banned)] = 0.0
    if remasking == "low_confidence":
        return probabilities.gather(-1, tokens[..., None])[..., 0]
    if remasking == "margin":
        best, second = probabilities.topk(2, dim=-1).values.unbind(-1)
        return best - second
    assert remasking == "entropy"
    allowed = probabilities / probabilities.sum(dim=-1, keepdim=True)
    certainty = torch.xlogy(allowed, probabilities).sum(dim=-1)
    return certainty.nan_to_num(nan=SUPPRESSED)  # where nothing is possible but the banned


def surest(certainty: Tensor, count: Tensor) -> Tensor:
    """Returns bool `[R, L]`: the `count` `[R]` highest of each row; the leftmost of equals, on every device."""
    order = certainty.argsort(dim=-1, descending=True, stable=True)
    return order.argsort(dim=-1) < count[:, None]  # the inverse of an order is each one's rank


def share_evenly(total: Tensor, steps: int) -> Tensor:
    """Shares `[B]` tokens out over `[B, steps]`: 5 tokens in 3 steps are 2, 2, 1 (LLaDA's `get_num_transfer_tokens`)."""
    step = torch.arange(steps, device=total.device)
    return total[:, None] // steps + (step < total[:, None] % steps)


def first_end(tokens: Tensor, end_token_ids: Sequence[int]) -> Tensor:
    """Returns int64 `[B]`, the position of the first end token of each row; the width where there is none."""
    ends = torch.isin(tokens, tokens.new_tensor(list(end_token_ids)))
    return torch.where(ends.any(dim=1), ends.int().argmax(dim=1), tokens.shape[1])


def is_finished(canvas: Tensor, end_token_ids: Sequence[int], mask_token_id: int) -> Tensor:
    """Returns bool `[R]`: whether an end token is written, and everything before it."""
    first_mask = first_end(canvas, [mask_token_id])
    return first_end(canvas, end_token_ids) < first_mask
