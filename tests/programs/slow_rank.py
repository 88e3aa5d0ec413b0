"""Run under torchrun by compare/test_two_ranks.py: a worker of `packtrain compare` whose rank 1 sleeps in micro-batches."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import LlamaModel

from packtrain.compare.worker import work_on_rank
from packtrain.training.ranks import asked_rank

SECONDS = 0.5


def sleep(module, inputs):
    if isinstance(module, LlamaModel) and module.training:
        time.sleep(SECONDS)


if __name__ == "__main__":
    if asked_rank() == 1:
        register_module_forward_pre_hook(sleep)
    work_on_rank(Path(sys.argv[1]))
