"""No pickle of a checkpoint runs code, whoever wrote it.

Most files of a checkpoint are pickles, and a pickle may call anything when it is read. transformers reads its own by
torch's restricted unpickler (`weights_only=True`: tensors, numbers, names), DeepSpeed asks for the unrestricted one.
torch's `TORCH_FORCE_WEIGHTS_ONLY_LOAD` overrules it, and the few plain classes in DeepSpeed's files are named to torch
(`torch.serialization.safe_globals`):

    with restricted_unpickling():
        ...                        # every torch.load in this process, whatever it asks for

A manifest tells that a checkpoint is as it was written, not by whom, so this holds for sealed ones as well. Only the
sharded state dicts of FSDP (`SHARDED_STATE_DICT`) have a pickled index that torch reads by itself; they are read after
their manifest was verified, and no recipe in launch/ makes them.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

import torch

from packtrain.errors import CheckpointError

FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextmanager
def restricted_unpickling() -> Iterator[None]:
    """Restricts every `torch.load` of this process and its children while open."""
    before = os.environ.get(FORCE)
    os.environ[FORCE] = "1"
    try:
        with torch.serialization.safe_globals(_classes_of_deepspeed()):
            yield
    finally:
        if before is None:
            del os.environ[FORCE]
        else:
            os.environ[FORCE] = before


def runs_code(error: UnpicklingError, checkpoint: str) -> CheckpointError:
    """Returns the error for a file that the restricted unpickler has refused."""
    lines = [line.strip() for line in str(error).splitlines()]
    reason = next((line for line in lines if "GLOBAL" in line or "Unsupported" in line), lines[0] if lines else "")
    what = f"has a file that would run code when loaded, or is not a pickle at all: {reason[:200]}"
    fix = "don't trust it; start from its weights (model.model_name_or_path), if they are safetensors"
    return CheckpointError(what, where=checkpoint, fix=fix)


def _classes_of_deepspeed() -> list[Any]:
    """Returns the classes that the files of ZeRO 0 to 3 hold next to tensors, where DeepSpeed is at work."""
    if "deepspeed" not in sys.modules:
        return []
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


def convert() -> None:
    """Runs `deepspeed.checkpoint.ds_to_universal` with the arguments of this process, restricted."""
    from deepspeed.checkpoint import ds_to_universal

    multiprocessing.set_start_method("fork")  # its workers must know the classes, too
    with restricted_unpickling():
        ds_to_universal.main(ds_to_universal.parse_arguments())


if __name__ == "__main__":
    convert()
