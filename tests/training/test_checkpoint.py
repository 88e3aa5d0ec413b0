"""Which checkpoints stay, what stands in their way, and what is kept out of their manifests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback

from packtrain.errors import CheckpointError
from packtrain.training.checkpoints import HIDDEN, changes, choose_checkpoint, find_last_checkpoint, redacted
from packtrain.training.run import fit
from packtrain.training.sealing import MANIFEST, UNFINISHED, begin, is_sealed, read_manifest, seal, verify
from tests.faults.runs import same
from tests.faults.test_damage import flip
from tests.training.helpers import make_trainer, tiny_examples


def saving(output_dir, **training):
    return make_trainer(output_dir, strategy="balanced", **{"save_strategy": "steps", "save_steps": 1} | training)


def names(directory) -> set[str]:
    return {path.name for path in directory.iterdir() if path.name.startswith("checkpoint-")}


class BeforeTheSeal(TrainerCallback):
    """What is sealed when Trainer is done with its own files, and ours has not begun."""

    def __init__(self):
        self.seen: list[set[str]] = []

    def on_save(self, args, state, control, **kwargs):
        self.seen.append({path.name for path in sorted(args.output_dir_path.iterdir()) if is_sealed(path)})


def test_the_last_good_checkpoint_stays_until_the_new_one_is_sealed(tmp_path):
    trainer = saving(tmp_path, max_steps=4, save_total_limit=1)
    before = BeforeTheSeal()
    trainer.args.output_dir_path = tmp_path
    trainer.callback_handler.callbacks.insert(0, before)
    trainer.train()
    assert before.seen == [set(), {"checkpoint-1"}, {"checkpoint-2"}, {"checkpoint-3"}]
    assert names(tmp_path) == {"checkpoint-4"}


def test_rotation_removes_nothing_that_is_not_ours_and_follows_no_link(tmp_path):
    elsewhere = tmp_path / "elsewhere/checkpoint-1"
    begin(elsewhere)
    (elsewhere / "weights").write_text("dear")
    seal(elsewhere, {"step": 1, "sealed_at": 0})
    run = tmp_path / "run"
    (run / "checkpoint-900").mkdir(parents=True)
    (run / "checkpoint-900/mine.txt").write_text("of the user")
    (run / "checkpoint-800").symlink_to(elsewhere, target_is_directory=True)
    abandoned = run / "checkpoint-700"
    begin(abandoned)
    saving(run, max_steps=4, save_total_limit=2).train()
    assert names(run) == {"checkpoint-3", "checkpoint-4", "checkpoint-800", "checkpoint-900"}
    verify(elsewhere, read_manifest(elsewhere))
    assert (run / "checkpoint-900/mine.txt").exists()


def test_the_best_checkpoint_stays(tmp_path):
    trainer = saving(tmp_path, max_steps=4, save_total_limit=1)

    class Best(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            state.best_model_checkpoint = str(tmp_path / "checkpoint-2")

    trainer.add_callback(Best())
    trainer.train()
    assert names(tmp_path) == {"checkpoint-2", "checkpoint-4"}


def end_with_best(trainer, best) -> None:
    """Has the run end with the weights of that checkpoint, as an evaluation would have chosen it."""

    class Best(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            state.best_model_checkpoint = str(best)

    trainer.add_callback(Best())
    trainer.args.load_best_model_at_end = True


@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda file: shutil.rmtree(file.parent), None])
def test_a_run_does_not_end_with_a_damaged_best_checkpoint(tmp_path, damage):
    """Trainer reads it unverified, and keeps the last weights where it is gone, with a line in the log."""
    trainer, best = saving(tmp_path, max_steps=4), tmp_path / "checkpoint-2"
    end_with_best(trainer, best)

    class Damage(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if damage and state.global_step == 3:
                damage(best / "model.safetensors")

    trainer.add_callback(Damage())
    if damage is None:  # the control
        fit(trainer)
        assert same(trainer.model.state_dict(), load_file(best / "model.safetensors"))
        return
    with pytest.raises(CheckpointError, match="the best checkpoint, with whose weights the run was to end") as error:
        fit(trainer)
    assert "`load_best_model_at_end: false`" in error.value.fix
    last = saving(tmp_path, max_steps=4)
    fit(last, str(tmp_path / "checkpoint-4"))  # the fix
    assert same(last.model.state_dict(), load_file(tmp_path / "checkpoint-4/model.safetensors"))


def test_the_best_checkpoint_of_a_run_that_was_moved_is_found_where_it_lies(tmp_path):
    first = saving(tmp_path / "before", max_steps=3)
    end_with_best(first, tmp_path / "before/checkpoint-1")
    fit(first)
    (tmp_path / "before").rename(tmp_path / "after")
    moved = saving(tmp_path / "after", max_steps=4, save_total_limit=1)
    moved.args.load_best_model_at_end = True
    fit(moved, str(tmp_path / "after/checkpoint-3"))
    assert names(tmp_path / "after") == {"checkpoint-1", "checkpoint-4"}
    best = load_file(tmp_path / "after/checkpoint-1/model.safetensors")
    assert same(moved.model.state_dict(), best)
    shutil.rmtree(tmp_path / "after/checkpoint-1")
    gone = saving(tmp_path / "after", max_steps=5)
    gone.args.load_best_model_at_end = True
    with pytest.raises(CheckpointError, match="as the best checkpoint so far, which is gone"):
        fit(gone, str(tmp_path / "after/checkpoint-4"))


def test_a_clock_that_is_set_back_loses_no_checkpoint(tmp_path):
    """The newest is the one that was sealed last, whatever the clock said."""
    saving(tmp_path, max_steps=3).train()
    for step in (1, 2, 3):
        path = tmp_path / f"checkpoint-{step}"
        about = {key: value for key, value in read_manifest(path).items() if key not in ("format", "files")}
        seal(path, about | {"sealed_at": about["sealed_at"] + 10**9 * 86400})  # a day ahead
    saving(tmp_path, max_steps=6, save_total_limit=2).train(resume_from_checkpoint=True)
    assert names(tmp_path) == {"checkpoint-5", "checkpoint-6"}
    assert find_last_checkpoint(tmp_path, pytest.fail)[0].name == "checkpoint-6"


def test_other_packages_are_said_when_a_run_goes_on(tmp_path):
    saving(tmp_path, max_steps=2).train()
    path = tmp_path / "checkpoint-2"
    about = {key: value for key, value in read_manifest(path).items() if key not in ("format", "files")}
    said: list[str] = []
    ask = dict(output_dir=tmp_path, facts=lambda: about, say=said.append)
    choose_checkpoint(True, **ask)
    assert said == ["resuming after step 2 from checkpoint-2"]  # the control
    seal(path, about | {"versions": about["versions"] | {"torch": "1.13.1"}})
    choose_checkpoint(True, **ask)
    assert "resuming with other packages, which may round differently: torch 1.13.1 is now " in said[1]


def test_what_stands_in_the_place_of_a_checkpoint_is_moved_aside(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1/mine.txt").write_text("of the user")
    begin(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2/rng_state_7.pth").write_text("of a run that was killed")
    saving(tmp_path, max_steps=2).train()
    (foreign,) = tmp_path.glob("checkpoint-1.foreign-*")
    assert (foreign / "mine.txt").read_text() == "of the user"
    assert not (tmp_path / "checkpoint-2/rng_state_7.pth").exists()
    assert all(is_sealed(tmp_path / f"checkpoint-{step}") for step in (1, 2))


def test_a_manifest_says_what_it_is_of(tmp_path):
    trainer = saving(tmp_path, max_steps=2)
    trainer.train()
    manifest = read_manifest(tmp_path / "checkpoint-2")
    assert manifest["step"] == 2 and manifest["world_size"] == 1 and manifest["plan_hash"] == trainer.plan.hash
    assert "torch" in manifest["versions"]
    files = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert manifest["files"].keys() == files - {MANIFEST} and UNFINISHED not in files


def test_a_link_is_not_sealed(tmp_path):
    begin(tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1/model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is a link"):
        seal(tmp_path / "checkpoint-1", {"step": 1, "sealed_at": 0})


def test_secrets_stay_out():
    tree = {
        "training": {"hub_token": "hf_secret", "push_to_hub_token": "hf_secret", "hub_model_id": "me/model"},
        "data": {"path": "https://me:hf_secret@host/rows.jsonl"},
        "model": {"config": {"api_key": "hf_secret", "pad_token": "<pad>", "max_tokens": 3}},
    }
    assert "hf_secret" not in str(redacted(tree))
    assert redacted(tree)["data"]["path"] == f"https://{HIDDEN}@host/rows.jsonl"
    assert redacted(tree)["model"]["config"] == {"api_key": HIDDEN, "pad_token": "<pad>", "max_tokens": 3}
    assert redacted(tree)["training"]["hub_model_id"] == "me/model"


def test_every_door_verifies(tmp_path):
    """`fit` and `train` as well as the command line; True is the newest that holds."""
    saving(tmp_path, max_steps=4).train()
    path = tmp_path / "checkpoint-4/optimizer.pt"
    path.write_bytes(path.read_bytes()[:-1])
    for open_door in (
        lambda: fit(saving(tmp_path, max_steps=4), str(path.parent)),
        lambda: saving(tmp_path, max_steps=4).train(resume_from_checkpoint=str(path.parent)),
    ):
        with pytest.raises(CheckpointError, match="optimizer.pt has"):
            open_door()
    trainer = saving(tmp_path, max_steps=4)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.checkpoints.chosen == tmp_path / "checkpoint-3" and trainer.state.global_step == 4
    with pytest.raises(CheckpointError, match="(?s)with different settings.*the tokenised examples"):
        make_trainer(tmp_path, strategy="balanced", examples=tiny_examples(59)).train(resume_from_checkpoint=True)


def test_another_engine_is_a_change_that_may_be_allowed_and_another_learning_rate_is_not():
    then = {"recipe": {"training": {"deepspeed": "zero2.json", "learning_rate": 1e-3}}}
    now = {"recipe": {"training": {"deepspeed": "zero3.json", "learning_rate": 1e-4}}}
    assert {change.key: change.safe for change in changes(then, now)} == {
        "training.deepspeed": True,
        "training.learning_rate": False,
    }


def test_a_checkpoint_without_an_optimizer_is_skipped_and_refused(tmp_path):
    saving(tmp_path, max_steps=2, save_only_model=True).train()
    assert not (tmp_path / "checkpoint-2/optimizer.pt").exists()
    for resume in (True, str(tmp_path / "checkpoint-2")):
        with pytest.raises(CheckpointError, match="has no optimizer state"):
            saving(tmp_path, max_steps=4).train(resume_from_checkpoint=resume)


def test_how_often_to_save_and_log_is_what_the_resumed_run_asks_for(tmp_path):
    saving(tmp_path, max_steps=8, save_total_limit=None).train()
    for step in range(3, 9):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    resumed = saving(tmp_path, max_steps=8, save_steps=4, logging_steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert names(tmp_path) == {"checkpoint-1", "checkpoint-2", "checkpoint-4", "checkpoint-8"}
    assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == [1, 2, 3, 6]
