"""The ranks of a run: as many as were launched, and their end.

`accelerate launch --cpu --num_processes 2` (or `distributed_type: MULTI_CPU`) starts one process without a word, and
two GPUs without a launcher run DataParallel, which would cut a flat batch in two. Both stop before the first step.

The end of a run of several processes: a thread of gloo drops the tensors of a finished collective only when it gets
Python's lock. Should the interpreter be shutting down by then, the process aborts ("terminate called without an active
exception"), and a launcher calls a run failed that has trained and saved everything. Nothing public waits for these
threads: a process group joins them when it is freed, and the models of DDP and DeepSpeed hold theirs to the end. So they
get time.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from transformers import TrainingArguments

from packtrain.errors import LaunchError

PAUSE = 0.25  # seconds; such a thread needs microseconds, and a turn on a busy processor
SET_BY_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what DeepSpeed reads


def asked_world_size(env: Mapping[str, str] | None = None) -> int:
    """Returns the ranks that the launcher set up (`WORLD_SIZE`, 1 without a launcher).

    Raises:
        LaunchError: accelerate was configured for several processes and started one.
    """
    env = os.environ if env is None else env  # as it is now, not as it was at import
    world_size = env.get("WORLD_SIZE")
    started_by_accelerate = "ACCELERATE_MIXED_PRECISION" in env
    if world_size is None and started_by_accelerate and "MASTER_PORT" in env and not _under_mpi(env):
        raise LaunchError(
            "accelerate was configured for several processes but started one",
            fix="on CPU use `torchrun --nproc_per_node 2 -m packtrain train RECIPE` or "
            "`accelerate launch --config_file launch/cpu.yaml -m packtrain train RECIPE --set use_cpu=true`",
        )
    return _whole(world_size, "WORLD_SIZE", 1)


def asked_rank(env: Mapping[str, str] | None = None) -> int:
    """Returns which rank the launcher made this process (`RANK`, 0 without a launcher)."""
    return _whole((os.environ if env is None else env).get("RANK"), "RANK", 0)


def _whole(text: str | None, name: str, default: int) -> int:
    """Reads the number that a launcher has set, or raises LaunchError."""
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and int(text[:9]) >= default):
        fix = "start the run with torchrun or accelerate launch, which set it, or unset it"
        raise LaunchError("is not a number of ranks", key=name, value=text, fix=fix)
    return int(text[:9])


def check_processes(*, world_size: int, n_gpu: int, env: Mapping[str, str] | None = None) -> None:
    """Compares the processes that run with those that were launched; `engine` does the same for the engine.

    Args:
        world_size: ranks that take part (`TrainingArguments.world_size`).
        n_gpu: devices this process drives (`TrainingArguments.n_gpu`); more than one means DataParallel.

    Raises:
        LaunchError: on any difference.
    """
    env = os.environ if env is None else env  # as it is now, not as it was at import
    asked = asked_world_size(env)
    if world_size != asked:
        raise LaunchError(
            f"{asked} processes were launched but {world_size} take part",
            fix="start the run with torchrun or accelerate launch",
        )
    if n_gpu > 1:
        raise LaunchError(
            f"one process would drive {n_gpu} GPUs by DataParallel",
            fix="start one process per GPU (`accelerate launch` or `torchrun --nproc_per_node`), "
            "or choose one with CUDA_VISIBLE_DEVICES=0",
        )


def check_launcher(*, deepspeed: bool, env: Mapping[str, str] | None = None) -> None:
    """Refuses a run with DeepSpeed in a process that no launcher has started: DeepSpeed would look for MPI.

    Raises:
        LaunchError: what a launcher sets is missing, and MPI is not there either.
    """
    env = os.environ if env is None else env
    if not deepspeed or all(name in env for name in SET_BY_LAUNCHERS) or find_spec("mpi4py"):
        return
    what = "needs a launcher, and none that starts ranks has started this process"
    fix = "start the run with --launch ddp, or with `torchrun --nproc_per_node N -m packtrain train RECIPE`"
    raise LaunchError(what, key="training.deepspeed", fix=fix)


def _under_mpi(env: Mapping[str, str]) -> bool:
    return any(name in env for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"))


def start_cpu_group(training: Mapping[str, Any], env: Mapping[str, str] | None = None) -> None:
    """Starts the process group of ranks on CPUs with `ddp_timeout`, which transformers passes on for devices only."""
    ranks = asked_world_size(env)
    if ranks == 1 or not training.get("use_cpu") or dist.is_initialized() or _under_mpi(os.environ):
        return
    timeout = timedelta(seconds=training.get("ddp_timeout", TrainingArguments.ddp_timeout))
    dist.init_process_group(training.get("ddp_backend") or "gloo", timeout=timeout)


@contextmanager
def meeting(env: Mapping[str, str] | None = None) -> Iterator[None]:
    """Around what starts the process group: says where the ranks were to meet when they don't.

    Raises:
        LaunchError: the port is in use, the address is wrong, or a rank has not come within `training.ddp_timeout`.
    """
    env = os.environ if env is None else env
    try:
        yield
    except dist.DistError as error:
        reason = str(error).split("\n", 1)[0].split(". ", 1)[0]
        what = f"rank {asked_rank(env)} cannot meet the others there: {reason}"
        fix = (
            "give all ranks the address of the host of rank 0 and a port that is free there "
            "(`torchrun --master_addr, --master_port`), and see that all of them start"
        )
        place = f"{env.get('MASTER_ADDR')}:{env.get('MASTER_PORT')}"
        raise LaunchError(what, key="MASTER_ADDR:MASTER_PORT", value=place, fix=fix) from error


def leave(accelerator: Accelerator) -> None:
    """Waits for all ranks, ends the trackers and destroys the process group; nothing collective may follow."""
    accelerator.wait_for_everyone()
    settle()
    accelerator.end_training()


def settle() -> None:
    """Gives the threads of the process group, where there is one, the time to drop what they hold."""
    if dist.is_initialized():
        time.sleep(PAUSE)


def settle_at_exit() -> None:
    """Calls `settle` when the process ends, whatever else it does until then."""
    atexit.unregister(settle)
    atexit.register(settle)
