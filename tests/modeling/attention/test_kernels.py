"""The kernels of packed attention against a float64 reference, forward and backward, on the CPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from packtrain.modeling.attention import kernels
from packtrain.modeling.attention.kernels import (
    Pattern,
    attend,
    causal_mask,
    fused_kernel,
    sdpa_takes_groups,
    window_mask,
)
from tests.modeling.attention.reference import (
    Case,
    cases,
    documents,
    errors,
    random_inputs,
    random_lengths,
    reference,
    relative_error,
)


def test_masks_literally():
    assert causal_mask(4, None, torch.device("cpu")).int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [1, 1, 1, 1],
    ]
    assert causal_mask(4, 2, torch.device("cpu")).int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 1, 1],
    ]
    assert window_mask(4, 2, torch.device("cpu")).int().tolist() == [
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [0, 1, 1, 1],
        [0, 0, 1, 1],
    ]


def test_two_documents_by_hand():
    """Equal scores everywhere, so that each token gets the mean of the values it attends."""
    query = key = torch.zeros(1, 1, 5, 8)
    value = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0]).view(1, 1, 5, 1)
    rows = documents([3, 2])
    causal = attend(query, key, value, rows, Pattern(scaling=1.0))
    assert causal.flatten().tolist() == pytest.approx([1, 1.5, 2, 10, 15])
    both = attend(query, key, value, rows, Pattern(scaling=1.0, causal=False))
    assert both.flatten().tolist() == pytest.approx([2, 2, 2, 15, 15])
    near = attend(query, key, value, rows, Pattern(scaling=1.0, window=2))
    assert near.flatten().tolist() == pytest.approx([1, 1.5, 2.5, 10, 15])
    # a sink with the score of a token takes one more share, and gives nothing
    sink = attend(query, key, value, rows, Pattern(scaling=1.0, sinks=torch.zeros(1)))
    assert sink.flatten().tolist() == pytest.approx([0.5, 1, 1.5, 5, 10])


@pytest.mark.parametrize("case", cases(longest=120), ids=str)
def test_equals_the_reference(case: Case):
    found = errors(case, "cpu", torch.float32)
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize(
    "extra",
    [{"softcap": 0.7}, {"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0])}, {"softcap": 2.0, "window": 20}],
    ids=["softcap", "sinks", "softcap and window"],
)
@pytest.mark.parametrize("causal", [True, False])
def test_softcap_and_sinks(extra, causal):
    window = extra.get("window")
    case = Case(name="x", lengths=random_lengths(20, longest=90), causal=causal, kv_heads=2, window=window)
    extra = {key: value for key, value in extra.items() if key != "window"}
    assert max(errors(case, "cpu", torch.float32, **extra).values()) < 1e-5


def test_sinks_get_gradients():
    case = Case(name="x", lengths=(5, 9))
    inputs, sinks = random_inputs(case, "cpu", torch.float64), torch.randn(4, dtype=torch.float64)
    rows = documents(case.lengths)
    ours, theirs = sinks.clone().requires_grad_(), sinks.clone().requires_grad_()
    attend(*inputs, rows, Pattern(scaling=0.2, sinks=ours)).square().sum().backward()
    reference(*inputs, case.lengths, Pattern(scaling=0.2, sinks=theirs)).square().sum().backward()
    assert theirs.grad.abs().min() > 0
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (20, 20), (48, 24), (15, 15)])
def test_sinks_keep_to_sizes_that_fused_kernels_take(monkeypatch, dim, value_dim):
    """In half precision CUDA's kernels for a mask want head sizes that 8 divides; others form all scores."""
    seen, sdpa = [], F.scaled_dot_product_attention
    spy = lambda *states, **options: seen.extend(x.shape[-1] for x in states) or sdpa(*states, **options)  # noqa: E731
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    case = Case(name="x", lengths=(5, 9), kv_heads=2, dim=dim, value_dim=value_dim)
    assert max(errors(case, "cpu", torch.float32, sinks=torch.tensor([0.5, -1.0, 3.0, 0.0])).values()) < 1e-5
    assert seen and all(size % 8 == 0 for size in seen), seen
    assert max(seen) <= dim + 8


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rows", ["every query", "all queries alike"])
def test_position_bias(causal, rows):
    case = Case(name="x", lengths=(7, 1, 12), causal=causal, kv_heads=2)
    bias = torch.randn(1, 4, 20 if rows == "every query" else 1, 20)
    assert max(errors(case, "cpu", torch.float32, bias=bias).values()) < 1e-5


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_mask_is_cut_to_its_diagonal_blocks(kind):
    """The mask says only "no further back than 3", not where documents end: those bounds are ours."""
    case, window = Case(name="x", lengths=(6, 9, 5), kv_heads=2), 4
    inputs = random_inputs(case, "cpu", torch.float32)
    mask = causal_mask(20, window, torch.device("cpu"))[None, None]
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    output = attend(*inputs, documents(case.lengths), Pattern(scaling=0.2, mask=mask))
    expected = reference(*(x.double() for x in inputs), case.lengths, Pattern(scaling=0.2, window=window))
    assert relative_error(output, expected) < 1e-5


def test_the_reference_tells_documents_apart():
    """Negative control: other bounds, window, direction or scaling are far from the reference."""
    case = Case(name="x", lengths=(30, 50, 20))
    inputs = random_inputs(case, "cpu", torch.float32)
    expected = reference(*(x.double() for x in inputs), case.lengths, Pattern(scaling=0.2, window=10))
    right = attend(*inputs, documents(case.lengths), Pattern(scaling=0.2, window=10))
    assert relative_error(right, expected) < 1e-5
    for lengths, changed in [
        ([100], {}),
        ([31, 49, 20], {}),
        (case.lengths, {"window": 11}),
        (case.lengths, {"causal": False}),
        (case.lengths, {"scaling": 0.25}),
    ]:
        pattern = Pattern(**{"scaling": 0.2, "window": 10} | changed)
        assert relative_error(attend(*inputs, documents(lengths), pattern), expected) > 1e-2


def test_dropout_drops_that_share_and_keeps_the_mean():
    """Constant values: without dropout every output is 1; with it the outputs scatter around 1."""
    case = Case(name="x", lengths=(200, 200), causal=False)
    query, key, value = random_inputs(case, "cpu", torch.float32)
    for extra in ({}, {"softcap": 5.0}):  # SDPA and the spelled-out form
        torch.manual_seed(0)
        pattern = Pattern(scaling=0.01, causal=False, dropout=0.5, **extra)
        output = attend(query, key, torch.ones_like(value), documents(case.lengths), pattern)
        assert output.mean().item() == pytest.approx(1, abs=0.02)
        assert 0.03 < output.std().item() < 0.15  # sqrt((1 - p) / p / 200) = 0.07


def test_no_token_reaches_another_document():
    """Not small: exactly zero, in the gradients of every other document."""
    case = Case(name="x", lengths=(11, 7, 23), kv_heads=2)
    inputs = [x.requires_grad_() for x in random_inputs(case, "cpu", torch.float32)]
    output = attend(*inputs, documents(case.lengths), Pattern(scaling=0.2))
    for grad in torch.autograd.grad(output[:, 11:18].sum(), inputs):
        assert grad[:, :, 11:18].abs().sum() > 0
        assert grad[:, :, :11].abs().sum() == 0 and grad[:, :, 18:].abs().sum() == 0


# ------------------------------------------------------------------------------------ which kernel for what


def on_cuda(dtype=torch.bfloat16, dim=64) -> Tensor:
    """What `fused_kernel` asks of a CUDA tensor, without one."""
    return SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(1, 4, 8, dim))


@pytest.fixture
def ampere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))


@pytest.mark.skipif(kernels.has_flash_attn(), reason="flash-attn is preferred where installed")
def test_fused_kernels_are_chosen_only_for_what_they_can_do(ampere):
    plain = Pattern(scaling=0.1)
    assert fused_kernel(on_cuda(), on_cuda(), plain) is kernels.attend_torch_varlen
    assert fused_kernel(on_cuda(torch.float16), on_cuda(), plain) is kernels.attend_torch_varlen
    assert fused_kernel(on_cuda(torch.float32), on_cuda(), plain) is None
    assert fused_kernel(on_cuda(dim=512), on_cuda(), plain) is None
    assert fused_kernel(torch.zeros(1, 4, 8, 64), torch.zeros(1, 4, 8, 64), plain) is None
    for extra in (
        {"mask": torch.ones(1, 1, 8, 8)},
        {"bias": torch.ones(1, 1, 8, 8)},
        {"sinks": torch.ones(4)},
        {"softcap": 3.0},
        {"dropout": 0.1},
    ):
        assert fused_kernel(on_cuda(), on_cuda(), Pattern(scaling=0.1, **extra)) is None, extra


def test_a_card_before_ampere_takes_sdpa(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert fused_kernel(on_cuda(), on_cuda(), Pattern(scaling=0.1)) is None


def test_grouped_heads_go_to_sdpa_only_where_it_has_a_kernel_for_them(monkeypatch):
    plain = on_cuda(dim=256)
    assert sdpa_takes_groups(plain, plain, None)
    assert not sdpa_takes_groups(plain, plain, torch.ones(8, 8))
    assert not sdpa_takes_groups(on_cuda(dim=512), on_cuda(dim=512), None)
    assert not sdpa_takes_groups(on_cuda(dim=64), on_cuda(dim=32), None)
    assert not sdpa_takes_groups(on_cuda(torch.float32), on_cuda(torch.float32), None)
    grouped, sdpa = [], F.scaled_dot_product_attention
    spy = lambda *states, **options: grouped.append(options["enable_gqa"]) or sdpa(*states, **options)  # noqa: E731
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    for size, value_dim in ((32, 32), (32, 16), (264, 264)):
        case = Case(name="x", lengths=(5,), kv_heads=2, dim=size, value_dim=value_dim)
        assert max(errors(case, "cpu", torch.float32).values()) < 1e-5
    assert grouped == [True, False, False]


def test_window_sizes_of_the_kernels_literally():
    """FlashAttention counts neighbours: (left, right), -1 for all."""

    def sizes(**pattern):
        made = Pattern(scaling=1.0, **pattern)
        return kernels.window_size(made, right_if_causal=0), kernels.window_size(made, right_if_causal=-1)

    assert sizes() == ((-1, 0), (-1, -1))
    assert sizes(window=5) == ((4, 0), (4, 0))
    assert sizes(causal=False) == ((-1, -1), (-1, -1))
    assert sizes(causal=False, window=5) == ((4, 4), (4, 4))


def test_kernel_layout_pads_heads_and_keeps_the_product():
    query, key, value = (torch.randn(1, 2, 6, dim) for dim in (20, 20, 12))
    q, k, v, dim = kernels.rows_first(query, key, value)
    assert (q.shape, k.shape, v.shape, dim) == ((6, 2, 24), (6, 2, 24), (6, 2, 24), 12)
    assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
    torch.testing.assert_close(torch.einsum("qhd,khd->hqk", q, k), (query @ key.transpose(2, 3))[0])
