"""Peak memory of this process or its device."""

from __future__ import annotations

import resource
import sys

import torch


def reset_peak() -> None:
    """Start a new peak on a CUDA device; a process's own peak cannot be reset."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> tuple[int, str]:
    """Peak bytes so far and what they count: `device` (CUDA allocator) or `process` (resident set, `getrusage`)."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated(), "device"
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "process"
