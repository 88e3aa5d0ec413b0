"""The small model of the studies: made once, trained by steps whose layout does not matter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from packtrain.packing.plan import make_plan
from results import small_model
from results.epoch_packing.run import ARMS, run
from results.leak_cost.run import LEAKING, leak
from results.leak_cost.run import run as run_packs
from results.small_model import Settings, draw_rows, fine_tune, held_out_loss, load_base, prepare_ground, updates_of

TINY = Settings(held_out=12, tuning=8, pool=60, base=64, vocabulary=300, hidden=16, layers=1)

pytestmark = [pytest.mark.ci, pytest.mark.slow]  # trains


@pytest.fixture(scope="module")
def folder(gsm8k: Path, tmp_path_factory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_model, "GSM8K", gsm8k)
        yield tmp_path_factory.mktemp("small_model")


@pytest.fixture(scope="module")
def ground(folder: Path) -> small_model.Ground:
    return prepare_ground(folder, TINY)


def test_the_base_is_trained_once(folder, ground):
    weights = ground.model / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert prepare_ground(folder, TINY).base == ground.base and weights.stat().st_mtime_ns == before
    losses = list(ground.base["held_out"].values())
    assert losses[-1] < losses[0] and len(ground.pool) == 60 and ground.base["tokens"] > 64 * 100
    assert held_out_loss(load_base(ground), ground.held_out) == pytest.approx(losses[-1], rel=1e-5)


def test_a_step_is_its_examples_however_they_lie(ground):
    """One micro-batch or several: the same losses and the same model. Control: another step is another model."""
    rows = draw_rows(ground, 0, 16)
    lengths, found = ground.pool.lengths[rows], {}
    for name, tokens, seed in (("whole", 8192, 0), ("parts", 1024, 0), ("other", 8192, 1)):
        plan = make_plan(lengths, strategy="balanced", examples_per_step=8, max_tokens=tokens, seed=seed)
        assert (plan.gradient_accumulation_steps > 1) == (name == "parts")
        model = load_base(ground)
        losses = fine_tune(model, updates_of(ground, plan, rows), count=plan.total_steps, rate=1e-2)
        found[name] = [*losses, held_out_loss(model, ground.held_out)]
    assert found["parts"] == pytest.approx(found["whole"], rel=1e-5)
    assert found["other"] != pytest.approx(found["whole"], rel=1e-4)


def test_packs_of_held_out_rows_do_not_matter(ground):
    """Control: a leak does, though hardly to a model that has learnt so little."""
    model = load_base(ground)
    whole, parts = (held_out_loss(model, ground.held_out, max_tokens=tokens) for tokens in (8192, 1024))
    assert parts == pytest.approx(whole, rel=1e-7)
    assert held_out_loss(model, ground.held_out, leak) != pytest.approx(whole, rel=1e-6)


def test_seeds_draw_other_rows(ground):
    first, again, other = (draw_rows(ground, seed, 30) for seed in (0, 0, 1))
    assert first.tolist() == again.tolist() and len(set(first)) == 30 and set(first) != set(other)


def test_arms_train_as_they_say(ground):
    found = {arm: run(ground, arm, 1e-3, 0, "tuning", rows=40) for arm in ARMS}
    updates = [one["updates"] for one in found.values()]
    assert updates[0] == updates[2] == 10 and updates[1] == updates[3] == 5
    assert len({one["tokens"] for one in list(found.values())[:3]}) == 1, "at equal tokens"
    assert np.ptp([one["loss"] for one in found.values()]) > 0
    leaking, isolated = (run_packs(ground, ARMS[1], way, 1e-3, 0, rows=40) for way in (LEAKING, "isolated"))
    assert leaking["updates"] == isolated["updates"] == updates[1] and leaking["train"] != isolated["train"]
