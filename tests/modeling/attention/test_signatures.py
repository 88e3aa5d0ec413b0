"""The calls of CUDA's branches fit the kernels of the releases that people have: traced without a device or the packages.

Tensors are shapes only (`FakeTensorMode`), on the CPU, as a build of torch without CUDA takes no others; the choice of the
kernel is asked as for tensors of the same shape and dtype on a card. Signatures are recorded in `signatures.py`; that of
the installed torch is looked at itself.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen as torch_varlen

from packtrain.modeling.attention import kernels, traced
from packtrain.modeling.attention.kernels import Documents, Pattern, attend
from packtrain.modeling.attention.varlen import NAME
from tests.modeling.attention.signatures import SIGNATURES, SOURCES, stand_in
from tests.modeling.attention.test_traced import flat, random_documents
from tests.tiny import tiny_model

LENGTHS = (5, 7, 20)
PATTERNS = {
    "causal": Pattern(scaling=0.2),
    "both ways": Pattern(scaling=0.2, causal=False),
    "window": Pattern(scaling=0.2, window=6),
    "window both ways": Pattern(scaling=0.2, causal=False, window=6),
}
SIZES = {"plain": (4, 4, 32, 32), "grouped heads": (4, 2, 32, 32), "odd and narrow": (4, 2, 20, 12)}  # H, Hkv, D, Dv
Calls = list[dict[str, Any]]


def parameters(function: Callable) -> list[tuple[str, Any, Any]]:
    """Name, kind and default of each parameter; annotations differ in spelling."""
    return [(each.name, each.kind, each.default) for each in inspect.signature(function).parameters.values()]


@pytest.fixture(params=SIGNATURES)
def release(request) -> str:
    return request.param


@pytest.fixture
def planted(release: str, monkeypatch) -> Iterator[Calls]:
    """A card with the release's function, which notes what it is given; arguments that don't fit raise TypeError."""
    function, calls = SIGNATURES[release], []

    def noted(*args, **kwargs) -> Tensor:
        calls.append(inspect.signature(function).bind(*args, **kwargs).arguments)
        return function(*args, **kwargs)

    noted.__signature__ = inspect.signature(function)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    if release.startswith("torch"):
        monkeypatch.setitem(sys.modules, "flash_attn", None)
        monkeypatch.setattr(torch_varlen, "varlen_attn", noted)
    else:
        module = ModuleType("flash_attn")
        module.flash_attn_varlen_func = noted
        monkeypatch.setitem(sys.modules, "flash_attn", module)
    forget()
    choose = kernels.fused_kernel
    as_on_a_card = lambda query, value, pattern: choose(on_cuda(query), on_cuda(value), pattern)  # noqa: E731
    for module in (kernels, traced):
        monkeypatch.setattr(module, "fused_kernel", as_on_a_card)
    yield calls
    monkeypatch.undo()
    forget()


def on_cuda(states: Tensor) -> SimpleNamespace:
    """What the choice of a kernel asks of a tensor, on a card."""
    return SimpleNamespace(device=torch.device("cuda"), dtype=states.dtype, shape=states.shape)


def forget() -> None:
    """What is installed is looked up once per process."""
    kernels._has_flash_attn.cache_clear()
    kernels.torch_varlen_parameters.cache_clear()


def shapes_only(heads: int, kv_heads: int, dim: int, value_dim: int) -> tuple[list[Tensor], Documents]:
    """query, key and value `[1, H, T, D]` in bfloat16, and their documents."""
    tokens = sum(LENGTHS)
    shapes = [(1, tokens, heads, dim), (1, tokens, kv_heads, dim), (1, tokens, kv_heads, value_dim)]
    states = [torch.empty(shape, dtype=torch.bfloat16, requires_grad=True).transpose(1, 2) for shape in shapes]
    offsets = torch.empty(len(LENGTHS) + 1, dtype=torch.int32)
    return states, Documents(bounds=(0, 5, 12, 32), device=torch.device("cpu"), offsets=offsets)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_a_call_fits(release: str, planted: Calls, pattern: Pattern, sizes: tuple):
    """The choice of the kernel included: it is asked of the device, the dtype and what is installed."""
    with FakeTensorMode():
        states, documents = shapes_only(*sizes)
        output = attend(*states, documents, pattern)
        assert output.shape == (1, sum(LENGTHS), sizes[0], sizes[3])
        assert [each.shape for each in torch.autograd.grad(output.sum(), states)] == [each.shape for each in states]
    (call,) = planted
    query, key, value, starts, other_starts, longest, other_longest = list(call.values())[:7]
    width = -(-sizes[2] // 8) * 8
    assert query.shape == (sum(LENGTHS), sizes[0], width) and key.shape == value.shape
    assert all(x.is_contiguous() and x.dtype == torch.bfloat16 for x in (query, key, value))
    assert starts is other_starts is documents.cu_seq_lens and starts.dtype == torch.int32
    assert longest == other_longest == 20 and type(longest) is int
    assert call.get("scale", call.get("softmax_scale")) == 0.2
    grouped = sizes[0] != sizes[1]
    repeated = release == "torch 2.11"  # it takes as many keys as queries only
    assert key.shape[1] == (sizes[0] if repeated else sizes[1])
    assert call.get("enable_gqa", grouped) is grouped
    left = -1 if pattern.window is None else 5
    right = 0 if pattern.causal else left
    if release == "flash-attn 2.8":
        assert call["causal"] is pattern.causal and call["dropout_p"] == call["softcap"] == 0.0
        right = right if pattern.window is not None or not pattern.causal else -1  # `causal` says it
    assert call["window_size"] == (left, right)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_model_calls_it_with_the_offsets_of_the_batch(release: str, planted: Calls, family: str):
    """Every layer once, under autocast as in training, without a read back to the host."""
    batch = flat(random_documents(list(LENGTHS)))
    left_out = ("labels", "loss_weights", "example_ids", "supervised_index")
    with FakeTensorMode(allow_non_fake_inputs=False) as mode, torch.no_grad():
        model = tiny_model(family, attn_implementation=NAME)
        inputs = {
            key: mode.from_tensor(x) if torch.is_tensor(x) else x for key, x in batch.items() if key not in left_out
        }
        inputs["document_bounds"].offsets = inputs["cu_seq_lens_q"]  # a card's own can't be compared, and are not
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(**inputs, use_cache=False)
    assert len(planted) == model.config.num_hidden_layers
    for call in planted:
        assert list(call.values())[3] is inputs["cu_seq_lens_q"]


def test_gradients_flow_through_the_call(release: str, planted: Calls, monkeypatch):
    """On the CPU, where gradients of fake tensors can be had; control: a stand-in that gives none."""
    way = kernels.attend_flash_attn if release == "flash-attn 2.8" else kernels.attend_torch_varlen
    documents = Documents(bounds=(0, 5, 12), device=torch.device("cpu"))
    for stops in (False, True):
        states = [torch.randn(1, heads, 12, 20, requires_grad=True) for heads in (4, 2, 2)]
        if stops:
            monkeypatch.setitem(stand_in.__globals__, "stand_in", lambda q, k, v, scale: (q * scale).detach())
        output = way(*states, documents, Pattern(scaling=0.2))
        assert output.requires_grad is not stops
        if not stops:
            output.sum().backward()
            assert all(each.grad is not None and each.grad.abs().sum() > 0 for each in states)


@pytest.mark.parametrize("release", ["torch 2.11"], indirect=True)
def test_an_argument_that_the_release_lacks_is_noticed(planted: Calls, monkeypatch):
    """Control: calls made for torch 2.13 don't fit torch 2.11."""
    monkeypatch.setattr(kernels, "torch_varlen_takes", lambda parameter: True)
    with FakeTensorMode():
        states, documents = shapes_only(4, 2, 32, 32)
        with pytest.raises(TypeError, match="enable_gqa"):
            attend(*states, documents, Pattern(scaling=0.2))
    assert planted == []


def test_the_installed_torch_is_the_recorded_one():
    """Its own function, where its release is among the recorded ones; and in any case the calls fit it."""
    release = "torch " + ".".join(torch.__version__.split(".")[:2])
    if release not in SIGNATURES:
        pytest.skip(f"{release} is not recorded; recorded: {', '.join(SIGNATURES)}")
    assert parameters(torch_varlen.varlen_attn) == parameters(SIGNATURES[release]), SOURCES[release]
    others = [name for name in SIGNATURES if name != release]
    assert all(parameters(torch_varlen.varlen_attn) != parameters(SIGNATURES[name]) for name in others), "control"


@pytest.mark.skipif(not kernels.has_flash_attn(), reason="flash-attn is not installed")
def test_the_installed_flash_attn_is_the_recorded_one():
    from flash_attn import flash_attn_varlen_func

    assert parameters(flash_attn_varlen_func) == parameters(SIGNATURES["flash-attn 2.8"])


def test_every_signature_has_its_source():
    assert SOURCES.keys() == SIGNATURES.keys()
