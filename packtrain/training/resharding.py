"""Resuming on another number of ranks, and resuming rightly.

The plan continues on any number of ranks and DDP has nothing to redistribute, but a DeepSpeed checkpoint has one shard
per rank. Where the number differs they are first converted to its universal form (one file per parameter and state,
`deepspeed.checkpoint.ds_to_universal`), which the engine then cuts anew:

    checkpoint-40/global_step40/               two shards, as saved
    checkpoint-40/global_step40_universal/     made here once, next to them, with its own manifest
    checkpoint-40/latest_universal             its name, for DeepSpeed

Loading it under ZeRO-3, deepspeed 0.19 gives all parameter groups one shared step counter, which Adam then advances
once per group (9 after 3 + 3 updates with two groups), and the hyperparameters of the first group (weight decay on
norms). Both are fixed after loading, and the counters are compared with those of the manifest, whatever the engine: not
with the run's own updates, as a gradient scaler leaves some out, and an expert without a token has none.

From states on NVMe it resumes with other weights than it saved (a loss 2e-4 off at once, weights 1e-3 off three updates
later), so that is refused.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from packtrain.errors import CheckpointError, LaunchError
from packtrain.training.deepspeed_config import offload_devices
from packtrain.training.restricted import restricted_unpickling
from packtrain.training.sealing import MANIFEST, begin, read_manifest, seal, verify

SHARDS, PARAMETER_SHARDS = "*_optim_states.pt", "*zero_pp_rank_*_model_states.pt"
LATEST, LATEST_UNIVERSAL, ON_A_DRIVE = "latest", "latest_universal", "offloaded_tensors"


def check_engine(checkpoint: Path, *, deepspeed: bool) -> None:
    """Checks that a run with or without DeepSpeed can read `checkpoint`.

    Raises:
        LaunchError: not a checkpoint, or an engine of the other kind wrote it.
    """
    if not (checkpoint / TRAINER_STATE_NAME).exists():
        fix = "name a `checkpoint-...` directory of a run"
        raise LaunchError("is not a checkpoint", where=str(checkpoint), fix=fix)
    by_deepspeed = (checkpoint / LATEST).exists()
    if by_deepspeed != deepspeed:
        what = "was written by DeepSpeed" if by_deepspeed else "was not written by DeepSpeed"
        fix = "resume without it (no --launch, or --launch ddp), or start a new run from the saved model"
        if by_deepspeed:
            fix = _resume_by(_stages(checkpoint / (checkpoint / LATEST).read_text(encoding="utf-8").strip()))
        raise LaunchError(f"{what}, and this run's engine cannot read its optimizer", where=str(checkpoint), fix=fix)


def prepare_resume(trainer: Trainer, checkpoint: str | Path) -> None:
    """Makes `checkpoint` loadable by this run's engine and ranks; on every rank, before `trainer.train`.

    Raises:
        LaunchError: not a checkpoint, another engine wrote it, its states were on NVMe, or its shards can't be
            redistributed.
    """
    checkpoint = Path(checkpoint)
    by_deepspeed = trainer.accelerator.distributed_type is DistributedType.DEEPSPEED
    check_engine(checkpoint, deepspeed=by_deepspeed)
    if not by_deepspeed:
        return
    config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
    shards = checkpoint / (checkpoint / LATEST).read_text(encoding="utf-8").strip()
    stages, ranks = _stages(shards), len(list(shards.glob(SHARDS)))
    stage = config["zero_optimization"].get("stage", 0)
    if stage not in stages:
        what = f"was written by ZeRO stage {' or '.join(map(str, stages))}, and this run has stage {stage}"
        raise LaunchError(what, where=str(checkpoint), fix=_resume_by(stages))
    if "nvme" in offload_devices(config).values() or (shards / ON_A_DRIVE).exists():
        what = "was written with states on NVMe, from which DeepSpeed restores other weights than it saved"
        fix = (
            "start a new run from the saved model; launch/zero3_offload_cpu.yaml makes checkpoints that can be resumed"
        )
        raise LaunchError(what, where=str(checkpoint), fix=fix)
    if stage == 0 or ranks == trainer.args.world_size:
        return
    with trainer.accelerator.main_process_first():
        if trainer.is_world_process_zero() and not _is_converted(shards):
            _to_universal(shards)
    config.setdefault("checkpoint", {})["load_universal"] = True


def _stages(shards: Path) -> tuple[int, ...]:
    """Returns the ZeRO stages that may have written a checkpoint, by the files it has."""
    if not any(shards.glob(SHARDS)):
        return (0,)
    return (3,) if any(shards.glob(PARAMETER_SHARDS)) else (1, 2)


def _resume_by(stages: tuple[int, ...]) -> str:
    """Returns how a checkpoint of these ZeRO stages is resumed, by the launch file for one of them where there is one."""
    stage = stages[-1]
    launch = f" (for example --launch zero{stage})" if stage else ""
    return f"resume with ZeRO stage {stage}{launch}, or start a new run from the saved model"


def added_later(checkpoint: Path) -> set[str]:
    """Returns the names that a conversion has added to a sealed checkpoint. Read before it is verified, so maybe damaged."""
    try:
        latest = (checkpoint / LATEST).read_text(encoding="utf-8").strip()
        return {LATEST_UNIVERSAL, _universal_of(checkpoint / latest).name}
    except (OSError, ValueError):
        return set()


def _universal_of(shards: Path) -> Path:
    return shards.with_name(f"{shards.name}_universal")


def _is_converted(shards: Path) -> bool:
    """Returns whether its universal form is there, whole, made of these shards, and what DeepSpeed would read."""
    target, latest = _universal_of(shards), shards.with_name(LATEST_UNIVERSAL)
    try:
        manifest = read_manifest(target)
        verify(target, manifest)
        return manifest["of"] == _digest_of(shards) and latest.read_text(encoding="utf-8") == target.name
    except (CheckpointError, OSError, KeyError, UnicodeDecodeError):
        return False


def _digest_of(shards: Path) -> str:
    """Hashes the manifest that the shards are named in."""
    return hashlib.sha256((shards.parent / MANIFEST).read_bytes()).hexdigest()


def _to_universal(shards: Path) -> None:
    """Converts `global_step40` to `global_step40_universal`, in a separate process without device and process group."""
    target = _universal_of(shards)
    shutil.rmtree(target, ignore_errors=True)  # of a conversion that was interrupted
    begin(target)
    folders = ["--input_folder", str(shards), "--output_folder", str(target)]
    done = subprocess.run(
        [sys.executable, "-m", "packtrain.training.restricted", *folders, "--inject_missing_state"],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        what = f"could not be redistributed: {''.join(last)}"
        raise LaunchError(what, where=str(shards), fix="resume on the number of ranks that wrote it")
    seal(target, {"of": _digest_of(shards)})


def correct_resumed_optimizer(trainer: Trainer, checkpoint: str | Path) -> None:
    """Restores what DeepSpeed loads wrongly, and compares every step counter with those that were saved; after loading.

    Raises:
        LaunchError: the optimizer is not where it was.
    """
    optimizer = _innermost(trainer)
    engine: Any = trainer.deepspeed  # None with another engine
    if engine is not None and engine.load_universal_checkpoint():
        if engine.zero_optimization_stage() == 3:
            _restore_groups(optimizer, Path(checkpoint))
        for state in optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()  # one counter each
    saved, found = read_manifest(Path(checkpoint)).get("optimizer_steps"), optimizer_steps(trainer)
    if saved is not None and set(found) - set(saved):
        found, saved = (", ".join(map(str, steps)) or "none" for steps in (found, saved))
        what = f"the restored optimizer counts {found} updates, and it counted {saved} when it was saved"
        raise LaunchError(what, where=str(checkpoint), fix="resume on the number of ranks that wrote it")


def optimizer_steps(trainer: Trainer) -> list[int]:
    """Returns the different values of the optimizer's step counters, sorted; none where it keeps none by parameter."""
    return sorted({int(state["step"]) for state in _innermost(trainer).state.values() if "step" in state})


def _innermost(trainer: Trainer) -> torch.optim.Optimizer:
    """Returns the optimizer in accelerate's and DeepSpeed's wrappers."""
    optimizer: Any = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _restore_groups(optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Gives every parameter group its own hyperparameters back, but for the rate, which is that of this run's schedule."""
    tag = (checkpoint / LATEST_UNIVERSAL).read_text(encoding="utf-8").strip()
    path = checkpoint / tag / "zero" / "optimizer_state.pt"
    with restricted_unpickling():
        saved: list[dict[str, Any]] = torch.load(path, map_location="cpu", weights_only=True)["param_groups"]
    assert len(saved) == len(optimizer.param_groups), f"{len(saved)} groups in {path}"
    for group, own in zip(optimizer.param_groups, saved, strict=True):
        group.update({key: value for key, value in own.items() if key not in ("params", "lr")})
