"""What every strategy plans for seeded lengths: the hash, the counts, and each micro-batch of each rank and step."""

from __future__ import annotations

import functools
import hashlib
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from packtrain import make_plan
from packtrain.errors import PlanError
from packtrain.packing.strategies import STRATEGIES
from tests.golden.store import facts, load, plain, save

WORLD_SIZES = (1, 2, 4)
SETTINGS: dict[str, dict] = {
    "one epoch": dict(seed=0, examples_per_step=32, max_tokens=4096),
    "two epochs": dict(seed=1, examples_per_step=48, max_tokens=2048, num_epochs=2.0),
    "one epoch and a half, small steps": dict(seed=2, examples_per_step=7, max_tokens=1024, num_epochs=1.5),
    "max_steps": dict(seed=3, examples_per_step=64, max_tokens=4096, max_steps=11, max_length=1024),
    "max_documents": dict(seed=4, examples_per_step=32, max_tokens=2048, max_documents=3),
    "tokens_per_step": dict(seed=5, max_tokens=2048, tokens_per_step=15000),
    "equal_lengths": dict(seed=6, examples_per_step=16, max_tokens=4096, equal_lengths=True),
    "given accumulation": dict(seed=7, examples_per_step=16, max_tokens=4096, gradient_accumulation_steps=5),
    "too many for the accumulation": dict(examples_per_step=64, max_tokens=1024, gradient_accumulation_steps=2),
    "too long": dict(seed=8, examples_per_step=16, max_tokens=512),
}
CASES = {
    f"{strategy}/{setting}/{ranks}": (strategy, setting, ranks)
    for strategy, setting, ranks in product(STRATEGIES, SETTINGS, WORLD_SIZES)
}


@functools.cache
def lengths() -> np.ndarray:
    """500 lengths like those of instruction data: lognormal, median ~90, longest 1,024."""
    return np.clip(np.random.default_rng(0).lognormal(4.5, 0.9, 500), 5, 1024).astype(np.int32)


def planned(strategy: str, setting: str, ranks: int) -> dict:
    """What a plan comes to, or why there is none."""
    try:
        plan = make_plan(lengths(), strategy=strategy, world_size=ranks, **SETTINGS[setting])
    except PlanError as error:
        return {"refused": facts(str(error))}
    digest = hashlib.sha256()
    for step, rank in product(range(plan.total_steps), range(ranks)):
        batches = plan.micro_batches(step, rank)
        assert len(batches) == plan.gradient_accumulation_steps
        for batch in batches:
            digest.update(f"{step} {rank} {len(batch)}".encode())
            for array in (batch.example_ids, batch.starts, batch.stops):
                digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
    examples = hashlib.sha256()
    for step in range(plan.total_steps):
        examples.update(np.ascontiguousarray(plan.examples(step), dtype="<i8").tobytes())
    return {
        "layout": plan.layout,
        "total_steps": plan.total_steps,
        "num_epochs": plan.num_epochs,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "hash": plan.hash,
        "examples": examples.hexdigest(),
        "micro_batches": digest.hexdigest(),
    }


def store(directory: Path) -> None:
    save("plans", {case: planned(*arguments) for case, arguments in CASES.items()})


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_plans_are_those_stored(strategy):
    stored = load("plans")
    for case, arguments in CASES.items():
        if arguments[0] == strategy:
            assert plain(planned(*arguments)) == stored[case], case


def test_nothing_stored_is_left_out():
    assert load("plans").keys() == CASES.keys()
