"""Names the machine, and compares every attention kernel that it has with float64, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from packtrain.modeling.attention import kernels
from packtrain.modeling.attention.kernels import Documents, Pattern, attend, attend_each, fused_kernel
from packtrain.training.summary import describe_machine, package_versions
from results.gpu.schedule import Task
from tests.modeling.attention.reference import Case, cases, errors, random_inputs

TOLERANCE = {"bfloat16": 1e-2, "float16": 1e-2, "float32": 1e-5}  # those of tests/gpu and tests/modeling/attention


def describe(task: Task) -> dict[str, Any]:
    """Name the device, the machine and the packages."""
    return {
        "device": "cpu, rehearsal" if task.small else torch.cuda.get_device_name(),
        "machine": describe_machine(),
        "packages": package_versions() | ({"cuda": torch.version.cuda} if torch.version.cuda else {}),
        "threads": torch.get_num_threads(),
    }


def measure(task: Task) -> dict[str, Any]:
    """Compare kernels with attention in float64 on the cases of the tests: relative errors of output and gradients.

    Raises:
        AssertionError: one is further off than the tests allow, or attention across documents is not noticed.
    """
    dtypes = (torch.float32,) if task.small else (torch.bfloat16, torch.float16)
    found: dict[str, Any] = {"chosen": {}, "errors": {}, "cases": 0, "control": None}
    for case in cases(longest=24 if task.small else 1000):
        found["cases"] += 1
        for dtype in dtypes:
            name = str(dtype).removeprefix("torch.")
            inputs = random_inputs(case, task.device, dtype)
            pattern = Pattern(scaling=1.0, causal=case.causal, window=case.window)
            fused = fused_kernel(inputs[0], inputs[2], pattern)
            chosen = "none" if fused is None else fused.__name__
            found["chosen"][f"{chosen}, {name}"] = found["chosen"].get(f"{chosen}, {name}", 0) + 1
            for kernel, way in _ways(fused).items():
                worst = max(errors(case, task.device, dtype, way=way).values())
                first = {"worst": 0.0, "case": None, "tolerance": TOLERANCE[name]}
                row = found["errors"].setdefault(f"{kernel}, {name}", first)
                if worst >= row["worst"]:
                    row |= {"worst": worst, "case": case.name}
        task.keep(found)
    case = Case(name="leak", lengths=(11, 7, 23), kv_heads=2)
    found["control"] = max(errors(case, task.device, dtypes[0], way=_leaking).values())
    task.keep(found)
    for kernel, row in found["errors"].items():
        assert row["worst"] < row["tolerance"], f"{kernel}: {row['case']} is {row['worst']:.1e} off"
    assert found["control"] > 0.1, f"attention across documents moves outputs by {found['control']:.1e} only"
    return found


def _ways(fused: Callable[..., Tensor] | None) -> dict[str, Callable[..., Tensor]]:
    """Name the kernels that can compute what `fused` was chosen for, and what runs where there is none."""
    ways: dict[str, Callable[..., Tensor]] = {"as packtrain chooses": attend, "SDPA per document": attend_each}
    if fused is not None:
        ways["torch varlen_attn"] = kernels.attend_torch_varlen
        if kernels.has_flash_attn():
            ways["flash-attn"] = kernels.attend_flash_attn
    return ways


def _leaking(query: Tensor, key: Tensor, value: Tensor, documents: Documents, pattern: Pattern) -> Tensor:
    """Attend across documents: the bounds say that there is one."""
    return attend(query, key, value, Documents(bounds=(0, documents.bounds[-1]), device=documents.device), pattern)
