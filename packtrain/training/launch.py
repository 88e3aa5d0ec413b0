"""`packtrain train RECIPE --launch zero2`: the same as `accelerate launch --config_file launch/zero2.yaml ...`.

The file is looked for in the current folder, in `launch/` there, then among those that come with packtrain; a path
to an accelerate config does as well. It is started on every visible GPU (of each of its hosts), or, without any or with
`training.use_cpu`, on as many processes as it says.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from packtrain.errors import LaunchError, PacktrainError
from packtrain.recipe.fields import did_you_mean
from packtrain.recipe.shipped import SHARE, find_shipped

LAUNCHER = "packtrain.cli.launcher"  # accelerate's, which says in a sentence how a rank has ended
LAUNCHED_BY = "PACKTRAIN_LAUNCH"  # names the launch file in the processes that `--launch` starts


def relaunch(name: str, arguments: Sequence[str], *, use_cpu: bool = False) -> None:
    """Replaces this process by accelerate's launcher, running `packtrain` with `arguments`; doesn't return.

    Args:
        use_cpu: whether the run leaves GPUs alone.

    Raises:
        LaunchError: no such file, or a launcher has started this process already.
    """
    if "WORLD_SIZE" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ:
        raise LaunchError("a launcher has already started this process", key="--launch", value=name, fix="leave it out")
    import torch

    command = launch_command(
        find_launch_file(name), arguments, devices=0 if use_cpu else torch.accelerator.device_count()
    )
    os.execve(sys.executable, command, os.environ | {LAUNCHED_BY: name})


def launch_command(file: Path, arguments: Sequence[str], *, devices: int) -> list[str]:
    """Returns the command that starts `packtrain` with `arguments`, on every one of this host's `devices` GPUs; without
    any, in as many processes as the file says."""
    config = _read(file, yaml.safe_load)
    _check(config, file)
    options = ["--config_file", str(file)]
    if devices and config.get("distributed_type") != "NO":
        options += ["--num_processes", str(devices * config.get("num_machines", 1))]
    given = (config.get("deepspeed_config") or {}).get("deepspeed_config_file")
    if given and not Path(given).is_file():
        options += ["--deepspeed_config_file", str(_deepspeed_file(file, given))]
    return [sys.executable, "-m", LAUNCHER, *options, "-m", "packtrain", *arguments]


def find_launch_file(name: str) -> Path:
    """Finds the accelerate config for `zero2` or a path. Raises LaunchError."""
    try:
        return find_shipped(name, "launch", kind="launch file").resolve()
    except PacktrainError as error:
        raise LaunchError(error.what, key="--launch", value=name, fix=error.fix) from None


def engine_of(file: Path) -> str:
    """Returns what a launch file starts, as the plan of memory calls it: `ddp`, `zero2`, `zero3_offload_cpu`, `fsdp2` ...

    Raises:
        LaunchError: a DeepSpeed run without a config file.
    """
    config = _read(file, yaml.safe_load)
    kind = config.get("distributed_type")
    if kind != "DEEPSPEED":
        return "fsdp2" if kind == "FSDP" else "ddp"
    path = _deepspeed_file(file, (config.get("deepspeed_config") or {}).get("deepspeed_config_file"))
    zero = _read(path, json.loads).get("zero_optimization") or {}
    devices = {(zero.get(name) or {}).get("device", "none") for name in ("offload_param", "offload_optimizer")}
    return f"zero{zero.get('stage', 0)}" + "".join(f"_offload_{device}" for device in sorted(devices - {"none"}))


def _read(file: Path, load: Callable[[str], Any]) -> dict[str, Any]:
    """Reads the mapping that is in a launch file (YAML) or a DeepSpeed config (JSON). Raises LaunchError."""
    fix = "write an accelerate config, as launch/zero2.yaml is one, or a DeepSpeed config in JSON where it names that"
    try:
        config = load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise LaunchError(f"cannot be read: {' '.join(str(error).split())}", where=str(file), fix=fix) from None
    if not isinstance(config, dict):
        raise LaunchError("is not a mapping", where=str(file), value=config, fix=fix)
    return config


def _check(config: dict[str, Any], file: Path) -> None:
    """Raises LaunchError for what accelerate's launcher would fail of, without naming file or key."""
    from accelerate.utils import DistributedType

    kinds, given = [str(kind.value) for kind in DistributedType], config.get("distributed_type")
    if given is not False and given not in kinds:  # YAML reads a bare NO as false, and accelerate knows that
        near = did_you_mean(str(given), kinds)
        what = "is missing: this is no accelerate config" if given is None else "is no kind that accelerate knows"
        fix = f"did you mean {near}?" if near else f"choose from {', '.join(kinds)}, as launch/zero2.yaml does"
        value = {} if given is None else {"value": given}
        raise LaunchError(what, where=str(file), key="distributed_type", **value, fix=fix)
    for key in ("num_processes", "num_machines"):
        value = config.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            what = "must be a whole number above 0"
            raise LaunchError(what, where=str(file), key=key, value=value, fix=f"write for example {key}: 2")


def _deepspeed_file(file: Path, given: str | None) -> Path:
    """Finds the DeepSpeed config that a launch file names: from the current folder, from its own, from the one above that
    (`launch/` has the names so), or, for a copy of a file of packtrain's, among packtrain's."""
    for folder in (Path(), file.parent, file.parent.parent, SHARE):
        if given and (folder / given).is_file():
            return folder / given
    what, key = "names a file that does not exist", "deepspeed_config.deepspeed_config_file"
    if not given:
        what, key = "has no DeepSpeed config", "deepspeed_config"
    fix = "set deepspeed_config_file to a path from the current folder, or as launch/zero2.yaml does"
    raise LaunchError(what, where=str(file), key=key, value=given, fix=fix)
