"""Attention over documents inside a graph of `torch.compile`.

A graph holds for all batches of one shape, so it can't know where documents begin. Two ways keep the numbers out of it:

- A varlen kernel on CUDA takes the offsets as a tensor on the device, and the graph calls it.
- Everything else is one custom operator, `packtrain::attend`, opaque to the compiler. It gets the offsets as a tensor too,
  from the host where the batch has them there, and reads them when it runs.

The operator computes its attention anew in the backward pass: what a loop over documents keeps for it has no fixed
number of tensors. Without `torch.compile` nothing of this is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from packtrain.modeling.attention.documents import bounds_from, check_fit
from packtrain.modeling.attention.kernels import Documents, OnDevice, Pattern, attend_each, fused_kernel


def attend_traced(
    query: Tensor, key: Tensor, value: Tensor, source: Tensor, kwargs: Mapping, pattern: Pattern
) -> Tensor:
    """Attends within every document alone, as `attend` does, without reading where they are while a graph is made.

    Args:
        query, key, value, pattern: as `attend` has them.
        source: what tells of the documents, see `bounds_from`.
        kwargs: the arguments of the attention function; a varlen kernel needs `cu_seq_lens_q` and `max_length_q`.

    Returns:
        `[1, T, H, Dv]`.
    """
    if torch.is_autocast_enabled(query.device.type):  # custom operators have no autocast rule
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    kernel = fused_kernel(query, value, pattern)
    if kernel is not None and kwargs.get("max_length_q") is not None:
        return kernel(query, key, value, OnDevice(kwargs["cu_seq_lens_q"], kwargs["max_length_q"]), pattern)
    # drawn in the graph, so that checkpointing and the backward pass draw the same
    seed = torch.randint(1 << 31, (1,), dtype=torch.int64, device="cpu") if pattern.dropout else None
    return attend_opaque(
        query, key, value, source, pattern.mask, pattern.bias, pattern.sinks, seed,
        pattern.scaling, pattern.causal, pattern.window, pattern.softcap, pattern.dropout,
    )  # fmt: skip


Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("packtrain::attend", mutates_args=())
def attend_opaque(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    source: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """Attends within every document alone; arguments as `attend_traced`, with the pattern in pieces."""
    pattern = Pattern(
        scaling=scaling, causal=causal, window=window, mask=mask, bias=bias, softcap=softcap, sinks=sinks, dropout=dropout
    )  # fmt: skip
    with _drawn_from(seed):
        return attend_each(query, key, value, _documents(source, query), pattern).contiguous()


@attend_opaque.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, value.shape[-1])


@torch.library.custom_op("packtrain::attend_backward", mutates_args=())
def attend_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    source: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> Five:
    """Returns the gradients of query, key, value, bias and sinks; empty for a bias or sinks that are not there."""
    documents, known = _documents(source, query), [tensor for tensor in (bias, sinks) if tensor is not None]

    def again(query: Tensor, key: Tensor, value: Tensor, *others: Tensor) -> Tensor:
        rest = iter(others)
        pattern = Pattern(
            scaling=scaling, causal=causal, window=window, mask=mask, softcap=softcap, dropout=dropout,
            bias=None if bias is None else next(rest), sinks=None if sinks is None else next(rest),
        )  # fmt: skip
        return attend_each(query, key, value, documents, pattern)

    with _drawn_from(seed):
        found: Any = torch.func.vjp(again, query, key, value, *known)
        grad_query, grad_key, grad_value, *others = (each.contiguous() for each in found[1](gradient))
    rest = iter(others)
    grad_bias, grad_sinks = (query.new_empty(0) if each is None else next(rest) for each in (bias, sinks))
    return grad_query, grad_key, grad_value, grad_bias, grad_sinks


@attend_backward.register_fake
def _(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    source: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    *rest: Any,
) -> Five:
    like = [torch.empty_like(each, memory_format=torch.contiguous_format) for each in (query, key, value)]
    others = [query.new_empty(0) if each is None else torch.empty_like(each) for each in (bias, sinks)]
    return like[0], like[1], like[2], others[0], others[1]


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.rest = inputs[8:]


def _backward(ctx: Any, gradient: Tensor) -> tuple:
    tensors = ctx.saved_tensors
    query, key, value, bias, sinks = torch.ops.packtrain.attend_backward(gradient, *tensors, *ctx.rest)
    bias = None if tensors[5] is None else bias
    sinks = None if tensors[6] is None else sinks
    return query, key, value, None, None, bias, sinks, None, *[None] * len(ctx.rest)


attend_opaque.register_autograd(_backward, setup_context=_keep)


def _documents(source: Tensor, query: Tensor) -> Documents:
    bounds = bounds_from(source)
    check_fit(bounds, query.shape[2])
    return Documents(bounds=bounds, device=query.device)


@contextmanager
def _drawn_from(seed: Tensor | None) -> Iterator[None]:
    """Draws dropout from a seed, int64 `[1]`, and leaves the random state as it was; None where nothing is drawn."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(int(seed))
        yield
