"""Documents that share a prefix: what each would compute alone, in attention and in whole models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from packtrain.errors import ModelError
from packtrain.modeling.attention import kernels, prefixes
from packtrain.modeling.attention.kernels import Pattern, attend_each
from packtrain.modeling.attention.prefixes import KEY, SharedPrefixes, attend_shared
from packtrain.modeling.attention.varlen import NAME, register
from tests.modeling.attention.reference import documents
from tests.tiny import tiny_model

register()
# tokens of every document, and how many it shares with the one before it: pairs, three answers, and turns
LENGTHS, PREFIXES = [12, 6, 9, 1, 14, 3, 2, 5, 4, 6, 3], [0, 7, 0, 8, 8, 0, 2, 0, 3, 6, 12]
PATTERNS = {
    "causal": {},
    "window": {"window": 5},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": torch.linspace(-1, 1, 4, dtype=torch.float64)},
    "window and sinks": {"window": 3, "sinks": torch.linspace(-1, 1, 4, dtype=torch.float64)},
}


def alone(states: Tensor, lengths, prefixes) -> list[Tensor]:
    """Every document of a row with its prefix written out: `[1, H, T, D]` -> one tensor per document."""
    found = [states[:, :, :0]]
    for own, prefix in zip(states.split(lengths, dim=2), prefixes, strict=True):
        assert found[-1].shape[2] >= prefix
        found.append(torch.cat([found[-1][:, :, :prefix], own], dim=2))
    return found[1:]


def leaking() -> SharedPrefixes:
    """Prefixes that go on to the end of the document before, so that answers see other answers."""
    whole, found = 0, []
    for length, prefix in zip(LENGTHS, PREFIXES, strict=True):
        found.append(whole if prefix else 0)
        whole = found[-1] + length
    return SharedPrefixes(LENGTHS, found)


def shared_call(shared: SharedPrefixes, **changes) -> dict:
    return {KEY: shared, **shared.entries(), **changes}


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("heads", [4, 2])
def test_attention_is_that_of_documents_written_out(name, heads):
    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    shapes = [(4, 16), (heads, 16), (heads, 16)]
    inputs = [torch.randn(1, h, tokens, d, dtype=torch.float64, requires_grad=True) for h, d in shapes]
    pattern, shared = Pattern(scaling=0.25, **PATTERNS[name]), SharedPrefixes(LENGTHS, PREFIXES)
    found = attend_shared(*inputs, documents(LENGTHS), shared_call(shared), pattern)

    parts = [alone(states, LENGTHS, PREFIXES) for states in inputs]
    whole = [part.shape[2] for part in parts[0]]
    rows = [torch.cat(part, dim=2) for part in parts]
    output = attend_each(*rows, documents(whole), pattern)
    expected = torch.cat([one[:, -n:] for one, n in zip(output.split(whole, dim=1), LENGTHS, strict=True)], dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)

    leaks = attend_shared(*inputs, documents(LENGTHS), shared_call(leaking()), pattern)
    if pattern.window is None:
        assert (leaks - expected).abs().max() > 1e-2


def gathered(query: Tensor, key: Tensor, value: Tensor, documents, pattern: Pattern, *, keys) -> Tensor:
    """A varlen kernel in plain operations: offsets of queries and keys, the causal mask aligned at their ends."""
    outputs = []
    bounds = [documents.cu_seq_lens.tolist(), keys.cu_seq_lens.tolist()]
    for number in range(len(bounds[0]) - 1):
        q = query[:, :, bounds[0][number] : bounds[0][number + 1]]
        k, v = (states[:, :, bounds[1][number] : bounds[1][number + 1]] for states in (key, value))
        scores = q @ k.transpose(2, 3) * pattern.scaling
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        outputs.append((scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v).transpose(1, 2))
    assert max(keys.cu_seq_lens.diff()) == keys.longest
    return torch.cat(outputs, dim=1)


def test_kernels_get_the_keys_of_every_document(monkeypatch):
    torch.manual_seed(0)
    inputs = [torch.randn(1, 4, sum(LENGTHS), 16, dtype=torch.float64) for _ in range(3)]
    call = inputs + [documents(LENGTHS), shared_call(SharedPrefixes(LENGTHS, PREFIXES)), Pattern(scaling=0.25)]
    expected = attend_shared(*call)
    monkeypatch.setattr(prefixes, "fused_kernel", lambda *given: gathered)
    torch.testing.assert_close(attend_shared(*call), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", [kernels.attend_torch_varlen])
def test_nothing_is_read_back_for_a_kernel(kernel, monkeypatch):
    """Shapes only, where a read raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(prefixes, "fused_kernel", lambda *given: kernel)
    shared = SharedPrefixes(LENGTHS, PREFIXES)
    with FakeTensorMode() as mode:
        call = {key: mode.from_tensor(v) if torch.is_tensor(v) else v for key, v in shared_call(shared).items()}
        inputs = [torch.empty(1, 4, sum(LENGTHS), 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        output = attend_shared(*inputs, documents(LENGTHS), call, Pattern(scaling=0.25))
        output.sum().backward()
    assert output.shape == (1, sum(LENGTHS), 4, 16)


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        (Pattern(scaling=1.0, causal=False), "attention both ways"),
        (Pattern(scaling=1.0, mask=torch.ones(1, 1, 44, 44, dtype=torch.bool)), "a mask of its own"),
        (Pattern(scaling=1.0, bias=torch.zeros(1, 4, 44, 44)), "a position bias"),
    ],
)
def test_other_attention_is_refused(pattern, what):
    states = torch.zeros(1, 4, sum(LENGTHS), 8)
    with pytest.raises(ModelError, match=f"a shared prefix in a layer with {what}"):
        attend_shared(
            states, states, states, documents(LENGTHS), shared_call(SharedPrefixes(LENGTHS, PREFIXES)), pattern
        )


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2"])
def test_models_compute_the_same_in_float64(family):
    """Gemma 2 with a window of 8 and softcaps, GPT-2 with learnt positions."""
    model = tiny_model(family, attn_implementation=NAME).double()
    torch.manual_seed(1)
    shared = SharedPrefixes(LENGTHS, PREFIXES)
    ids = torch.randint(3, 60, (1, sum(LENGTHS)))
    positions = [torch.arange(n) + prefix for n, prefix in zip(LENGTHS, PREFIXES, strict=True)]
    offsets = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    call = shared_call(shared, cu_seq_lens_q=offsets, max_length_q=max(LENGTHS))
    found = model(input_ids=ids, position_ids=torch.cat(positions)[None], use_cache=False, **call).logits

    whole = alone(ids[:, None, :, None], LENGTHS, PREFIXES)
    parts = [model(input_ids=one[:, 0, :, 0], use_cache=False).logits for one in whole]
    expected = torch.cat([part[:, -n:] for part, n in zip(parts, LENGTHS, strict=True)], dim=1)
    exact = 1e-12 if family == "gpt2" else 1e-6  # the norms of the others compute in float32, whatever they are given
    assert (found - expected).norm() <= exact * expected.norm()
    upstream = torch.randn_like(found)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for one, other in zip(
        torch.autograd.grad(found, weights, upstream), torch.autograd.grad(expected, weights, upstream), strict=True
    ):
        assert (one - other).norm() <= exact * other.norm()
