"""Packed attention on a GPU, in bfloat16 and float16, against a float64 reference. `pytest -m gpu` runs it.

The comparison itself is the one that `tests/modeling/attention/test_kernels.py` runs in float32 on the CPU.
"""

from __future__ import annotations

import pytest
import torch

from packtrain.modeling.attention.kernels import Documents, Pattern, attend, attend_each, fused_kernel
from packtrain.modeling.attention.varlen import NAME, register
from tests.modeling.attention.reference import Case, cases, documents, errors, random_inputs, random_lengths
from tests.tiny import tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HALF = [torch.bfloat16, torch.float16]


def ampere() -> bool:
    return torch.cuda.get_device_capability() >= (8, 0)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", cases(longest=1000), ids=str)
def test_half_precision(case: Case, dtype: torch.dtype):
    found = errors(case, "cuda", dtype)
    assert max(found.values()) < 1e-2, found


@pytest.mark.parametrize("case", cases(longest=300), ids=str)
def test_float32_is_as_exact_as_on_the_cpu(case: Case):
    found = errors(case, "cuda", torch.float32)
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("extra", ["softcap", "sinks"])
def test_what_the_fused_kernels_lack(extra: str, dtype: torch.dtype):
    made = {"softcap": 5.0} if extra == "softcap" else {"sinks": torch.tensor([1.0, -2.0, 0.0, 0.5]).cuda()}
    case = Case(name="x", lengths=random_lengths(30, longest=300), kv_heads=2, window=64)
    assert max(errors(case, "cuda", dtype, **made).values()) < 1e-2


def test_the_fused_kernel_is_the_one_that_ran():
    """The precision above would also hold for the loop over documents; long flat batches need the kernel."""
    if not ampere():
        pytest.skip("FlashAttention needs compute capability 8.0")
    case = Case(name="x", lengths=(4096,) * 16, kv_heads=2, dim=64)
    inputs = random_inputs(case, "cuda", torch.bfloat16)
    assert fused_kernel(inputs[0], inputs[2], Pattern(scaling=0.1)) not in (None, attend_each)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = attend(*inputs, documents(case.lengths, "cuda"), Pattern(scaling=0.1))
    peak = torch.cuda.max_memory_allocated() - before
    tokens = sum(case.lengths)
    assert output.shape == (1, tokens, 4, 64) and output.isfinite().all()
    assert peak < tokens * tokens / 8  # bytes; a bool mask of the row would be eight times that


def test_kernel_and_loop_agree_with_autocast():
    """Under autocast a layer may hand over float32 queries beside bfloat16 values."""
    case = Case(name="x", lengths=random_lengths(31, longest=300), kv_heads=2)
    query, key, value = random_inputs(case, "cuda", torch.float32)
    rows, pattern = documents(case.lengths, "cuda"), Pattern(scaling=0.2)
    exact = attend(query, key, value, rows, pattern)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        mixed = attend(query, key, value.bfloat16(), rows, pattern)
    assert mixed.dtype == torch.bfloat16
    assert ((mixed.float() - exact).norm() / exact.norm()).item() < 1e-2


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2"])
def test_documents_of_a_model_in_bfloat16(family: str):
    """Bitwise the same whatever the neighbour says, and close to the document alone."""
    register()
    model = tiny_model(family, attn_implementation=NAME).to("cuda", torch.bfloat16)
    lengths = (30, 1, 77, 12)
    bounds = Documents(bounds=(0, 30, 31, 108, 120), device=torch.device("cuda")).cu_seq_lens
    positions = torch.cat([torch.arange(length) for length in lengths])[None].cuda()
    ids = torch.randint(3, 64, (1, 120), generator=torch.Generator().manual_seed(0)).cuda()
    changed = ids.clone()
    changed[0, 31:108] = 5
    batch = dict(position_ids=positions, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, use_cache=False)
    batch |= dict(max_length_q=77, max_length_k=77)
    with torch.no_grad():
        ours, others = model(ids, **batch).logits[0], model(changed, **batch).logits[0]
        assert torch.equal(ours[:31], others[:31]) and torch.equal(ours[108:], others[108:])
        assert not torch.equal(ours[31:108], others[31:108])
        alone = torch.cat([model(part).logits[0] for part in ids.split(lengths, dim=1)])
    assert ((ours - alone).float().norm() / alone.float().norm()).item() < 1e-2
