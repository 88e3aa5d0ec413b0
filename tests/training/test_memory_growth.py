"""Two thousand updates take no more memory than the first ones, with shapes and labels that never repeat."""

from __future__ import annotations

from multiprocessing import get_context
from pathlib import Path

import psutil
import pytest
import torch
from transformers import TrainerCallback

from tests.faults.test_soak import memory_growth
from tests.training.helpers import make_trainer

MIB = 2**20
LEAK = 64 * 2**10  # bytes kept in every update of the control


class Resident(TrainerCallback):
    """Notes the resident memory after every update; keeps `leak` bytes each time."""

    def __init__(self, leak: int):
        self.lines: list[dict] = []
        self.leak, self.kept = leak, []

    def on_step_end(self, args, state, control, **kwargs):
        if self.leak:
            self.kept.append(torch.ones(self.leak, dtype=torch.uint8))
        self.lines.append({"rank": 0, "memory": psutil.Process().memory_info().rss})


def growth_of(output_dir: Path, updates: int, leak: int) -> float:
    """Trains in this process; returns by how many bytes the later updates exceed the earlier ones."""
    torch.set_num_threads(1)
    resident = Resident(leak)
    settings = {"strategy": "balanced", "max_steps": updates, "logging_steps": 50, "loss_weighting": "example"}
    trainer = make_trainer(output_dir, **settings, model_changes={"num_hidden_layers": 1})
    trainer.add_callback(resident)
    trainer.train()
    assert len(resident.lines) == updates
    return memory_growth(resident.lines)


@pytest.mark.slow
def test_memory_stays_flat_over_two_thousand_updates(tmp_path):
    with get_context("spawn").Pool(1) as pool:  # a process of its own, whose allocator has nothing to give back
        flat = pool.apply(growth_of, (tmp_path / "flat", 2000, 0))
        leaking = pool.apply(growth_of, (tmp_path / "leaking", 400, LEAK))
    assert flat < 4 * MIB
    assert leaking > 0.5 * 0.675 * 400 * LEAK, "control"
