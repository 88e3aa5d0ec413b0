"""Stored runs with known answers: every variant has a speed, a loss offset and updates of its own choosing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from packtrain.compare.results import End, HeldOut, Run, RunWriter, Update, run_path, write_manifest

TOKENS = 1000  # real tokens of an update


def make_update(number: int, *, seconds: float, loss: float, **changes: Any) -> Update:
    figures = {
        "update": number,
        "seconds": seconds,
        "data_seconds": 0.1 * seconds,
        "forward_seconds": 0.3 * seconds,
        "backward_seconds": 0.5 * seconds,
        "optimizer_seconds": 0.1 * seconds,
        "micro_batches": 2,
        "real_tokens": TOKENS,
        "computed_tokens": 2 * TOKENS,
        "supervised_tokens": TOKENS // 2,
        "examples": 8,
        "flops": 1e9,
        "loss": loss,
        "grad_norm": 1.0,
    }
    return Update(**figures | changes)


def make_run(
    variant: str,
    round: int,
    *,
    rate: float,
    updates: int = 6,
    loss_factor: float = 1.0,
    failure: str | None = None,
    learns: bool = True,
    **changes: Any,
) -> Run:
    """A run at `rate` real tokens per second, ten times slower in its first update; losses 5, 4.9 ... x a factor."""
    losses = [(5.0 - 0.1 * number) * loss_factor for number in range(updates + 1)]
    lines = [
        make_update(number, seconds=TOKENS / rate * (10 if number == 1 else 1), loss=losses[number - 1], **changes)
        for number in range(1, updates + 1)
    ]
    held_out = [
        HeldOut(update=number, loss=losses[number], loss_per_example=losses[number] / 2, tokens=100)
        for number in sorted({0, 2, 4, updates})
        if number <= updates
    ]
    end = End(
        status="failed" if failure else "finished",
        reason=failure,
        peak_memory=600 * 2**20,
        memory_before=400 * 2**20,
        memory_of="process",
        startup_seconds=1.5,
        attention="sdpa",
        trained_parameters=1_000_000,
        frozen_parameters=0,
        planned_updates=updates,
        tokens_dropped=0,
        device="cpu",
        threads=1,
        dtype="float32",
        layout=[{"width": 10, "rows": [[10], [4]]}],
    )
    if failure:
        lines, held_out = lines[:1], []
    return Run(variant=variant, round=round, updates=lines, held_out=held_out if learns else [], end=end)


def make_manifest(
    variants: list[tuple[str, str, bool]], *, rounds: int = 3, seeds: Sequence[int] = (), **changes: Any
) -> dict[str, Any]:
    """Variants are (name, trainer, keeps_updates); the reference is the first. Rounds are of seed 0, or of these seeds."""
    seeds = seeds or [0] * rounds
    return {
        "name": "synthetic",
        "hash": "0",
        "reference": variants[0][0],
        "warmup_steps": 1,
        "measure_steps": 3,
        "eval_every": 2,
        "rounds": [{"seed": seed, "learns": seeds.index(seed) == number} for number, seed in enumerate(seeds)],
        "variants": [
            {
                "name": name,
                "trainer": trainer,
                "keeps_updates": keeps,
                "ends_with_reference": "examples",
                "recipe": {
                    "model": {"model_name_or_path": None, "config": {"model_type": "llama"}},
                    "data": {"path": "train.jsonl"},
                    "batching": {"strategy": name, "examples_per_step": 8, "max_tokens": 4096},
                    "training": {"num_train_epochs": 1},
                },
            }
            for name, trainer, keeps in variants
        ],
        "command": "packtrain compare synthetic.yaml",
        "machine": {"cpu": "a processor", "cores": 2},
        "versions": {"python": "3.11"},
        "git": {},
    } | changes


def store(directory: Path, manifest: dict[str, Any], runs: list[Run]) -> None:
    """Write them as `run_comparison` would."""
    write_manifest(directory, manifest)
    for run in runs:
        writer = RunWriter(run_path(directory, run.round, run.variant))
        for record in (*run.updates, *run.held_out):
            writer.write(record)
        writer.end(run.end)
