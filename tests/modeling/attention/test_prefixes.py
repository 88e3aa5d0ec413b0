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
# the documents of each group, the first with the prefix, and the tokens of the prefix
GROUPS, PROMPTS = [[12, 6], [9, 1, 14], [3, 2], [5]], [7, 8, 2, 4]
PATTERNS = {
    "causal": {},
    "window": {"window": 5},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": torch.linspace(-1, 1, 4, dtype=torch.float64)},
    "window and sinks": {"window": 3, "sinks": torch.linspace(-1, 1, 4, dtype=torch.float64)},
}


def alone(states: Tensor, groups, prompts) -> list[Tensor]:
    """Every document of a row with its prefix written out: `[1, H, T, D]` -> one tensor per document."""
    pieces = iter(states.split([length for group in groups for length in group], dim=2))
    found = []
    for group, prompt in zip(groups, prompts, strict=True):
        first = next(pieces)
        found.append(first)
        found += [torch.cat([first[:, :, :prompt], next(pieces)], dim=2) for _ in group[1:]]
    return found


def shared_call(shared: SharedPrefixes, **changes) -> dict:
    return {KEY: shared, **shared.entries(), **changes}


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("heads", [4, 2])
def test_attention_is_that_of_documents_written_out(name, heads):
    torch.manual_seed(0)
    tokens = sum(map(sum, GROUPS))
    shapes = [(4, 16), (heads, 16), (heads, 16)]
    inputs = [torch.randn(1, h, tokens, d, dtype=torch.float64, requires_grad=True) for h, d in shapes]
    pattern, shared = Pattern(scaling=0.25, **PATTERNS[name]), SharedPrefixes(GROUPS, PROMPTS)
    lengths = [length for group in GROUPS for length in group]
    found = attend_shared(*inputs, documents(lengths), shared_call(shared), pattern)

    parts = [alone(states, GROUPS, PROMPTS) for states in inputs]
    whole = [part.shape[2] for part in parts[0]]
    rows = [torch.cat(part, dim=2) for part in parts]
    output = attend_each(*rows, documents(whole), pattern)
    expected = torch.cat([one[:, -n:] for one, n in zip(output.split(whole, dim=1), lengths, strict=True)], dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)

    other = SharedPrefixes(GROUPS, [group[0] for group in GROUPS])  # answers that see the one before them
    leaking = attend_shared(*inputs, documents(lengths), shared_call(other), pattern)
    if pattern.window is None:
        assert (leaking - expected).abs().max() > 1e-2


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
    inputs = [torch.randn(1, 4, sum(map(sum, GROUPS)), 16, dtype=torch.float64) for _ in range(3)]
    lengths = [length for group in GROUPS for length in group]
    call = inputs + [documents(lengths), shared_call(SharedPrefixes(GROUPS, PROMPTS)), Pattern(scaling=0.25)]
    expected = attend_shared(*call)
    monkeypatch.setattr(prefixes, "fused_kernel", lambda *given: gathered)
    torch.testing.assert_close(attend_shared(*call), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", [kernels.attend_torch_varlen])
def test_nothing_is_read_back_for_a_kernel(kernel, monkeypatch):
    """Shapes only, where a read raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(prefixes, "fused_kernel", lambda *given: kernel)
    shared = SharedPrefixes(GROUPS, PROMPTS)
    lengths = [length for group in GROUPS for length in group]
    with FakeTensorMode() as mode:
        call = {key: mode.from_tensor(v) if torch.is_tensor(v) else v for key, v in shared_call(shared).items()}
        inputs = [torch.empty(1, 4, sum(lengths), 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        output = attend_shared(*inputs, documents(lengths), call, Pattern(scaling=0.25))
        output.sum().backward()
    assert output.shape == (1, sum(lengths), 4, 16)


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        (Pattern(scaling=1.0, causal=False), "attention both ways"),
        (Pattern(scaling=1.0, mask=torch.ones(1, 1, 44, 44, dtype=torch.bool)), "a mask of its own"),
        (Pattern(scaling=1.0, bias=torch.zeros(1, 4, 44, 44)), "a position bias"),
    ],
)
def test_other_attention_is_refused(pattern, what):
    states = torch.zeros(1, 4, 52, 8)
    lengths = [length for group in GROUPS for length in group]
    with pytest.raises(ModelError, match=f"a shared prefix in a layer with {what}"):
        attend_shared(states, states, states, documents(lengths), shared_call(SharedPrefixes(GROUPS, PROMPTS)), pattern)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2"])
def test_models_compute_the_same_in_float64(family):
    """Gemma 2 with a window of 8 and softcaps, GPT-2 with learnt positions."""
    model = tiny_model(family, attn_implementation=NAME).double()
    torch.manual_seed(1)
    shared = SharedPrefixes(GROUPS, PROMPTS)
    ids = torch.randint(3, 60, (1, sum(map(sum, GROUPS))))
    lengths, positions = [n for group in GROUPS for n in group], []
    for group, prompt in zip(GROUPS, PROMPTS, strict=True):
        positions += [torch.arange(n) + (prompt if number else 0) for number, n in enumerate(group)]
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    call = shared_call(shared, cu_seq_lens_q=offsets, max_length_q=max(lengths))
    found = model(input_ids=ids, position_ids=torch.cat(positions)[None], use_cache=False, **call).logits

    whole = alone(ids[:, None, :, None], GROUPS, PROMPTS)
    parts = [model(input_ids=one[:, 0, :, 0], use_cache=False).logits for one in whole]
    expected = torch.cat([part[:, -n:] for part, n in zip(parts, lengths, strict=True)], dim=1)
    exact = 1e-12 if family == "gpt2" else 1e-6  # the norms of the others compute in float32, whatever they are given
    assert (found - expected).norm() <= exact * expected.norm()
    upstream = torch.randn_like(found)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for one, other in zip(
        torch.autograd.grad(found, weights, upstream), torch.autograd.grad(expected, weights, upstream), strict=True
    ):
        assert (one - other).norm() <= exact * other.norm()
