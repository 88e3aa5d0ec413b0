"""Several ranks: a checkpoint has the files of all, and what one rank meets stops every one at the same update."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from packtrain.training.checkpoints import find_last_checkpoint
from packtrain.training.sealing import MANIFEST, is_sealed, read_manifest
from tests.faults.runs import STEPS, Reading, log_of, run_ranks, same, weights, write_recipe
from tests.faults.test_damage import DAMAGES
from tests.faults.test_pickles import needs_deepspeed
from tests.launch.helpers import run
from tests.training.helpers import make_trainer

BAD = 17


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    recipe = write_recipe(tmp_path_factory.mktemp("two"))
    assert run_ranks(recipe, 2, resume=False) == [0, 0], log_of(recipe)
    return recipe.parent / "run"


def every_damage_is_found(whole: Path, elsewhere: Path) -> int:
    """Every file of a checkpoint in every way, beside an older one that is good. Returns how many there were."""
    broken = shutil.copytree(whole, elsewhere / whole.name)
    older = shutil.copytree(whole, elsewhere / "checkpoint-0")
    manifest = json.loads((older / MANIFEST).read_text())
    names = [*manifest["files"], MANIFEST]
    assert find_last_checkpoint(elsewhere, say=pytest.fail)[0] in (broken, older)  # control
    for name in names:
        kept = (broken / name).read_bytes()
        for damage in DAMAGES.values():
            damage(broken / name)
            said: list[str] = []
            assert find_last_checkpoint(elsewhere, said.append)[0] == older, name
            assert len(said) == 1 and said[0].startswith(f"skipped {broken.name}: "), said
            (broken / name).write_bytes(kept)
    return len(names) * len(DAMAGES)


@pytest.mark.ci
@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_has_the_files_of_both(two_ranks, tmp_path, record_property):
    manifest = read_manifest(two_ranks / f"checkpoint-{STEPS}")
    assert manifest["world_size"] == 2 and {"rng_state_0.pth", "rng_state_1.pth"} <= manifest["files"].keys()
    record_property("times", every_damage_is_found(two_ranks / f"checkpoint-{STEPS}", tmp_path))


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.timeout(600)
@pytest.mark.parametrize("config", ["zero1", "zero2", "zero3"])
def test_every_damaged_shard_is_found(tmp_path, config, record_property):
    run(tmp_path, config, 2, "training.max_steps=3", "stop=2", "training.save_strategy=steps", "training.save_steps=2")
    whole = tmp_path / "run/checkpoint-2"
    assert sum("optim_states" in name for name in read_manifest(whole)["files"]) == 2
    record_property("times", every_damage_is_found(whole, tmp_path / "damaged"))


class Poisoned(Reading):
    """Answers NaN to one example, on whichever rank it is."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        if BAD in inputs["example_ids"] and self.args.process_index == 1:
            inputs = inputs | {"loss_weights": inputs["loss_weights"] * torch.nan}
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.ci
@pytest.mark.slow
def test_a_nan_on_one_rank_stops_both_at_the_same_update(tmp_path):
    recipe = write_recipe(tmp_path)
    codes = run_ranks(recipe, 2, resume=False, trainer_class=Poisoned)
    assert codes == [2, 2], log_of(recipe)
    (record,) = [json.loads(line) for line in (tmp_path / "run/nonfinite.jsonl").read_text().splitlines()]
    assert BAD in record["example_ids"] and {batch["rank"] for batch in record["micro_batches"]} == {1}
    checkpoints = {path.name for path in (tmp_path / "run").glob("checkpoint-*")}
    assert checkpoints == {f"checkpoint-{step}" for step in range(1, record["step"] + 1)}
    assert all(is_sealed(tmp_path / "run" / name) for name in checkpoints)


@pytest.mark.ci
@pytest.mark.slow
def test_trying_the_largest_changes_no_bit_on_two_ranks(two_ranks, tmp_path):
    recipe = write_recipe(tmp_path)
    assert run_ranks(recipe, 2, resume=False, overrides=["probe_memory=true"]) == [0, 0], log_of(recipe)
    assert "largest" in log_of(recipe)
    assert same(weights(tmp_path / "run"), weights(two_ranks))


@pytest.mark.ci
@pytest.mark.slow
def test_an_adapter_resumes_bitwise(tmp_path):
    settings = dict(strategy="balanced", lora=True, save_strategy="steps", save_steps=1, max_steps=6)
    whole, resumed = make_trainer(tmp_path, **settings), make_trainer(tmp_path, **settings)
    whole.train()
    assert "adapter_model.safetensors" in read_manifest(tmp_path / "checkpoint-3")["files"]
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    found = dict(resumed.model.named_parameters())
    assert all(torch.equal(value, found[name]) for name, value in whole.model.named_parameters())
