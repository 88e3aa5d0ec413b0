"""Logits where they are needed, and nowhere else; and losses without logits.

The LM head runs only where a token is predicted. With the usual `[B, T]` of prompts and padding most rows of
the `[B*T, vocabulary]` logits are thrown away by `ignore_index`; here they are never computed. The choice is made
by a forward pre-hook on the head (`get_output_embeddings()`), so whatever a model does to its logits after
the head (softcapping, scaling) still happens, in every layout and for every architecture that calls its head:

    hidden [B, T, D]  ->  hidden at index [1, N, D]  ->  head  ->  logits [1, N, V]

For a loss (`token_losses`) even these are too many where N is large. A forward hook then gives, in the place of logits,
what `chunks.ChunkedLoss` has computed from the hidden states while the head was being called: only there does ZeRO-3
have its weights. Once per model a forward pass without gradients shows whether that is the same loss: what the model
does to logits after the head must be a scale or a softcap, and gradients of the head must agree. Where it isn't, or
where one chunk is enough, logits are whole.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from packtrain.errors import ModelError
from packtrain.objectives import chunks
from packtrain.objectives.objective import TokenLosses

logger = logging.getLogger(__name__)
NOT_MODEL_INPUTS = (
    "labels",
    "loss_weights",
    "example_ids",
    "supervised_index",
    "predictors",
    "pairs",
    "reference_logps",
)


def logits_at(
    model: nn.Module, batch: Mapping[str, object], index: torch.Tensor, *, head: nn.Module | None = None
) -> torch.Tensor:
    """Computes logits `[N, V]` at the flat positions `index` `[N]` (row-major over `[B, T]`), from one forward pass.

    Args:
        model: a causal LM of transformers, bare or wrapped (peft, DDP, DeepSpeed, FSDP).
        batch: the keys of a packtrain batch; those the model's forward does not take are left out.
        head: the module that turns hidden states into logits; by default the model's
            `get_output_embeddings()`. Wrapped models need it from the unwrapped one.

    Raises:
        ModelError: the model has no output embeddings, or does not call them in its forward.
    """
    with _head_sees_only(head or output_head(model), index) as seen:
        logits = model(**_model_inputs(model, batch)).logits  # [1, N, V]
    if not seen:
        raise ModelError(
            "the model does not call its output embeddings in forward, so logits cannot be limited to "
            "supervised positions",
            value=type(model).__name__,
            fix="train this architecture with the stock transformers.Trainer and packtrain's collator",
        )
    assert logits.shape[:-1] == (1, len(index)), f"logits {tuple(logits.shape)} for {len(index)} positions"
    return logits[0]


def token_losses(
    model: nn.Module,
    batch: Mapping[str, torch.Tensor],
    index: torch.Tensor,
    predictors: torch.Tensor,
    *,
    head: nn.Module | None = None,
) -> TokenLosses:
    """Scores the tokens at `index`, each by the logits at its entry of `predictors`, from one forward pass.

    Args:
        model, head: see `logits_at`.
        batch: `labels` int64 `[B, T]`, `loss_weights` float32 `[B, T]`, and the model's inputs.
        index: int64 `[N]`, flat positions of the targets (row-major over `[B, T]`).
        predictors: int64 `[N]`, flat positions whose logits predict them: one before where a position predicts the next
            token, the same where it predicts its own.

    Raises:
        ModelError: the model has no output embeddings, or does not call them in its forward.
    """
    head = head or output_head(model)
    targets, weights = batch["labels"].flatten()[index], batch["loss_weights"].flatten()[index]
    way = _way_of(model, batch, head, len(index))
    if way is None or way.transform is None or len(index) <= chunks.rows_of_chunk(way.vocabulary):
        nll = cross_entropy(logits_at(model, batch, predictors, head=head).float(), targets, reduction="none")
        return TokenLosses(nll=nll, weights=weights, index=index)
    nll, total = _losses_in_chunks(model, batch, predictors, targets, weights, head, way)
    return TokenLosses(nll=nll, weights=weights, index=index, total=total)


def function_of_losses(
    model: nn.Module,
    batch: Mapping[str, Any],
    predictors: Tensor,
    targets: Tensor,
    function: Callable[[Tensor], tuple[Tensor, Any]],
    *,
    head: nn.Module | None = None,
) -> tuple[Tensor, Any]:
    """Computes losses that are any function of the nll of tokens, such as of sums over answers, from one forward pass.

    In chunks, nll comes first, without a graph; `function` is differentiated on it, and its gradient is what each token
    weighs in a second pass over the same hidden states: a third more work in the head, and no logits that last.

    Args:
        model, head: see `logits_at`.
        predictors: int64 `[N]`, flat positions whose logits predict the targets.
        targets: int64 `[N]`, token ids.
        function: nll float32 `[N]` -> (a scalar whose gradient is asked for, anything of it to be returned).

    Returns:
        The scalar, and what `function` returns with it.
    """
    head = head or output_head(model)
    way = _way_of(model, batch, head, len(predictors))
    if way is None or way.transform is None or len(predictors) <= chunks.rows_of_chunk(way.vocabulary):
        logits = logits_at(model, batch, predictors, head=head).float()
        return function(cross_entropy(logits, targets, reduction="none"))
    transform, rows = way.transform, chunks.rows_of_chunk(way.vocabulary)
    found: list[tuple[Tensor, Any]] = []

    def losses(hidden: Tensor) -> Tensor:  # [N, D] -> [1, N, 1]
        none = torch.zeros(len(targets), device=hidden.device)
        nll = chunks.score(head, hidden, targets, none, transform, rows).nll
        if not torch.is_grad_enabled():
            found.append(function(nll))
            return hidden.new_zeros(1, len(hidden), 1)
        with torch.enable_grad():
            value, extra = function(nll.requires_grad_())
            (weights,) = torch.autograd.grad(value, nll)
        given = (hidden, targets, weights, head, transform, rows)
        total, _, carrier = chunks.ChunkedLoss.apply(*given, *chunks.trained_parameters(head))
        found.append((value.detach() + (total - total.detach()), extra))
        return carrier

    with _head_gives(head, predictors, losses):
        output = model(**_model_inputs(model, batch)).logits  # [1, N, 1]
    ((value, extra),) = found
    return chunks.Through.apply(value, output), extra


@torch.no_grad()
def map_logits(
    model: nn.Module,
    batch: Mapping[str, Any],
    predictors: Tensor,
    targets: Tensor,
    function: Callable[[Tensor, Tensor], Tensor],
    *,
    head: nn.Module | None = None,
) -> Tensor:
    """Computes any function of the logits of each token, chunk by chunk, without gradients, from one forward pass.

    Args:
        model, head: see `logits_at`.
        predictors: int64 `[N]`, flat positions whose logits predict the targets.
        targets: int64 `[N]`, token ids.
        function: (logits float32 `[C, V]`, targets `[C]`) -> `[C, K]`; it may overwrite the logits.

    Returns:
        What the function returns, `[N, K]`.
    """
    head = head or output_head(model)
    way = _way_of(model, batch, head, len(predictors))
    if way is None or way.transform is None or len(predictors) <= chunks.rows_of_chunk(way.vocabulary):
        return function(logits_at(model, batch, predictors, head=head).float(), targets)
    transform, rows = way.transform, chunks.rows_of_chunk(way.vocabulary)
    found: list[Tensor] = []

    def in_chunks(hidden: Tensor) -> Tensor:  # [N, D] -> [1, N, 1]
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            found.append(function(transform(head.forward(hidden[chunk]).float()), targets[chunk]))
        return hidden.new_zeros(1, len(hidden), 1)

    with _head_gives(head, predictors, in_chunks):
        model(**_model_inputs(model, batch))
    return torch.cat(found)


class Way(NamedTuple):
    """How losses of a head are computed: with this transform after it, or (None) from whole logits."""

    transform: chunks.Transform | None
    vocabulary: int = 0


_ways: WeakKeyDictionary[nn.Module, Way] = WeakKeyDictionary()


def computes_in_chunks(head: nn.Module) -> bool | None:
    """Returns whether losses of many tokens are computed in chunks; None before anything had to know."""
    way = _ways.get(head)
    return None if way is None else way.transform is not None


SAMPLED = 8  # positions whose logits and gradients are compared


def _way_of(model: nn.Module, batch: Mapping[str, Any], head: nn.Module, count: int) -> Way | None:
    """Returns how losses of `head` are computed, or None where `count` positions are too few to have to know it.

    Several ranks find it out together in their first forward pass, whose collective calls must be the same on all.
    """
    if (known := _ways.get(head)) is not None:
        return known
    vocabulary = getattr(head, "out_features", None)
    alone = not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1
    if alone and isinstance(vocabulary, int) and count <= chunks.rows_of_chunk(vocabulary):
        return None
    way = _ways[head] = _find_way(model, batch, head)
    return way


def _find_way(model: nn.Module, batch: Mapping[str, Any], head: nn.Module) -> Way:
    """Compares the loss in chunks with that of whole logits, in a forward pass without gradients; logs where they differ.

    The first positions of the batch are looked at, whether they are supervised or not.
    """
    device = batch["labels"].device
    index = torch.arange(min(SAMPLED, batch["labels"].numel()), device=device)
    sent: list[Tensor] = []
    refused: list[str] = []

    def whole_logits(hidden: Tensor) -> Tensor:  # [K, D] -> [1, K + 1, V]
        try:
            if why := chunks.cannot_be_chunked(head):
                refused.append(why)
            elif differing := chunks.check_gradients(head, hidden):
                refused.append(f"{differing} of the head differ in chunks")
        except RuntimeError as error:
            refused.append(f"{type(error).__name__}: {error}".splitlines()[0])
        logits = head.forward(hidden).float()
        sent.append(torch.cat([logits, chunks.known_logits(logits.shape[-1], logits.device).unsqueeze(0)]))
        return sent[-1].unsqueeze(0).clone()  # a model may change its logits in place

    devices = [] if device.type == "cpu" else [device]
    kind = "cuda" if device.type == "cpu" else device.type
    with torch.no_grad(), torch.random.fork_rng(devices, device_type=kind):
        with _head_gives(head, index, whole_logits) as seen:
            found = model(**_model_inputs(model, batch)).logits
    torch.clear_autocast_cache()  # weights that were cast without a gradient
    if len(seen) != 1:
        return Way(None)  # `logits_at` says why none, and adds up several
    (known,), found = sent, found[0]
    transform = chunks.fit_transform(known[-1], found[-1].float()) if found.shape == known.shape else None
    if transform is None or not chunks.same(transform(known), found, 1e-5):
        refused.append("what the model does to its logits after the head is neither a scale nor a softcap")
    if refused:
        logger.warning("losses are computed from whole logits, which takes more memory: %s", refused[0])
        return Way(None)
    return Way(transform, known.shape[-1])


def _losses_in_chunks(
    model: nn.Module,
    batch: Mapping[str, Any],
    index: Tensor,
    targets: Tensor,
    weights: Tensor,
    head: nn.Module,
    way: Way,
) -> tuple[Tensor, Tensor]:
    """Returns nll `[N]`, without gradient, and the scalar `sum(weights * nll)`, with it."""
    scored: list[tuple[Tensor, Tensor]] = []

    def losses(hidden: Tensor) -> Tensor:  # [N, D] -> [1, N, 1]
        given = (hidden, targets, weights, head, way.transform, chunks.rows_of_chunk(way.vocabulary))
        total, nll, carrier = chunks.ChunkedLoss.apply(*given, *chunks.trained_parameters(head))
        scored.append((nll, total))
        return carrier

    with _head_gives(head, index, losses):
        output = model(**_model_inputs(model, batch)).logits  # [1, N, 1]
    ((nll, total),) = scored
    return nll, chunks.Through.apply(total, output)


def head_outputs_at(
    model: nn.Module, batch: Mapping[str, object], index: torch.Tensor, *, head: nn.Module
) -> torch.Tensor:
    """Returns what `head` gives at the flat positions `index` `[N]`, `[N, C]`, from one forward pass.

    For models that pool what their head gives, which must see all of it; the pooled logits are not used.
    """
    seen: list[torch.Tensor] = []
    handle = head.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        model(**_model_inputs(model, batch))
    finally:
        handle.remove()
    return seen[-1].flatten(0, 1)[index]


def output_head(model: nn.Module) -> nn.Module:
    """Returns the module that maps hidden states to logits. Raises ModelError when the model names none."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if head is None:
        raise ModelError(
            "the model has no output embeddings, so it is not a causal language model packtrain can train",
            value=type(model).__name__,
            fix="load it with AutoModelForCausalLM",
        )
    return head


@contextmanager
def _head_sees_only(head: nn.Module, index: torch.Tensor) -> Iterator[list[bool]]:
    """Gives `head` `[1, N, D]` instead of `[B, T, D]` while open; yields a list that is no longer empty when it ran."""
    seen: list[bool] = []

    def keep_supervised(_module: nn.Module, args: tuple) -> tuple:
        hidden, *rest = args  # [B, T, D]
        seen.append(True)
        return (hidden.flatten(0, 1).index_select(0, index).unsqueeze(0), *rest)

    handle = head.register_forward_pre_hook(keep_supervised)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def _head_gives(head: nn.Module, index: Tensor, compute: Callable[[Tensor], Tensor]) -> Iterator[list[bool]]:
    """Makes the output of `head` `compute(hidden at index [N, D])` while open; yields a list with an entry for every call.

    The head itself runs on one position. The hooks run in the head's call, after an engine has gathered its weights and
    before they are released.
    """
    seen: list[bool] = []
    held: list[Tensor] = []

    def keep_one(_module: nn.Module, args: tuple) -> tuple:
        hidden, *rest = args  # [B, T, D]
        seen.append(True)
        held.append(hidden.flatten(0, 1).index_select(0, index))
        return (held[-1][:1].detach().unsqueeze(0), *rest)

    def replace(_module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return compute(held.pop())

    handles = [
        head.register_forward_pre_hook(torch.compiler.disable(keep_one)),
        head.register_forward_hook(torch.compiler.disable(replace), prepend=True),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _model_inputs(model: nn.Module, batch: Mapping[str, object]) -> dict[str, object]:
    """Returns the keys of `batch` that `model.forward` takes, and `use_cache=False` (a cache undoes isolation)."""
    inputs = {key: value for key, value in batch.items() if key not in NOT_MODEL_INPUTS}
    inputs["use_cache"] = False
    accepted = _accepted_inputs(type(_innermost(model)))
    return inputs if accepted is None else {key: inputs[key] for key in inputs if key in accepted}


def _innermost(model: nn.Module) -> nn.Module:
    """Returns the transformers model under torch.compile, peft, DDP and DeepSpeed wrappers, whose signature counts."""
    while True:
        compiled, adapted = getattr(model, "_orig_mod", None), getattr(model, "get_base_model", None)
        wrapped = getattr(model, "module", None)
        if isinstance(compiled, nn.Module):
            model = compiled
        elif adapted is not None:
            model = adapted()
        elif isinstance(wrapped, nn.Module):
            model = wrapped
        else:
            return model


@lru_cache
def _accepted_inputs(model_class: type[nn.Module]) -> frozenset[str] | None:
    """Returns the names that `model_class.forward` takes, or None when it takes any keyword."""
    parameters = inspect.signature(model_class.forward).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters)
