"""Runs that end early or go on: early stopping at the evaluation it should, also resumed; and a longer run's command."""

from __future__ import annotations

import io
import json
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from packtrain.compare.experiment import load_experiment
from packtrain.errors import CheckpointError, LaunchError, PacktrainError, RecipeError
from packtrain.recipe.reader import load_recipe
from packtrain.training.continuing import resume_command
from packtrain.training.launch import LAUNCHED_BY
from packtrain.training.run import build, fit, train
from packtrain.training.sealing import read_manifest, seal

RECIPE = """
model:
  config: {model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}
  tokenizer_vocab_size: 300
data: {path: "packtrain:arithmetic", num_rows: 60, eval_size: 10, max_length: 512, overflow: drop}
batching: {examples_per_step: 10, max_tokens: 1024}
training: {output_dir: OUT, use_cpu: true, learning_rate: 0.3, lr_scheduler_type: constant, num_train_epochs: 2,
  logging_steps: 1, report_to: none, save_strategy: steps, save_steps: 1, eval_strategy: steps, eval_steps: 1}
"""
PATIENCE = 2


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.replace("OUT", str(tmp_path / "run")))
    return path


def expected_stop(losses: list[float], patience: int, threshold: float) -> int | None:
    """The update after whose evaluation `patience` in a row were no more than `threshold` better than the best before."""
    bad, best = 0, float("inf")
    for step, loss in enumerate(losses, start=1):
        bad = 0 if loss < best - threshold else bad + 1
        best = min(best, loss)
        if bad == patience:
            return step
    return None


def test_early_stopping_stops_where_the_held_out_loss_says_and_counts_on_after_a_resume(file, tmp_path):
    trainer = build(load_recipe(file))
    fit(trainer)
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if entry.get("step") and "eval_loss" in entry]
    assert trainer.state.global_step == len(losses) == 10  # control: without the key every update is made
    stops = {by: expected_stop(losses, PATIENCE, by) for by in (0.1, 0.3, 1.0, 100.0)}  # losses differ between machines
    threshold, stop = next((by, stop) for by, stop in stops.items() if stop is not None and 2 < stop < 10)

    keys = [f"early_stopping_patience={PATIENCE}", f"early_stopping_threshold={threshold}"]
    keys.append(f"output_dir={tmp_path / 'stopped'}")
    out = io.StringIO()
    summary = train(load_recipe(file, keys), console=Console(file=out, width=200))
    assert summary.updates == stop
    assert (
        f"stopping early after step {stop}: 2 evaluations in a row without a loss more than {threshold:g} better"
        in out.getvalue()
    )
    assert out.getvalue().count("stopping early") == 1  # not by the evaluation after the end
    resumed = train(load_recipe(file, keys), resume=str(tmp_path / f"stopped/checkpoint-{stop - 1}"))
    assert resumed.updates == stop  # one of the two was counted before; from 0 it would be one update more
    patient = load_recipe(file, [*keys, "early_stopping_threshold=100"])  # nothing is so much better
    assert train(patient, resume=str(tmp_path / "stopped/checkpoint-1"), allow_changes=True).updates == 3


def test_a_loss_that_is_better_by_less_than_the_threshold_is_not_called_worse(file):
    """What is said has the threshold, in one line."""
    out = io.StringIO()
    keys = ["early_stopping_patience=1", "early_stopping_threshold=100", "learning_rate=1e-3"]
    assert train(load_recipe(file, keys), console=Console(file=out, width=40)).updates == 2
    last = (
        "stopping early after step 2: 1 evaluation in a row without a loss more than 100 better than the best before it"
    )
    assert sum(line == last for line in out.getvalue().splitlines()) == 1


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["early_stopping_patience=2", "eval_strategy=no"], "counts evaluations during training, and there are none"),
        (["early_stopping_threshold=0.1"], "has no effect without `training.early_stopping_patience`"),
        (["early_stopping_patience=0"], "must be a whole number above 0"),
        (["early_stopping_patience=1", "early_stopping_threshold=-1"], "must be a number from 0 on"),
    ],
)
def test_early_stopping_that_could_not_work_is_refused(file, overrides, expected):
    with pytest.raises(RecipeError, match=expected):
        load_recipe(file, overrides)


def test_a_comparison_of_a_recipe_that_stops_early_does_not(file):
    """It evaluates by itself."""
    for variant in load_experiment(file, ["early_stopping_patience=2", "load_best_model_at_end=true"]).variants:
        assert variant.recipe.training["early_stopping_patience"] is None
        assert variant.recipe.training["load_best_model_at_end"] is False
    assert "early_stopping_patience" not in load_experiment(file).variants[0].recipe.training  # nothing new to store


def test_a_finished_run_goes_on_by_the_command_that_is_said(file):
    """The one in the error of a recipe with more epochs, and the one that an unchanged recipe is told."""
    shorter = ["num_train_epochs=1", "save_steps=5", "eval_strategy=no"]
    assert train(load_recipe(file, shorter)).updates == 5
    longer = load_recipe(file, [*shorter[1:], "num_train_epochs=2"])
    with pytest.raises(CheckpointError) as refused:
        train(longer, resume=True)
    command = f"packtrain train {file} --set save_steps=5 --set eval_strategy=no --set num_train_epochs=2 --resume"
    assert refused.value.fix == f"undo these changes, or accept them with allow_changes=True: {command} --allow-changes"

    out = io.StringIO()
    assert train(load_recipe(file, shorter), resume=True, console=Console(file=out, width=200)).updates == 5
    head, _, said = next(
        line for line in out.getvalue().splitlines() if "updates of this run are made" in line
    ).partition("; more of them: ")
    assert head == "all 5 updates of this run are made"
    words = shlex.split(said)
    assert words[:3] == ["packtrain", "train", str(file)] and words[-2:] == ["--resume", "--allow-changes"]
    overrides = [word for before, word in zip(words, words[1:], strict=False) if before == "--set"]
    out.truncate(0)
    again = train(load_recipe(file, overrides), resume=True, allow_changes=True, console=Console(file=out, width=200))
    assert again.updates == 10 and "updates of this run are made" not in out.getvalue()


def test_the_command_for_more_starts_as_the_run_was_started(file, monkeypatch):
    monkeypatch.setenv(LAUNCHED_BY, "zero2")
    command = f"packtrain train {file} --set training.max_steps=9 --launch zero2 --resume --allow-changes"
    assert resume_command(load_recipe(file), "training.max_steps=9") == command


def test_a_finished_run_of_deepspeed_is_refused_without_it_before_a_command_is_said(file, tmp_path):
    keys = ["num_train_epochs=1", "save_steps=5", "eval_strategy=no"]
    train(load_recipe(file, keys))
    checkpoint = tmp_path / "run/checkpoint-5"
    facts = {key: value for key, value in read_manifest(checkpoint).items() if key not in ("format", "files", "sha256")}
    (checkpoint / "latest").write_text("global_step5")
    seal(checkpoint, facts)
    out = io.StringIO()
    with pytest.raises(LaunchError, match="was written by DeepSpeed"):
        train(load_recipe(file, keys), resume=True, console=Console(file=out, width=200))
    assert "updates of this run are made" not in out.getvalue()


def test_the_figures_of_a_resumed_run_are_those_of_the_whole_run(file, tmp_path):
    """Also of one with nothing left to do; a checkpoint without the figures of what was before says so."""
    keys = ["eval_strategy=no", "save_steps=5"]
    whole = train(load_recipe(file, keys))
    for checkpoint in (5, 10):
        again = train(load_recipe(file, keys), resume=str(tmp_path / f"run/checkpoint-{checkpoint}"))
        names = ("real_tokens", "supervised_tokens", "padding_share", "updates", "epochs")
        assert {name: getattr(again, name) for name in names} == {name: getattr(whole, name) for name in names}
        assert again.seconds > 0 and again.peak_memory >= whole.peak_memory and again.since == ""
    assert f"{whole.real_tokens:,}, {whole.supervised_tokens:,} of" in (tmp_path / "run/model/README.md").read_text()

    older = tmp_path / "run/checkpoint-5"
    facts = {key: value for key, value in read_manifest(older).items() if key not in ("format", "files", "sha256")}
    del facts["measured"]  # as earlier releases wrote it
    seal(older, facts)
    partly = train(load_recipe(file, keys), resume=str(older))
    assert 0 < partly.real_tokens < whole.real_tokens
    since = "(since the resume after update 5)"
    assert partly.since == f" {since}" and since in (tmp_path / "run/model/README.md").read_text()


def test_fewer_updates_than_were_made_are_refused_and_the_record_stays(file, tmp_path):
    keys = ["eval_strategy=no", "save_steps=5", "num_train_epochs=2"]
    train(load_recipe(file, keys))
    records = [tmp_path / "run" / name for name in ("recipe.yaml", "summary.json", "model/README.md")]
    before = [path.read_text() for path in records]
    fewer = load_recipe(file, [*keys[:2], "num_train_epochs=1"])
    with pytest.raises(CheckpointError, match="10 updates made, and these settings ask for 5") as refused:
        train(fewer, resume=True, allow_changes=True)
    assert (
        refused.value.fix.count("num_train_epochs") == 1 and "--set training.num_train_epochs=3 " in refused.value.fix
    )
    assert [path.read_text() for path in records] == before

    said = io.StringIO()
    other = load_recipe(file, [*keys, "batching.strategy=pad_longest"])
    summary = train(other, resume=True, allow_changes=True, console=Console(file=said, width=200))
    assert "the run's record keeps those it was trained with" in said.getvalue() and summary.strategy == "balanced"
    assert yaml.safe_load(records[0].read_text())["batching"]["strategy"] == "balanced"
    assert "`balanced`, at most" in records[2].read_text()


def test_a_run_that_stopped_early_has_nothing_to_do_until_its_patience_is_raised(file, tmp_path):
    keys = [f"early_stopping_patience={PATIENCE}", "early_stopping_threshold=100"]
    stop = train(load_recipe(file, keys)).updates
    assert stop == 1 + PATIENCE
    said = io.StringIO()
    again = train(load_recipe(file, keys), resume=True, console=Console(file=said, width=300))
    assert again.updates == stop and again.real_tokens > 0
    assert f"this run stopped early after update {stop}; nothing to do; to go on raise" in said.getvalue()
    command = shlex.split(said.getvalue().partition("early_stopping_patience: ")[2].splitlines()[0])
    overrides = [word for before, word in zip(command, command[1:], strict=False) if before == "--set"]
    named = [override.partition("=")[0].rpartition(".")[2] for override in overrides]
    assert named == ["early_stopping_threshold", "early_stopping_patience"]
    assert train(load_recipe(file, overrides), resume=True, allow_changes=True).updates > stop


def test_the_best_model_is_recorded_under_its_own_step(file, tmp_path):
    """Not under the last, which has other answers; and a run at its end has not stopped early."""
    asked = ["load_best_model_at_end=true", "training.sample_prompts=[two]", "max_steps=3"]
    out = io.StringIO()
    summary = train(load_recipe(file, asked), console=Console(file=out, width=200))
    best = summary.best_step
    evaluations = {
        entry["step"]: entry["eval_loss"]
        for entry in json.loads((tmp_path / "run/checkpoint-3/trainer_state.json").read_text())["log_history"]
        if "eval_loss" in entry and entry["step"]
    }
    assert evaluations[best] == min(evaluations.values()) and best < 3, evaluations
    assert summary.held_out_loss_after == pytest.approx(evaluations[best]) and summary.updates == 3
    assert f"the best model, of step {best}, is loaded" in out.getvalue()
    assert f"(step {best}, the best)" in dict(summary._lines())["held-out loss"]
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3]

    last = next(step for step, loss in evaluations.items() if step > best and loss > evaluations[best])
    ends = ["early_stopping_patience=1", f"max_steps={last}", f"output_dir={tmp_path / 'ends'}"]
    out = io.StringIO()
    assert train(load_recipe(file, ends), console=Console(file=out, width=200)).updates == last
    assert "stopping early" not in out.getvalue()


def test_resuming_and_overwriting_is_refused(file):
    with pytest.raises(PacktrainError, match="overwrite=True: would remove the run that resume=True continues"):
        train(load_recipe(file), resume=True, overwrite=True)


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_loaded(file):
    absent = next(name for name in ("clearml", "neptune", "swanlab", "wandb") if find_spec(name) is None)
    for given in (absent, f"[none, {absent}]"):
        with pytest.raises(PacktrainError, match=f"training.report_to: {absent} is not installed") as refused:
            train(load_recipe(file, [f"report_to={given}", "data.path=nowhere.jsonl"]))
        assert f"pip install {absent}" in refused.value.fix
    with pytest.raises(PacktrainError, match="is no tracker that transformers knows"):
        train(load_recipe(file, ["report_to=wandbb"]))
    with pytest.raises(PacktrainError, match="nowhere"):  # control
        train(load_recipe(file, ["data.path=nowhere.jsonl"]))
