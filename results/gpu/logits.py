"""Trains on many supervised tokens of a large vocabulary: the ways of `results/logits`, with the device's own memory."""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from packtrain.objectives import chunks
from packtrain.training.meters import peak_memory, reset_peak
from results.gpu.parts import LOGITS, TINY
from results.gpu.schedule import Task
from results.logits.run import trainer_of

TOKENS, UPDATES = 16_384, 6


def measure(task: Task, way: str) -> dict[str, Any]:
    """Train some updates of 16,384 supervised tokens in one way: peak memory, seconds of an update, losses."""
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            if not task.small:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    config = LOGITS | TINY if task.small else LOGITS
    settings = {"use_cpu": task.small, "bf16": True, "max_steps": UPDATES}
    if task.small:
        chunks.CHUNK_BYTES = 2**17  # 64 positions, or one chunk would be enough
    with tempfile.TemporaryDirectory(dir=task.scratch) as directory:
        trainer = trainer_of(way, 512 if task.small else TOKENS, directory, config=config, **settings)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Clock)
        reset_peak()
        trainer.train()
    peak, peak_of = peak_memory()
    return {
        "tokens": 512 if task.small else TOKENS,
        "peak_memory": peak,
        "peak_memory_of": peak_of,
        "seconds_median": statistics.median(stop - start for start, stop in zip(ends[1:], ends[2:], strict=False)),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }
