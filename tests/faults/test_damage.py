"""Every file of a checkpoint, damaged in every way: found out, said, and the older checkpoint used."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from packtrain.errors import CheckpointError
from packtrain.recipe.reader import load_recipe
from packtrain.training.checkpoints import find_last_checkpoint
from packtrain.training.run import train
from packtrain.training.sealing import MANIFEST, read_manifest, seal, verify
from tests.faults.runs import STEPS, same, weights, write_recipe


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero(path: Path) -> None:
    data = path.read_bytes()
    quarter = len(data) // 4
    path.write_bytes(data[:quarter] + bytes(len(data) - 2 * quarter) + data[len(data) - quarter :])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0x10
    path.write_bytes(data)


DAMAGES = {"truncated": truncate, "zeroed": zero, "flipped": flip, "removed": Path.unlink}
EXPECTED = {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", MANIFEST}


@pytest.fixture
def run_dir(unbroken, tmp_path) -> Path:
    """A run with the last two checkpoints."""
    for step in (STEPS - 1, STEPS):
        shutil.copytree(unbroken / f"checkpoint-{step}", tmp_path / f"run/checkpoint-{step}")
    return tmp_path / "run"


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damaged_file_is_found_and_the_older_checkpoint_taken(run_dir, damage):
    newest = run_dir / f"checkpoint-{STEPS}"
    names = sorted(path.name for path in newest.iterdir())
    assert set(names) >= EXPECTED
    assert find_last_checkpoint(run_dir, say=pytest.fail)[0] == newest  # control: whole, it is taken without a word
    for name in names:
        whole = (newest / name).read_bytes()
        DAMAGES[damage](newest / name)
        said = []
        assert find_last_checkpoint(run_dir, said.append)[0].name == f"checkpoint-{STEPS - 1}", name
        assert len(said) == 1 and said[0].startswith(f"skipped {newest.name}: ")
        assert ("manifest" if name == MANIFEST else name) in said[0]
        (newest / name).write_bytes(whole)


@pytest.mark.ci
@pytest.mark.slow
def test_no_bit_of_the_manifest_matters_less_than_another(run_dir):
    """A flip anywhere is found, or leaves a manifest of the same meaning (blanks between words)."""
    path = run_dir / f"checkpoint-{STEPS}" / MANIFEST
    whole, found = path.read_bytes(), read_manifest(path.parent)
    refused = 0
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            assert read_manifest(path.parent) == found
        except CheckpointError:
            refused += 1
    assert refused > 0.95 * len(range(0, len(whole), 7))


@pytest.mark.ci
@pytest.mark.slow
def test_names_that_lead_out_of_the_directory_are_refused(run_dir, tmp_path):
    newest = run_dir / f"checkpoint-{STEPS}"
    files = read_manifest(newest)["files"]
    (tmp_path / "run/scheduler.pt").write_bytes((newest / "scheduler.pt").read_bytes())
    verify(newest, {"files": files})  # control
    for name in ("../scheduler.pt", str(newest / "scheduler.pt")):
        with pytest.raises(CheckpointError, match="points outside of it"):
            verify(newest, {"files": files | {name: files["scheduler.pt"]}})


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.parametrize("text", [b"global_step\xb32", b"", b"/", b"\0"])
def test_a_damaged_name_of_shards_is_found_like_any_damage(run_dir, text):
    """`latest` names what a conversion may have added since, so it is read before it is verified."""
    newest = run_dir / f"checkpoint-{STEPS}"
    (newest / "latest").write_text("global_step12")
    seal(newest, {key: value for key, value in read_manifest(newest).items() if key not in ("format", "files")})
    assert find_last_checkpoint(run_dir, say=pytest.fail)[0] == newest  # control
    (newest / "latest").write_bytes(text)
    said = []
    assert find_last_checkpoint(run_dir, said.append)[0].name == f"checkpoint-{STEPS - 1}"
    assert "latest has" in said[0]
    with pytest.raises(CheckpointError, match="latest has"):
        train(load_recipe(write_recipe(run_dir.parent)), resume=str(newest))


@pytest.mark.ci
@pytest.mark.slow
def test_nothing_good_left_is_an_error_with_every_reason(run_dir):
    (run_dir / f"checkpoint-{STEPS}" / MANIFEST).unlink()
    truncate(run_dir / f"checkpoint-{STEPS - 1}/optimizer.pt")
    with pytest.raises(
        CheckpointError, match="(?s)no valid checkpoint to resume from.*has no manifest.*optimizer.pt has"
    ):
        find_last_checkpoint(run_dir)


@pytest.mark.ci
@pytest.mark.slow
def test_a_named_checkpoint_that_is_damaged_is_refused(run_dir):
    flip(run_dir / f"checkpoint-{STEPS}/model.safetensors")
    with pytest.raises(CheckpointError, match="model.safetensors has changed"):
        train(load_recipe(write_recipe(run_dir.parent)), resume=str(run_dir / f"checkpoint-{STEPS}"))


@pytest.mark.ci
@pytest.mark.slow
def test_a_run_goes_on_from_the_older_checkpoint_and_ends_as_if_nothing_had_been(run_dir, unbroken):
    flip(run_dir / f"checkpoint-{STEPS}/optimizer.pt")
    console = Console(record=True, width=200)
    train(load_recipe(write_recipe(run_dir.parent)), resume=True, console=console)
    said = console.export_text()
    assert f"skipped checkpoint-{STEPS}: is damaged: optimizer.pt has changed" in said
    assert f"resuming after step {STEPS - 1} from checkpoint-{STEPS - 1}" in said
    assert same(weights(run_dir), weights(unbroken))
    verify(run_dir / f"checkpoint-{STEPS}", read_manifest(run_dir / f"checkpoint-{STEPS}"))  # written anew
    assert not list(run_dir.glob("*.previous"))


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rate=0.01", r"with different settings.*training.learning_rate: was 0.003, is now 0.01"),
        ("num_rows=59", r"with different settings.*data.num_rows: was 60, is now 59.*the tokenised examples.*the plan"),
        ("examples_per_step=12", r"with different settings.*batching.examples_per_step.*the plan"),
        ("model.config.num_hidden_layers=2", r"with different settings.*model.config: "),
        ("lora.r=4", r"with different settings.*lora.r: was unset, is now 4"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_the_differences(run_dir, override, message):
    recipe = load_recipe(write_recipe(run_dir.parent), [override])
    for allow_changes in (False, True):
        with pytest.raises(CheckpointError, match=f"(?s){message}"):
            train(recipe, resume=True, allow_changes=allow_changes)


@pytest.mark.ci
@pytest.mark.slow
def test_harmless_changes_are_accepted_when_allowed(run_dir, unbroken):
    changes = ["logging_steps=3", "max_tokens=2048", "batching.strategy=padding_free"]
    recipe = load_recipe(write_recipe(run_dir.parent), changes)
    with pytest.raises(
        CheckpointError, match=r"(?s)max_tokens: was 1024, is now 2048.*logging_steps.*allow_changes=True"
    ):
        train(recipe, resume=True)
    console = Console(record=True, width=200)
    summary = train(recipe, resume=True, allow_changes=True, console=console)
    assert summary.updates == STEPS
    assert re.search(r"resuming with changes:\s+batching.max_tokens", console.export_text())
