"""The loss of tokens without their logits: chunks of positions, each with its gradient, in the forward pass.

Whole logits of 16,384 positions and 128,256 tokens are 8 GiB in float32, and a backward pass holds them several times.
Here `CHUNK_BYTES` of them exist at once:

    for chunk [C, D] of hidden [N, D]:  logits [C, V] -> nll [C];  (softmax - target) * weight [C, V] -> gradients

What remains of a chunk is the gradient of `sum(weights * nll)` with respect to `hidden` `[N, D]` and, added up, to the
parameters of the head. The backward pass multiplies both by the gradient that arrives, a scalar: loss scaling, the
denominator of the step and gradient accumulation come in there. The work is that of whole logits: three matrix products.

What a model does to its logits after the head (Gemma 2's softcapping, Granite's and Cohere's scale) is a `Transform`:
`scale * x`, or `cap * tanh(scale * x / cap)`. `fit_transform` finds it from what the model makes of known logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

CHUNK_BYTES = 2**27  # of float32 logits at once: 261 positions of 128,256 tokens; larger chunks are not faster on a CPU
LARGEST, SMALLEST = 1e6, 1e-6  # of the logits that a transform is found from: far beyond any cap, and next to 0
FLOAT16_SIZE = 16.0  # of weights in float16 products, about what a gradient scaler settles at; smaller ones vanish


def rows_of_chunk(vocabulary: int) -> int:
    """Returns how many positions are computed at once."""
    return max(1, CHUNK_BYTES // (4 * vocabulary))


@dataclass(frozen=True)
class Transform:
    """What happens to logits after the head: `scale * x`, with a cap `cap * tanh(scale * x / cap)`; in float32."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Transforms float logits `[..., V]`."""
        if self.cap is None:
            return logits if self.scale == 1 else logits * self.scale
        return torch.tanh(logits * (self.scale / self.cap)) * self.cap

    def apply_(self, logits: Tensor) -> Tensor | None:
        """Transforms float logits in place; returns the derivative `[..., V]`, or None where it is `scale` everywhere."""
        if self.cap is None:
            if self.scale != 1:
                logits.mul_(self.scale)
            return None
        logits.mul_(self.scale / self.cap).tanh_()
        derivative = logits.square().neg_().add_(1).mul_(self.scale)
        logits.mul_(self.cap)
        return derivative


def known_logits(vocabulary: int, device: torch.device) -> Tensor:
    """Returns the logits that a transform is found from: float32 `[V]` of both signs, from `SMALLEST` to `LARGEST`."""
    half = torch.logspace(math.log10(SMALLEST), math.log10(LARGEST), max(vocabulary // 2, 2), dtype=torch.float64)
    return torch.cat([half, -half, half])[:vocabulary].to(device, torch.float32)


def fit_transform(known: Tensor, found: Tensor) -> Transform | None:
    """Returns the transform that takes `known` logits `[V]` to `found` `[V]`, or None where there is none of its kinds."""
    small, large = int(known.abs().argmin()), int(known.abs().argmax())
    if found.shape != known.shape or not found.isfinite().all():
        return None
    scale = float(found[small].double() / known[small].double())
    if abs(scale - 1) < 1e-6:
        scale = 1.0  # tanh near 0 is rounded
    limit = float(found[large].double() / known[large].double().sign())
    straight = abs(limit - scale * LARGEST) <= 1e-5 * abs(limit)
    transform = Transform(scale) if straight else Transform(scale, limit)
    return transform if scale and limit and same(transform(known), found, 1e-5) else None


def same(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Returns whether two float tensors of one shape agree elementwise, relative to their size where it is above 1."""
    return one.shape == other.shape and torch.allclose(one.float(), other.float(), rtol=tolerance, atol=tolerance)


class Scores(NamedTuple):
    """What a pass over chunks leaves: nll float32 `[N]`, and the gradients of `sum(weights * nll)` that were needed."""

    nll: Tensor
    hidden: Tensor | None
    parameters: list[Tensor | None]


class ChunkedLoss(torch.autograd.Function):
    """Computes `sum(weights * nll)` (float32 scalar), nll (float32 `[N]`, no gradient), and a carrier of zeros `[1, N, 1]`.

    The carrier goes on through the model in the place of logits, so that the gradient comes back by the model's output:
    engines gather weights for the backward pass there. Its own gradient counts for nothing.

    Args of `apply`: hidden `[N, D]`, targets int64 `[N]`, weights float32 `[N]`, the head, its `Transform`, positions per
    chunk, and `trained_parameters(head)`.
    """

    @staticmethod
    def forward(ctx: Any, hidden, targets, weights, head, transform, rows, *parameters):
        needs = ctx.needs_input_grad
        scores = score(head, hidden, targets, weights, transform, rows, hidden_gradient=needs[0], parameters=parameters)
        ctx.dtypes = [hidden.dtype, *(parameter.dtype for parameter in parameters)]
        ctx.save_for_backward(scores.hidden, *scores.parameters)
        ctx.mark_non_differentiable(scores.nll)
        ctx.set_materialize_grads(False)
        return (scores.nll * weights).sum(), scores.nll, hidden.new_zeros(1, len(hidden), 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient, _nll, _carrier):
        if gradient is None:
            return (None,) * (6 + len(ctx.dtypes) - 1)
        scaled = [
            None if saved is None else saved.mul_(gradient.to(saved.dtype)).to(dtype)  # in place: it can be large
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (scaled[0], None, None, None, None, None, *scaled[1:])


class Through(torch.autograd.Function):
    """Returns `total` as it is, with a gradient of zeros for `output`: whatever waits for the output's gradient gets one."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, output: Tensor) -> Tensor:
        ctx.like = (output.shape, output.dtype)
        return total.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):
        shape, dtype = ctx.like
        return gradient, gradient.new_zeros(shape, dtype=dtype)


def trained_parameters(head: Any) -> list[Tensor]:
    """Returns the weights of the head that get gradients; those of a plain one may be views of a sharded parameter."""
    weights = (head.weight, head.bias) if is_plain(head) else head.parameters()
    return [weight for weight in weights if weight is not None and weight.requires_grad]


def is_plain(head: nn.Module) -> bool:
    """Returns whether the head is a matrix product and nothing else, whose gradient needs no graph."""
    weights = [tensor for tensor in (getattr(head, "weight", None), getattr(head, "bias", None)) if tensor is not None]
    return (
        type(head) is nn.Linear
        and "forward" not in vars(head)  # wrapped, as for weights that are kept elsewhere
        and all(type(tensor) in (Tensor, nn.Parameter) for tensor in weights)  # not quantised, not sharded
    )


def score(
    head: Any,
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor,
    transform: Transform,
    rows: int,
    *,
    hidden_gradient: bool = False,
    parameters: Sequence[Tensor] = (),
) -> Scores:
    """Computes nll and gradients of `sum(weights * nll)`, `rows` positions at a time; see `ChunkedLoss`.

    Args:
        hidden_gradient: whether to compute that of `hidden`.
        parameters: of the head, whose gradients are computed, summed over chunks in float32.
    """
    hidden, plain = hidden.detach(), is_plain(head)
    computing = _computing_dtype(hidden, head.weight) if plain else None
    nll = hidden.new_empty(len(hidden), dtype=torch.float32)
    of_hidden = torch.empty_like(hidden, dtype=_sum_dtype(hidden.dtype, computing)) if hidden_gradient else None
    sums = [torch.zeros_like(one, dtype=torch.float32 if one.element_size() < 4 else one.dtype) for one in parameters]
    if computing is None:
        score_chunk = _by_autograd(head, transform, hidden_gradient, parameters, sums)
    else:
        factor = _float16_factor(weights) if computing == torch.float16 else None
        buffer = hidden.new_empty(min(rows, len(hidden)), len(head.weight), dtype=computing)
        score_chunk = _by_products(head, transform, hidden_gradient, parameters, sums, buffer, factor)
    for start in range(0, len(hidden), rows):
        chunk = slice(start, start + rows)
        nll[chunk], gradient = score_chunk(hidden[chunk], targets[chunk], weights[chunk])
        if of_hidden is not None and gradient is not None:
            of_hidden[chunk] = gradient
    parts: list[Tensor | None] = [
        total.to(_sum_dtype(one.dtype, computing)) for one, total in zip(parameters, sums, strict=True)
    ]
    return Scores(nll, of_hidden, parts)


ScoreChunk = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""Takes a chunk of hidden `[C, D]`, targets and weights `[C]`; returns nll `[C]` and the gradient of hidden `[C, D]`."""


def _by_products(
    head: Any,
    transform: Transform,
    hidden_gradient: bool,
    parameters: Sequence[Tensor],
    sums: Sequence[Tensor],
    buffer: Tensor,
    factor: Tensor | None,
) -> ScoreChunk:
    """Scores by matrix products in `buffer` `[rows, V]`, which all chunks share, and adds gradients to `sums`."""
    weight = head.weight.detach().to(buffer.dtype)  # [V, D]
    bias = None if head.bias is None else head.bias.detach().to(buffer.dtype)
    exact = buffer if buffer.dtype.itemsize >= 4 else torch.empty_like(buffer, dtype=torch.float32)
    of_weight = next((s for s, one in zip(sums, parameters, strict=True) if one is head.weight), None)
    of_bias = next((s for s, one in zip(sums, parameters, strict=True) if one is head.bias), None)

    def unscaled(gradient: Tensor) -> Tensor:
        return gradient if factor is None else gradient.float() / factor

    @torch.no_grad()
    def score_chunk(hidden: Tensor, target: Tensor, weights: Tensor) -> tuple[Tensor, Tensor | None]:
        part, target, size = hidden.to(buffer.dtype), target.unsqueeze(1), len(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            if bias is None:
                torch.mm(part, weight.t(), out=buffer[:size])
            else:
                torch.addmm(bias, part, weight.t(), out=buffer[:size])
            logits = buffer[:size] if exact is buffer else exact[:size].copy_(buffer[:size])  # [C, V]
            derivative = transform.apply_(logits)
            # softmax and log-softmax, in place
            logits.sub_(logits.amax(dim=1, keepdim=True))
            of_target = logits.gather(1, target)
            total = logits.exp_().sum(dim=1, keepdim=True)
            nll = (total.log() - of_target).squeeze(1)
            if not (hidden_gradient or parameters):
                return nll, None
            weighted = weights.to(logits.dtype).unsqueeze(1) * (1 if factor is None else factor)  # [C, 1]
            logits.mul_(weighted / total)
            logits.scatter_add_(1, target, -weighted)
            if derivative is not None:
                logits.mul_(derivative)
            elif transform.scale != 1:
                logits.mul_(transform.scale)
            gradient = logits if exact is buffer else buffer[:size].copy_(logits)  # [C, V], of the head's logits
            if of_weight is not None and of_weight.dtype == buffer.dtype:
                of_weight.addmm_(gradient.t(), part)
            elif of_weight is not None:
                of_weight.add_(unscaled(gradient.t() @ part))
            if of_bias is not None:
                of_bias.add_(unscaled(logits.sum(dim=0)))
            return nll, unscaled(gradient @ weight) if hidden_gradient else None

    return score_chunk


def _by_autograd(
    head: nn.Module, transform: Transform, hidden_gradient: bool, parameters: Sequence[Tensor], sums: Sequence[Tensor]
) -> ScoreChunk:
    """Scores with a graph per chunk, for heads that are more than a matrix product, and adds gradients to `sums`."""

    def score_chunk(hidden: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor | None]:
        part = hidden.detach().requires_grad_(hidden_gradient)
        wanted = [part, *parameters] if hidden_gradient else [*parameters]
        with torch.set_grad_enabled(bool(wanted)):
            losses = cross_entropy(transform(head.forward(part).float()), targets, reduction="none")
            total = (losses * weights).sum()
        found = list(torch.autograd.grad(total, wanted, allow_unused=True)) if wanted else []
        gradient = found.pop(0) if hidden_gradient else None
        for one, more in zip(sums, found, strict=True):
            if more is not None:
                one += more
        return losses.detach(), gradient

    return score_chunk


def _computing_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Returns the dtype that `torch.nn.functional.linear` computes in."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _sum_dtype(stored: torch.dtype, computing: torch.dtype | None) -> torch.dtype:
    """Returns the dtype in which a gradient waits for its factor: its own; for float16 float32, whose range it may need."""
    return torch.float32 if torch.float16 in (stored, computing) else stored


def _float16_factor(weights: Tensor) -> Tensor:
    """Returns the factor that brings weights `[N]` to a size that float16 products keep."""
    return FLOAT16_SIZE / weights.float().abs().mean().clamp_min(1e-12)


def cannot_be_chunked(head: nn.Module) -> str | None:
    """Returns why a head cannot be run in chunks, or None; for whoever has no gradients to compare yet."""
    if is_plain(head):
        return None
    if any(hasattr(weight, "ds_id") for weight in head.parameters()):
        return "the head has an adapter, whose weights ZeRO-3 gathers only while it is called"
    held = (value for module in head.modules() for value in vars(module).values())
    if any(isinstance(value, Tensor) and value.requires_grad for value in held):
        return "the head has an adapter, and its weights are sharded"
    return None


def check_gradients(head: nn.Module, hidden: Tensor) -> str | None:
    """Compares loss and gradients of this head in chunks with those of whole logits; returns what differs, or None.

    Args:
        hidden: a few rows, `[K, D]`; targets and weights are made up, and a softcap is part of both computations.
    """
    count, parameters, transform = len(hidden), trained_parameters(head), Transform(0.9, 20.0)
    with torch.enable_grad():
        leaf = hidden.detach().clone().requires_grad_()
        logits = transform(head.forward(leaf).float())
        targets = torch.arange(count, device=hidden.device) * 7 % logits.shape[-1]
        weights = torch.linspace(0.5, 1.5, count, device=hidden.device)
        nll = cross_entropy(logits, targets, reduction="none")
        gradients = _of((nll * weights).sum() * 3, leaf, parameters)
        total, ours, _ = ChunkedLoss.apply(leaf, targets, weights, head, transform, max(1, count // 2 - 1), *parameters)
        found = _of(total * 3, leaf, parameters)
    half = _computing_dtype(hidden, hidden).itemsize < 4
    tolerance = 0.03 if half else 1e-4
    if not same(ours, nll, tolerance):
        return "losses"
    for one, other in zip(gradients, found, strict=True):
        size = one.float().norm()
        if float((one.float() - other.float()).norm()) > tolerance * max(float(size), 1e-6):
            return "gradients"
    return None


def _of(loss: Tensor, leaf: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    inputs = [leaf, *parameters]
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [torch.zeros_like(one) if grad is None else grad for one, grad in zip(inputs, found, strict=True)]
