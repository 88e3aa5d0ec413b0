"""The worker: one run of one variant in its own process. Builds the trainer, trains, and writes the run file.

The process is forked from a server that has imported the libraries and done nothing else, so every run starts
from the same state and none waits for imports. Where CUDA is present a new interpreter is spawned instead:
CUDA does not survive a fork.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from packtrain.compare.experiment import with_settings
from packtrain.compare.flops import training_flops
from packtrain.compare.measure import EvaluateHeldOut, Recorder, RunFailed, Timed, WriteUpdates
from packtrain.compare.peers import as_peer, build_peer
from packtrain.compare.results import PICTURED_RANKS, End, RunWriter
from packtrain.compare.trainers import PACKTRAIN, TRAINERS
from packtrain.objectives.task import plan_recipe
from packtrain.packing.plan import Plan
from packtrain.recipe.recipe import Recipe
from packtrain.training.meters import peak_memory, reset_peak
from packtrain.training.run import build
from packtrain.training.trainer import PackTrainer


class TimedPackTrainer(Timed, PackTrainer):
    """PackTrainer, timed."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker process does.

    Attributes:
        trainer: `packtrain` or a key of `TRAINERS`.
        recipe: what to train, with the round's seed.
        path: the run file.
        updates: stop after that many; None trains to the end and evaluates on the held-out examples.
        eval_every: updates between evaluations; None for the beginning and the end only.
    """

    trainer: str
    recipe: Recipe
    path: Path
    updates: int | None
    eval_every: int | None


class StopAfter(TrainerCallback):
    """Ends the run early; the schedule and the plan stay those of the whole run."""

    def __init__(self, updates: int):
        self.updates = updates

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.updates


def work(job: Job) -> None:
    """Run a job. Every end is written to the run file: a failure is a run that failed."""
    began = time.perf_counter()
    _talk_to(job.path.with_suffix(".log"))
    transformers_logging.set_verbosity_error()
    writer = RunWriter(job.path)
    try:
        with tempfile.TemporaryDirectory() as scratch:  # trainers want an output directory, and leave nothing in it
            recipe = with_settings(job.recipe, output_dir=scratch)
            writer.end(_train(job, recipe, writer, began))
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)  # into the log
        writer.end(End(status="failed", reason=reason_of(error)))
        sys.exit(1)


def _train(job: Job, recipe: Recipe, writer: RunWriter, began: float) -> End:
    is_peer = job.trainer != PACKTRAIN
    if is_peer:
        recipe = as_peer(job.trainer, recipe)
    packtrain = build(recipe, console=Console(quiet=True), trainer_class=TimedPackTrainer)
    assert isinstance(packtrain, TimedPackTrainer)
    trainer, dropped = build_peer(job.trainer, recipe, packtrain) if is_peer else (packtrain, 0)
    model = packtrain.model
    recorder = trainer.recorder = Recorder(
        write=writer.write,
        flops=training_flops(model.config, frozen=recipe.lora is not None),
        says_documents=not is_peer or TRAINERS[job.trainer].says_documents,
        device=trainer.args.device,
    )
    trainer.add_callback(WriteUpdates(recorder))
    if job.updates is not None:
        trainer.add_callback(StopAfter(job.updates))
    elif packtrain.eval_dataset is not None:
        loader = packtrain.get_eval_dataloader()
        trainer.add_callback(EvaluateHeldOut(loader=loader, loss=packtrain.loss, writer=writer, every=job.eval_every))
    reset_peak()
    trainer.train()
    if recorder.first_began is None:
        raise RunFailed("there was no update to measure")
    peak, peak_of = peak_memory()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return End(
        status="finished",
        peak_memory=peak,
        memory_before=recorder.memory_before,
        memory_of=peak_of,
        startup_seconds=round(recorder.first_began - began, 3),
        attention=model.config._attn_implementation,
        trained_parameters=trained,
        frozen_parameters=sum(p.numel() for p in model.parameters()) - trained,
        planned_updates=trainer.state.max_steps,
        tokens_dropped=dropped + packtrain.train_dataset.report.tokens_lost,
        device=torch.cuda.get_device_name() if trainer.args.device.type == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        dtype=_dtype(trainer, model),
        layout=[{"width": shape.width, "rows": shape.rows} for shape in recorder.layout],
        over_ranks=None if is_peer or job.updates is not None else over_ranks(recipe, packtrain.plan),
    )


def over_ranks(recipe: Recipe, plan: Plan) -> list[dict[str, Any]] | None:
    """Deal the first update of a flat plan to `PICTURED_RANKS` ranks (see `results.End`); None for a padded one."""
    if plan.layout != "flat":
        return None
    dealt = plan_recipe(recipe, plan.lengths, world_size=PICTURED_RANKS, cost=plan.scope.cost)
    ranks = [[part.lengths.tolist() for part in dealt.micro_batches(0, rank)] for rank in range(PICTURED_RANKS)]
    return [{"width": max(map(sum, rows)), "rows": list(rows)} for rows in zip(*ranks, strict=True)]


def reason_of(error: BaseException) -> str:
    """Describe an error in one line."""
    text = " ".join(str(error).split()).replace(f"{Path.cwd()}/", "").replace(f"{tempfile.gettempdir()}/", "")
    return f"{type(error).__name__}: {text}"[:300]


def _dtype(trainer: Timed, model: torch.nn.Module) -> str:
    if trainer.args.bf16 or trainer.args.fp16:
        return "bfloat16" if trainer.args.bf16 else "float16"
    return str(model.dtype).removeprefix("torch.")


def _talk_to(log: Path) -> None:
    """Send whatever this process prints from now on to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
