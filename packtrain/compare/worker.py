"""The worker: one run of one variant in its own process. Builds the trainer, trains, and writes the run file.

The process is forked from a server that has imported the libraries and done nothing else, so every run starts
from the same state and none waits for imports. Where CUDA is present a new interpreter is spawned instead:
CUDA does not survive a fork. Of a run on several ranks every process is a new interpreter, started by torchrun (see
`launcher`); rank 0 writes the run file.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from packtrain.compare.experiment import with_settings
from packtrain.compare.flops import training_flops
from packtrain.compare.launcher import Job, end_with_parent, reason_of, talk_to, write_failure
from packtrain.compare.measure import EvaluateHeldOut, Recorder, RunFailed, Timed, WriteUpdates
from packtrain.compare.peers import as_peer, build_peer
from packtrain.compare.ranks import gathered, merge_ends
from packtrain.compare.results import PICTURED_RANKS, End, Record, RunWriter, log_path
from packtrain.compare.trainers import PACKTRAIN, TRAINERS
from packtrain.objectives.task import plan_recipe
from packtrain.packing.plan import Plan
from packtrain.recipe.recipe import Recipe
from packtrain.training.meters import peak_memory, reset_peak
from packtrain.training.ranks import asked_rank, leave
from packtrain.training.run import build
from packtrain.training.trainer import PackTrainer


class TimedPackTrainer(Timed, PackTrainer):
    """PackTrainer, timed."""


class StopAfter(TrainerCallback):
    """Ends the run early; the schedule and the plan stay those of the whole run."""

    def __init__(self, updates: int):
        self.updates = updates

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.updates


def work(job: Job) -> None:
    """Run a job in one process. Every end is written to the run file: a failure is a run that failed."""
    end_with_parent()
    _prepare(log_path(job.path))
    writer = RunWriter(job.path)
    try:
        writer.end(_train(job, writer.write))
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)  # into the log
        writer.end(End(status="failed", reason=reason_of(error)))
        sys.exit(1)


def work_on_rank(file: Path) -> None:
    """Run the job in `file` as one of its ranks. Rank 0 writes the run file, and any that fails tells the launcher why."""
    end_with_parent()
    job, rank = Job.load(file), asked_rank()
    _prepare(log_path(job.path, rank))
    writer = RunWriter(job.path) if rank == 0 else None
    try:
        end = _train(job, writer.write if writer else lambda record: None)
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        write_failure(file.parent, rank, reason_of(error))
        sys.exit(1)
    if writer:
        writer.end(end)


def _prepare(log: Path) -> None:
    talk_to(log)
    transformers_logging.set_verbosity_error()


def _train(job: Job, write: Callable[[Record], None]) -> End:
    """Train, and return how it ended, on every rank of all together."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:  # trainers want an output directory, and leave nothing in it
        recipe = with_settings(job.recipe, output_dir=scratch)
        trainer, end = _train_in(job, recipe, write, began)
        if job.ranks > 1:
            end = merge_ends(gathered(end))
            leave(trainer.accelerator)
    return end


def _train_in(job: Job, recipe: Recipe, write: Callable[[Record], None], began: float) -> tuple[Timed, End]:
    is_peer = job.trainer != PACKTRAIN
    if is_peer:
        recipe = as_peer(job.trainer, recipe)
    packtrain = build(recipe, console=Console(quiet=True), trainer_class=TimedPackTrainer)
    assert isinstance(packtrain, TimedPackTrainer)
    trainer, dropped = build_peer(job.trainer, recipe, packtrain) if is_peer else (packtrain, 0)
    model = packtrain.model
    recorder = trainer.recorder = Recorder(
        write=write,
        flops=training_flops(model.config, frozen=recipe.lora is not None),
        says_documents=not is_peer or TRAINERS[job.trainer].says_documents,
        device=trainer.args.device,
    )
    trainer.add_callback(WriteUpdates(recorder))
    if job.updates is not None:
        trainer.add_callback(StopAfter(job.updates))
    elif packtrain.eval_dataset is not None:
        loader = packtrain.get_eval_dataloader()
        trainer.add_callback(EvaluateHeldOut(loader=loader, loss=packtrain.loss, write=write, every=job.eval_every))
    reset_peak()
    trainer.train()
    if recorder.first_began is None:
        raise RunFailed("there was no update to measure")
    peak, peak_of = peak_memory()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    end = End(
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
        over_ranks=None if is_peer or job.updates is not None else over_ranks(recipe, cast(Plan, packtrain.plan)),
    )
    return trainer, end


def over_ranks(recipe: Recipe, plan: Plan) -> list[dict[str, Any]] | None:
    """Deal the first update of a flat plan to `PICTURED_RANKS` ranks (see `results.End`); None for a padded one."""
    if plan.layout != "flat":
        return None
    dealt = plan_recipe(recipe, plan.lengths, world_size=PICTURED_RANKS, cost=plan.scope.cost)
    ranks = [[part.lengths.tolist() for part in dealt.micro_batches(0, rank)] for rank in range(PICTURED_RANKS)]
    return [{"width": max(map(sum, rows)), "rows": list(rows)} for rows in zip(*ranks, strict=True)]


def _dtype(trainer: Timed, model: torch.nn.Module) -> str:
    if trainer.args.bf16 or trainer.args.fp16:
        return "bfloat16" if trainer.args.bf16 else "float16"
    return str(model.dtype).removeprefix("torch.")


if __name__ == "__main__":
    work_on_rank(Path(sys.argv[1]))
