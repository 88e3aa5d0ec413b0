"""What attention over documents must compute, written as plainly as possible, and the cases to compare on.

The same comparison runs on the CPU in float32 (`test_attention_kernels.py`) and on a GPU in bfloat16 and
float16 (`tests/gpu/test_varlen_gpu.py`), so that the body of the GPU test is itself tested.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from packtrain.modeling.attention.kernels import Documents, Pattern, attend


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    lengths: tuple[int, ...]
    causal: bool = True
    window: int | None = None
    heads: int = 4
    kv_heads: int = 4
    dim: int = 32
    value_dim: int | None = None
    scaling: float | None = None

    def __str__(self) -> str:
        return self.name


def random_lengths(seed: int, longest: int, documents: int = 12) -> tuple[int, ...]:
    """Log-uniform lengths, with a document of one token first, last and in between, and one of `longest`."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(documents, generator=generator).mul(torch.tensor(float(longest)).log()).exp()
    lengths = [1, *(int(draw) for draw in draws), 1, longest, 1]
    return tuple(max(1, length) for length in lengths)


def cases(longest: int) -> list[Case]:
    window = longest // 8
    return [
        Case(name="causal", lengths=random_lengths(0, longest)),
        Case(name="bidirectional", lengths=random_lengths(1, longest), causal=False),
        Case(name="causal window", lengths=random_lengths(2, longest), window=window),
        Case(name="bidirectional window", lengths=random_lengths(3, longest), causal=False, window=window),
        Case(name="window of one", lengths=random_lengths(4, longest), window=1),
        Case(name="grouped heads", lengths=random_lengths(5, longest), heads=8, kv_heads=2),
        Case(
            name="grouped heads, window",
            lengths=random_lengths(6, longest),
            heads=6,
            kv_heads=2,
            window=window,
        ),
        Case(
            name="grouped heads, bidirectional",
            lengths=random_lengths(7, longest),
            heads=8,
            kv_heads=1,
            causal=False,
        ),
        Case(name="own scaling", lengths=random_lengths(8, longest), scaling=0.3),
        Case(name="odd head size", lengths=random_lengths(9, longest), dim=20),
        Case(name="narrow values", lengths=random_lengths(10, longest), dim=48, value_dim=24),
        Case(name="head size 128", lengths=random_lengths(11, longest), heads=2, kv_heads=1, dim=128),
        Case(name="one document", lengths=(longest,), heads=4, kv_heads=2),
        Case(name="one document, window", lengths=(longest,), window=window),
        Case(name="only single tokens", lengths=(1,) * 9),
    ]


def reference(query: Tensor, key: Tensor, value: Tensor, lengths, pattern: Pattern) -> Tensor:
    """Attention over the whole row at once under a `[T, T]` mask: `[1, T, H, Dv]`."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(query.device)  # [T]
    position = torch.arange(len(document), device=query.device)
    distance = position[:, None] - position[None, :]  # [T, T], query minus key
    allowed = document[:, None] == document[None, :]
    if pattern.causal:
        allowed &= distance >= 0
    if pattern.window is not None:
        allowed &= distance.abs() < pattern.window
    scores = query @ key.transpose(2, 3) * pattern.scaling
    if pattern.softcap is not None:
        scores = pattern.softcap * (scores / pattern.softcap).tanh()
    if pattern.bias is not None:
        scores = scores + pattern.bias
    scores = scores.masked_fill(~allowed, -torch.inf)
    exponents = (scores - scores.amax(dim=-1, keepdim=True).detach()).exp()
    total = exponents.sum(dim=-1, keepdim=True)
    if pattern.sinks is not None:
        total = total + (pattern.sinks.view(1, -1, 1, 1) - scores.amax(dim=-1, keepdim=True).detach()).exp()
    return (exponents / total @ value).transpose(1, 2)


def random_inputs(case: Case, device: str, dtype: torch.dtype) -> list[Tensor]:
    """query, key, value as a model makes them: `[1, H, T, D]` seen through a transpose of `[1, T, H, D]`."""
    generator = torch.Generator().manual_seed(len(case.name))
    tokens, value_dim = sum(case.lengths), case.value_dim or case.dim
    shapes = [(case.heads, case.dim), (case.kv_heads, case.dim), (case.kv_heads, value_dim)]
    made = (torch.randn(1, tokens, *shape, generator=generator) for shape in shapes)
    return [x.to(device=device, dtype=dtype).transpose(1, 2) for x in made]


def documents(lengths, device: str = "cpu") -> Documents:
    return Documents(bounds=(0, *accumulate(lengths)), device=torch.device(device))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def errors(
    case: Case, device: str, dtype: torch.dtype, *, way: Callable[..., Tensor] = attend, **extra
) -> dict[str, float]:
    """||x - reference|| / ||reference|| of the output and the gradients of query, key and value, as `way` computes them.

    The reference sees the same (rounded) inputs in float64.
    """
    scaling = case.dim**-0.5 if case.scaling is None else case.scaling
    pattern = Pattern(scaling=scaling, causal=case.causal, window=case.window, **extra)
    inputs = [x.requires_grad_() for x in random_inputs(case, device, dtype)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    output = way(*inputs, documents(case.lengths, device), pattern)
    expected = reference(*exact, case.lengths, pattern)
    assert output.dtype == dtype and output.shape == expected.shape
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(device)
    grads = torch.autograd.grad(output, inputs, upstream.to(dtype))
    expected_grads = torch.autograd.grad(expected, exact, upstream.to(dtype).double())
    named = zip(("query", "key", "value"), grads, expected_grads, strict=True)
    found = {"output": relative_error(output, expected)}
    return found | {f"grad {name}": relative_error(a, b) for name, a, b in named if b.norm() > 0}
