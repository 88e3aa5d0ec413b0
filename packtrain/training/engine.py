"""The engine of a run: what was requested, what is in use, and that they are the same.

Launchers and engines differ from what they were told without a word (DDP instead of ZeRO or FSDP, stage 0 instead of 2,
one micro-batch per update instead of four). So the same record is filled twice, once from what the launcher, the
recipe and the plan say and once from the engine that runs, and every field has to agree before the first step:

    engine       DeepSpeed ZeRO-2 on 2 ranks, bf16, 4 micro-batches per update, gradients clipped at 1.0
    parameters   846,208 trained (bfloat16), 0 frozen
    per rank     parameters 1.6 MiB, master weights 1.6 MiB

`engine.json` in the run's directory keeps it, with the bytes that every rank holds before and after the first update.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from accelerate.utils import DistributedType, gather_object
from rich.console import Console
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from packtrain.errors import LaunchError
from packtrain.modeling.loading import count_parameters
from packtrain.training.deepspeed_config import offload_devices
from packtrain.training.memory.state_bytes import state_bytes
from packtrain.training.ranks import asked_world_size
from packtrain.training.resharding import correct_resumed_optimizer

STATE_FILE = "engine.json"


@dataclass(frozen=True, kw_only=True)
class Engine:
    """The engine that trains. `zero_stage` is None without DeepSpeed; offload devices are none, cpu or nvme."""

    name: str  # DeepSpeed, FSDP, DDP or "single process"
    world_size: int
    zero_stage: int | None
    offload_optimizer: str
    offload_param: str
    mixed_precision: str  # no, bf16 or fp16
    gradient_accumulation_steps: int
    gradient_clipping: float

    def __str__(self) -> str:
        stage = f" ZeRO-{self.zero_stage}" if self.zero_stage is not None else ""
        offloaded = {name: getattr(self, f"offload_{name}") for name in ("optimizer", "param")}
        offload = "".join(f", {name} on {device}" for name, device in offloaded.items() if device != "none")
        precision = "full precision" if self.mixed_precision == "no" else self.mixed_precision
        number = self.gradient_accumulation_steps
        micro_batches = f"{number} micro-batch{'es' if number != 1 else ''} per update"
        ranks = f"{self.world_size} rank{'s' if self.world_size > 1 else ''}"
        clipping = f"gradients clipped at {self.gradient_clipping:g}" if self.gradient_clipping else "no clipping"
        return f"{self.name}{stage} on {ranks}{offload}, {precision}, {micro_batches}, {clipping}"


def asked_engine(
    args: TrainingArguments, config: Mapping[str, Any] | None, env: Mapping[str, str] | None = None
) -> Engine:
    """Returns the engine that the launcher, the recipe and the plan ask for.

    Args:
        args: with the plan's `gradient_accumulation_steps`.
        config: of DeepSpeed, as `deepspeed_config` has checked it; None without.
    """
    env = os.environ if env is None else env  # as it is now, not as it was at import
    world_size = asked_world_size(env)
    asks_for_deepspeed = config is not None or env.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
    asks_for_fsdp = bool(args.fsdp) or env.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    name = "DeepSpeed" if asks_for_deepspeed else "FSDP" if asks_for_fsdp else _plain(world_size)
    if config is not None:
        stage, devices = config["zero_optimization"].get("stage", 0), offload_devices(config)
    else:  # accelerate makes a config of its settings
        stage = int(env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2)) if asks_for_deepspeed else None
        devices = _devices_of_accelerate(env)
    return Engine(
        name=name,
        world_size=world_size,
        zero_stage=stage,
        **devices,
        mixed_precision="bf16" if args.bf16 else "fp16" if args.fp16 else "no",
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        gradient_clipping=float(args.max_grad_norm or 0),
    )


def engine_in_force(trainer: Trainer) -> Engine:
    """Returns the engine that runs, read from the wrapped model; after `train()` has wrapped it."""
    args, accelerator = trainer.args, trainer.accelerator
    common = dict(world_size=args.world_size, gradient_accumulation_steps=args.gradient_accumulation_steps)
    if accelerator.distributed_type is not DistributedType.DEEPSPEED:
        return Engine(
            **common,
            name="FSDP" if accelerator.distributed_type is DistributedType.FSDP else _plain(args.world_size),
            zero_stage=None,
            offload_optimizer="none",
            offload_param="none",
            mixed_precision=accelerator.mixed_precision,
            gradient_clipping=float(args.max_grad_norm or 0),
        )
    engine: Any = trainer.deepspeed
    offload = {"offload_optimizer": engine.zero_offload_optimizer(), "offload_param": engine.zero_offload_param()}
    return Engine(
        name="DeepSpeed",
        world_size=engine.dp_world_size,
        zero_stage=engine.zero_optimization_stage(),
        **{name: str(section.device) if section else "none" for name, section in offload.items()},
        mixed_precision="bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "no",
        gradient_accumulation_steps=engine.gradient_accumulation_steps(),
        gradient_clipping=float(engine.gradient_clipping() or 0),
    )


def differences(asked: Engine, in_force: Engine) -> list[str]:
    """Returns a line per field that differs: `zero_stage: 2 was requested, 0 is in use`."""
    pairs = [(field.name, getattr(asked, field.name), getattr(in_force, field.name)) for field in fields(Engine)]
    return [f"{name}: {one} was requested, {other} is in use" for name, one, other in pairs if one != other]


class EngineReport(TrainerCallback):
    """Checks and prints the engine before the first update; counts after it what every rank holds, and stores it all.

    Args:
        asked: what has to be in force.
        resumed_from: the checkpoint whose optimizer is in force.
        notes: returns further lines to print, called when training begins.
    """

    def __init__(
        self,
        trainer: Trainer,
        asked: Engine,
        *,
        resumed_from: str | None = None,
        console: Console | None = None,
        notes: Callable[[], Mapping[str, str]] = dict,
    ):
        self.trainer, self.asked, self.resumed_from, self.notes = trainer, asked, resumed_from, notes
        self.console = console or Console()
        self.record: dict[str, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        in_force = engine_in_force(self.trainer)
        if found := differences(self.asked, in_force):
            fix = "see the comments in launch/ for what starts which engine"
            if self.asked.name == "FSDP" and args.device.type == "cpu":
                fix = "train by ddp or zero2 (--launch): FSDP2 needs GPUs, and on CPU ranks accelerate runs DDP in its place"
            raise LaunchError("the engine is not the one that was requested: " + "; ".join(found), fix=fix)
        if self.resumed_from is not None:
            correct_resumed_optimizer(self.trainer, self.resumed_from)
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        trained, frozen = count_parameters(model)
        dtypes = _dtypes(model)
        self.record = {"engine": asdict(in_force), "trained_parameters": trained, "frozen_parameters": frozen}
        self.record |= {"dtypes": dtypes, "bytes_per_rank_before": self._count()}
        self._say("engine", str(in_force))
        counts = {"trained": trained, "frozen": frozen}
        words = (f"{n:,} {kind}" + (f" ({', '.join(dtypes[kind])})" if n else "") for kind, n in counts.items())
        self._say("parameters", ", ".join(words))
        self._say("per rank", _in_words(self.record["bytes_per_rank_before"]))
        for what, text in self.notes().items():
            self._say(what, text)

    def on_step_end(self, args, state, control, **kwargs):
        if "bytes_per_rank_after" in self.record:
            return
        self.record["bytes_per_rank_after"] = self._count()
        self._say("per rank", _in_words(self.record["bytes_per_rank_after"]) + " (after the first update)")
        if state.is_world_process_zero:
            path = Path(args.output_dir, STATE_FILE)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.record, indent=2) + "\n", encoding="utf-8")

    def _count(self) -> list[dict[str, int]]:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return gather_object([state_bytes(model, self.trainer.optimizer)])

    def _say(self, what: str, text: str) -> None:
        if self.trainer.is_world_process_zero():
            self.console.print(f"[bold]{what:<12}[/] {text}", highlight=False, soft_wrap=True)


def _dtypes(model: nn.Module) -> dict[str, list[str]]:
    """Returns what forward and backward compute with: dtypes of trained and of frozen parameters."""
    kinds = {"trained": True, "frozen": False}
    return {
        kind: sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad is trained})
        for kind, trained in kinds.items()
    }


def _plain(world_size: int) -> str:
    return "DDP" if world_size > 1 else "single process"


def _devices_of_accelerate(env: Mapping[str, str]) -> dict[str, str]:
    """Returns the offload devices that an accelerate config without a DeepSpeed JSON asks for."""
    names = ("offload_optimizer", "offload_param")
    return {name: env.get(f"ACCELERATE_DEEPSPEED_{name.upper()}_DEVICE", "none") for name in names}


def _in_words(per_rank: list[dict[str, int]]) -> str:
    """Says the most that any rank holds, kind by kind."""
    kinds = {kind: max(rank[kind] for rank in per_rank) for kind in per_rank[0]}
    return ", ".join(f"{kind} {size / 2**20:,.1f} MiB" for kind, size in kinds.items() if size)
