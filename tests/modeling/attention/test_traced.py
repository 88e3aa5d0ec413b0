"""Attention inside a graph of `torch.compile`: one graph for any documents, the same outputs and gradients, no host read."""

from __future__ import annotations

import sys
from pathlib import Path
from traceback import extract_stack
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from packtrain.errors import ModelError
from packtrain.modeling.attention import kernels, traced
from packtrain.modeling.attention.kernels import Pattern, attend, causal_mask
from packtrain.modeling.attention.traced import attend_traced
from packtrain.modeling.attention.varlen import NAME, register
from packtrain.objectives.causal import causal_lm_losses
from packtrain.packing.collator import PackCollator
from tests.modeling.attention.reference import documents
from tests.tiny import random_documents, tiny_model

register()
flat = PackCollator(layout="flat")
# the same 40 tokens in the same number of documents; then other shapes
BATCHES = [[5, 7, 20, 8], [9, 9, 14, 8], [13, 2, 20, 5]], [[30, 2], [3, 3, 50, 4, 9]]


@pytest.fixture(autouse=True)
def no_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch_of(lengths: list[int], seed: int = 0) -> dict:
    return flat(random_documents(lengths, seed=seed))


def layers_of(model: nn.Module) -> nn.ModuleList:
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def compiled(family: str, backend, **changes) -> nn.Module:
    """A tiny model whose layers are whole graphs; a break in one raises."""
    model = tiny_model(family, attn_implementation=NAME, **changes)
    for layer in layers_of(model):
        layer.compile(fullgraph=True, backend=backend)
    return model


def loss_and_gradients(model: nn.Module, batch: dict) -> list[Tensor]:
    model.zero_grad()
    loss = causal_lm_losses(model, batch).weighted_sum()
    loss.backward()
    return [loss.detach(), *(weight.grad.clone() for weight in model.parameters() if weight.grad is not None)]


SLOW = [pytest.mark.ci, pytest.mark.slow]


@pytest.mark.parametrize(
    ("family", "kinds", "checkpointing"),
    [
        ("llama", 1, True),
        pytest.param("llama", 1, False, marks=SLOW),
        pytest.param("qwen3", 1, False, marks=SLOW),
        pytest.param("gpt2", 1, False, marks=SLOW),
        pytest.param("gemma2", 2, False, marks=SLOW),
        pytest.param("gemma2", 2, True, marks=SLOW),
    ],
)
def test_a_layer_is_one_graph_for_all_documents(family: str, kinds: int, checkpointing: bool):
    counter = CompileCounter()
    model, plain = compiled(family, counter).train(), tiny_model(family, attn_implementation=NAME).train()
    if checkpointing:
        for each in (model, plain):
            each.gradient_checkpointing_enable({"use_reentrant": False})
    same, others = BATCHES
    for number, lengths in enumerate(same + others):
        batch = batch_of(lengths, seed=number)
        for ours, expected in zip(loss_and_gradients(model, batch), loss_and_gradients(plain, batch), strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)
        if number < len(same):
            assert counter.frame_count == kinds, f"documents of {lengths} were compiled anew"
    assert counter.frame_count > kinds, "control: another number of tokens needs another graph"


def test_documents_are_isolated_in_a_graph():
    model = compiled("llama", "eager")
    one, other = batch_of([9, 12]), batch_of([9, 12])
    other["input_ids"][0, :9] = 60
    hidden = [model.model(**{k: v for k, v in b.items() if k != "labels"}, use_cache=False)[0][0] for b in (one, other)]
    assert torch.equal(hidden[0][9:], hidden[1][9:])
    assert not torch.equal(hidden[0][:9], hidden[1][:9]), "control: the changed document"


PATTERNS = {
    "plain": {},
    "window": {"window": 4},
    "both ways": {"causal": False},
    "softcap": {"softcap": 0.7},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0])},
    "bias": {"bias": torch.randn(1, 4, 21, 21, generator=torch.Generator().manual_seed(1))},
    "mask": {"mask": causal_mask(21, 5, torch.device("cpu"))[None, None]},
}


@pytest.mark.parametrize("changes", PATTERNS.values(), ids=PATTERNS)
def test_the_operator_is_attention(changes: dict):
    """Outputs, and the gradients of all that can have one, through the compiler's own autograd."""
    lengths, generator = [3, 11, 7], torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, heads, 21, 8, generator=generator).requires_grad_() for heads in (4, 2, 2)]
    learnt = [changes[name].clone().requires_grad_() for name in ("bias", "sinks") if name in changes]
    changes = changes | dict(zip([name for name in ("bias", "sinks") if name in changes], learnt, strict=True))
    pattern = Pattern(scaling=0.3, **changes)
    offsets = torch.tensor([0, 3, 14, 14, 21], dtype=torch.int32)  # an empty document is none
    step = torch.compile(attend_traced, fullgraph=True, backend="aot_eager")
    ours, expected = step(*inputs, offsets, {}, pattern), attend(*inputs, documents(lengths), pattern)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)
    weight = torch.randn(expected.shape, generator=generator)
    grads = [torch.autograd.grad((out * weight).sum(), inputs + learnt) for out in (ours, expected)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    leaked = attend(*inputs, documents([21]), pattern)
    assert not torch.allclose(leaked, expected, atol=1e-3), "control: one document"


def test_the_operator_passes_the_checks_of_torch():
    inputs = [torch.randn(1, heads, 6, 8, requires_grad=True) for heads in (4, 2, 2)]
    offsets = torch.tensor([0, 2, 6], dtype=torch.int32)
    torch.library.opcheck(traced.attend_opaque, (*inputs, offsets, None, None, None, None, 0.3, True, None, None, 0.0))


def test_dropout_is_drawn_anew_and_the_same_backward():
    """The gradient belongs to the output: with one-hot values, dropped weights have none."""
    torch.manual_seed(0)
    query, key = torch.zeros(1, 1, 6, 8), torch.zeros(1, 1, 6, 8)
    value = torch.eye(6, 8)[None, None].requires_grad_()
    offsets = torch.tensor([0, 2, 6], dtype=torch.int32)
    step = torch.compile(attend_traced, fullgraph=True, backend="aot_eager")
    seen = []
    for _ in range(3):
        output = step(query, key, value, offsets, {}, Pattern(scaling=1.0, dropout=0.5))[0, :, 0]  # [T, D]: the weights
        (gradient,) = torch.autograd.grad(output.sum(), value)
        torch.testing.assert_close(gradient[0, 0, :, 0], output.sum(dim=0)[:6])
        seen.append(output.detach())
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def test_offsets_that_do_not_fit_are_refused_in_a_graph():
    states = torch.randn(1, 4, 6, 8)
    step = torch.compile(attend_traced, fullgraph=True, backend="eager")
    with pytest.raises(ModelError, match="documents end at 9 of 6 tokens"):
        step(states, states, states, torch.tensor([0, 2, 9], dtype=torch.int32), {}, Pattern(scaling=0.3))


# ------------------------------------------------------------------------------- what CUDA runs, without a device


def _as_flash_attn(monkeypatch) -> list[tuple]:
    """A module with the signature of flash-attn 2's varlen function, which notes what it is given."""
    calls: list[tuple] = []

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        calls.append((cu_seqlens_q, max_seqlen_q, q.shape))
        groups = q.shape[1] // k.shape[1]
        return q * softmax_scale + (k + v).repeat_interleave(groups, dim=1)

    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return calls


def fake_step(family: str, change=lambda batch: batch) -> tuple[Tensor, dict]:
    """Loss and gradients of tensors that are shapes only: whoever wants to know a number of one raises."""
    batch = change(batch_of([5, 7, 20]))
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        model = tiny_model(family, attn_implementation=NAME).train()
        on_device = {key: mode.from_tensor(value) if torch.is_tensor(value) else value for key, value in batch.items()}
        if "document_bounds" in on_device:  # a device's own offsets can't be compared, and are not
            on_device["document_bounds"].offsets = on_device["cu_seq_lens_q"]
        loss = causal_lm_losses(model, on_device).weighted_sum()
        loss.backward()
        assert all(weight.grad is not None for weight in model.parameters())
    return loss, on_device


KERNELS = {"flash-attn": kernels.attend_flash_attn, "torch": kernels.attend_torch_varlen}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("name", [*KERNELS, "one call per document"])
def test_a_step_reads_nothing_back(name: str, family: str, monkeypatch):
    """Forward, loss and backward with the kernels that CUDA has, where a read raises."""
    calls = _as_flash_attn(monkeypatch)
    for module in (kernels, traced):
        monkeypatch.setattr(module, "fused_kernel", lambda *given: KERNELS.get(name))
    loss, batch = fake_step(family)
    assert loss.shape == ()
    assert bool(calls) == (name == "flash-attn")
    for offsets, longest, shape in calls:
        assert offsets is batch["cu_seq_lens_q"], "the batch's own offsets, not a copy sent anew for every layer"
        assert (longest, shape[0]) == (20, 32)
    without = {"document_bounds", "supervised_index"}
    for left_out in without:
        with pytest.raises(Exception, match="nonzero|_local_scalar_dense|item") as caught:
            fake_step(family, lambda batch, key=left_out: {k: v for k, v in batch.items() if k != key})
        assert "DataDependent" in type(caught.value).__name__ or "DynamicOutput" in type(caught.value).__name__


class HostReads(TorchDispatchMode):
    """Notes which functions read a value back from a tensor, or wait for its numbers to know a shape."""

    READS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal)

    def __init__(self) -> None:
        super().__init__()
        self.readers: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in self.READS:
            ours = [frame for frame in extract_stack()[:-1] if "/torch/" not in frame.filename]
            self.readers.append(f"{Path(ours[-1].filename).stem}.{ours[-1].name}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("family", "masks"), [("llama", 1), ("gemma2", 2)])
def test_the_only_read_of_a_step_is_that_of_the_mask_builder(family: str, masks: int):
    """transformers looks whether positions are packed, once per kind of mask (not at fake tensors, so not above)."""
    model, batch = tiny_model(family, attn_implementation=NAME).train(), batch_of([5, 7, 20])
    loss_and_gradients(model, batch)  # whatever is looked at once
    with HostReads() as reads:
        loss_and_gradients(model, batch)
    assert reads.readers == ["masking_utils.find_packed_sequence_indices"] * masks
    without = {key: value for key, value in batch.items() if key != "supervised_index"}
    with HostReads() as reads:
        loss_and_gradients(model, without)
    assert len(reads.readers) > masks, "control: positions that have to be found"
