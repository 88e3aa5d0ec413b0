"""A malicious pickle in every file that is read of a checkpoint: never executed, whoever wrote its manifest.

Beside each proof the same file is read without restriction, and runs.

    pytest -m slow tests/faults/test_pickles.py     # with two ranks, too: DDP and every ZeRO stage
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from packtrain.errors import CheckpointError, ModelError, PacktrainError
from packtrain.recipe.reader import load_recipe
from packtrain.training.restricted import restricted_unpickling
from packtrain.training.run import train
from packtrain.training.sealing import MANIFEST, read_manifest, seal
from tests.faults.pickles import PLANT, plant_zip, runs
from tests.faults.runs import STEPS, write_recipe
from tests.launch.helpers import RECIPE, ROOT, launcher, run

READ = ["optimizer.pt", "scheduler.pt", "rng_state.pth"]  # and training_args.bin is written, never read
NEVER_READ = ["training_args.bin"]


def forge_manifest(directory: Path) -> None:
    """What whoever can write the directory can do, too: a manifest that holds."""
    told = json.loads((directory / MANIFEST).read_text())
    del told["files"], told["sha256"], told["format"]
    (directory / MANIFEST).unlink()
    seal(directory, told)


@pytest.fixture
def checkpoint(unbroken, tmp_path) -> Path:
    return shutil.copytree(unbroken / f"checkpoint-{STEPS - 1}", tmp_path / f"run/checkpoint-{STEPS - 1}")


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.parametrize("form", PLANT)
@pytest.mark.parametrize("file", [*READ, *NEVER_READ])
def test_a_changed_file_is_refused_unread(checkpoint, tmp_path, form, file):
    recipe, mark = load_recipe(write_recipe(tmp_path)), tmp_path / "mark"
    PLANT[form](checkpoint / file, mark)
    with pytest.raises(CheckpointError, match=file):
        train(recipe, resume=str(checkpoint))
    assert not mark.exists()
    assert runs(lambda: torch.load(checkpoint / file, weights_only=False), mark)  # control


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.parametrize("file", [*READ, *NEVER_READ])
def test_a_checkpoint_without_manifest_is_refused_unread(checkpoint, tmp_path, file):
    recipe, mark = load_recipe(write_recipe(tmp_path)), tmp_path / "mark"
    plant_zip(checkpoint / file, mark)
    (checkpoint / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="has no manifest"):
        train(recipe, resume=str(checkpoint))
    with pytest.raises(CheckpointError, match="(?s)no valid checkpoint to resume from.*has no manifest"):
        train(recipe, resume=True)
    assert not mark.exists()


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.parametrize("form", PLANT)
@pytest.mark.parametrize("file", READ)
def test_with_a_forged_manifest_it_is_read_and_not_executed(checkpoint, tmp_path, form, file):
    recipe, mark = load_recipe(write_recipe(tmp_path)), tmp_path / "mark"
    PLANT[form](checkpoint / file, mark)
    forge_manifest(checkpoint)
    with pytest.raises(CheckpointError, match="would run code"):
        train(recipe, resume=str(checkpoint))
    assert not mark.exists()
    assert runs(lambda: torch.load(checkpoint / file, weights_only=False), mark)  # control


@pytest.mark.ci
@pytest.mark.slow
def test_with_an_honest_manifest_the_run_goes_on(checkpoint, tmp_path):
    """Control: it is the pickle that is refused, not the forged manifest."""
    forge_manifest(checkpoint)
    assert train(load_recipe(write_recipe(tmp_path)), resume=str(checkpoint)).updates == STEPS


@pytest.mark.ci
@pytest.mark.slow
def test_a_file_added_to_a_checkpoint_is_refused_unread(checkpoint, tmp_path):
    """Some names are read if they are there, whether a checkpoint has them or not."""
    recipe, mark = load_recipe(write_recipe(tmp_path)), tmp_path / "mark"
    for name in ("scaler.pt", "pytorch_model.bin", "global_step11/mp_rank_00_model_states.pt"):
        (checkpoint / name).parent.mkdir(exist_ok=True)
        plant_zip(checkpoint / name, mark)
        with pytest.raises(CheckpointError, match=f"{name} was added to it"):
            train(recipe, resume=str(checkpoint))
        (checkpoint / name).unlink()
    assert not mark.exists()


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.parametrize("file", ["pytorch_model.bin", "adapter_model.bin"])
@pytest.mark.parametrize("form", PLANT)
def test_weights_that_are_a_pickle(unbroken, tmp_path, form, file):
    """Of a model that a recipe names."""
    mark, model = tmp_path / "mark", shutil.copytree(unbroken / "model", tmp_path / "model")
    (model / "model.safetensors").unlink()
    (model / "training_args.bin").unlink(missing_ok=True)
    PLANT[form](model / file, mark)
    if file.startswith("adapter"):
        (model / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    named = ["model.config=null", "tokenizer_vocab_size=null", f"model_name_or_path={model}"]
    with pytest.raises(PacktrainError) as refused:
        train(load_recipe(write_recipe(tmp_path), named))
    assert isinstance(refused.value, ModelError)
    assert not mark.exists()
    assert runs(lambda: torch.load(model / file, weights_only=False), mark)  # control


# ------------------------------------------------------------------------------------------------- DeepSpeed

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")


@needs_deepspeed
def test_deepspeeds_own_reader_is_restricted(tmp_path):
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    mark = tmp_path / "mark"
    for form, plant in PLANT.items():
        plant(tmp_path / form, mark)

        def read(path=str(tmp_path / form)):
            return TorchCheckpointEngine().load(path)

        with restricted_unpickling():
            assert not runs(read, mark)
        assert runs(read, mark)  # control, and nothing is left behind of the restriction


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory):
    """Checkpoints of two ranks, by the launch file that made them; made when they are asked for."""
    root, made = tmp_path_factory.mktemp("two_ranks"), {}

    def make(config: str) -> Path:
        if config not in made:
            saving = ("training.max_steps=3", "training.save_strategy=steps", "training.save_steps=2")
            run(root / config, config, 2, *saving, "stop=2")
            made[config] = root / config / "run/checkpoint-2"
        return made[config]

    return make


KINDS = {  # of the pickles in a checkpoint of two ranks; one file each, or one for each rank
    "ddp": {"optimizer.pt", "scheduler.pt", "rng_state_*.pth", "training_args.bin"},
    "zero1": {"global_step2/*model_states.pt", "global_step2/*optim_states.pt"},
}
KINDS["zero1"] |= KINDS["ddp"] - {"optimizer.pt"}
KINDS |= {"zero2": KINDS["zero1"], "zero3": KINDS["zero1"]}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("config", ["ddp", *(pytest.param(f"zero{n}", marks=needs_deepspeed) for n in (1, 2, 3))])
def test_every_pickle_of_two_ranks(of_two_ranks, tmp_path, config, record_property):
    """Each kind of file by itself: refused without its manifest, not executed with a forged one."""
    whole, mark, kinds = of_two_ranks(config), tmp_path / "mark", KINDS[config]
    pickles = {name for name in read_manifest(whole)["files"] if Path(name).suffix in (".pt", ".pth", ".bin")}
    assert pickles == {path.relative_to(whole).as_posix() for kind in kinds for path in whole.glob(kind)}
    forge_manifest(shutil.copytree(whole, tmp_path / "honest/checkpoint-2"))
    for kind in kinds:
        for manifest in ("none", "forged"):
            broken = shutil.copytree(whole, tmp_path / f"{manifest} {kind.replace('/', ' ')}" / "checkpoint-2")
            for path in broken.glob(kind):
                plant_zip(path, mark)
                assert runs(lambda path=path: torch.load(path, weights_only=False), mark)  # control
            (broken / MANIFEST).unlink() if manifest == "none" else forge_manifest(broken)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    settings = ["training.max_steps=3", f"training.output_dir={tmp_path / 'run'}"]
    command = [*launcher(config, 2), "-m", "tests.programs.planted_ranks", str(tmp_path / "recipe.yaml"), str(tmp_path)]
    done = subprocess.run(
        [*command, *settings], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True
    )
    assert done.returncode == 0, done.stderr[-4000:].decode()
    assert not mark.exists()
    for rank in range(2):
        came_to = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert len(came_to) == 2 * len(kinds) + 1
        for name, what in came_to.items():
            if name == "honest" or name == "forged training_args.bin":  # which nobody reads
                assert what == "trained"
            else:
                assert ("has no manifest" if name.startswith("none") else "would run code") in what, name
    record_property("times", 2 * len(pickles))


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.timeout(600)
def test_a_conversion_to_other_ranks_executes_no_pickle(of_two_ranks, tmp_path):
    """DeepSpeed's own converter, restricted and (control) as it comes."""
    mark = tmp_path / "mark"
    shards = shutil.copytree(of_two_ranks("zero2") / "global_step2", tmp_path / "run/global_step2")
    for path in shards.glob("*.pt"):
        plant_zip(path, mark)

    def convert(module: str, to: str) -> subprocess.CompletedProcess:
        folders = ["--input_folder", str(shards), "--output_folder", str(tmp_path / "run" / to)]
        return subprocess.run([sys.executable, "-m", module, *folders, "--inject_missing_state"], capture_output=True)

    assert convert("packtrain.training.restricted", "ours").returncode != 0
    assert not mark.exists()
    assert runs(lambda: convert("deepspeed.checkpoint.ds_to_universal", "theirs"), mark)
