"""The end of a run of several processes.

A thread of gloo drops the tensors of a finished collective only when it gets Python's lock. Should the interpreter be
shutting down by then, the process aborts ("terminate called without an active exception"), and a launcher calls a run
failed that has trained and saved everything. Nothing public waits for these threads: a process group joins them when it
is freed, and the models of DDP and DeepSpeed hold theirs to the end. So they get time.
"""

from __future__ import annotations

import time

import torch.distributed as dist
from accelerate import Accelerator

PAUSE = 0.25  # seconds; such a thread needs microseconds, and a turn on a busy processor


def leave(accelerator: Accelerator) -> None:
    """Wait for all ranks, end the trackers and destroy the process group; nothing collective may follow."""
    accelerator.wait_for_everyone()
    settle()
    accelerator.end_training()


def settle() -> None:
    """Give the threads of the process group, where there is one, the time to drop what they hold."""
    if dist.is_initialized():
        time.sleep(PAUSE)
