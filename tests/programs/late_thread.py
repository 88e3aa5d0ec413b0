"""Run under torchrun by training/test_ranks.py: ends while a thread of gloo is about to drop a tensor."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator

import packtrain
from packtrain.training import ranks


class Late:
    """Whoever drops it takes a while, as a thread does that waits for its turn."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def __del__(self):
        time.sleep(self.seconds)


def reduce_and_forget(group: dist.ProcessGroup, seconds: float) -> None:
    """Afterwards only gloo's thread has rank 0's tensor, which rank 0 lets go of before it is reduced."""
    if dist.get_rank(group):
        dist.recv(torch.empty(1), src=0)
    begin_to_reduce(group, seconds)
    if not dist.get_rank(group):
        dist.send(torch.ones(1), dst=1)


def begin_to_reduce(group: dist.ProcessGroup, seconds: float) -> None:
    tensor = torch.ones(2)
    if dist.get_rank(group) == 0:
        tensor.late = Late(seconds)
    dist.all_reduce(tensor, group=group, async_op=True)


def attach() -> None:
    from tests.plugin.trainers import classification

    packtrain.attach(classification(Path(tempfile.mkdtemp())), layout="unpad")


if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    GROUP = dist.new_group()  # held to the end, as DDP holds its own
    seconds, ranks.PAUSE = float(sys.argv[1]), float(sys.argv[2])
    if sys.argv[3] == "attach":
        attach()
    reduce_and_forget(GROUP, seconds)
    if sys.argv[3] == "leave":
        ranks.leave(accelerator)
    else:  # as a user's script ends
        accelerator.wait_for_everyone()
