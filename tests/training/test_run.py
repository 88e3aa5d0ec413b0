"""A recipe, trained for real: the summary, the saved model, LoRA, resume after a kill, two processes."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from packtrain.errors import ModelError, PacktrainError
from packtrain.recipe.reader import load_recipe
from packtrain.recipe.recipe import Recipe
from packtrain.training.arguments import use_cpu_by_default
from packtrain.training.run import train
from packtrain.training.sealing import read_manifest, verify

RECIPE = """
model:
  config: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4,
           num_key_value_heads: 2, attention_dropout: 0.1}
  tokenizer_vocab_size: 300
data: {path: "packtrain:arithmetic", num_rows: 120, eval_size: 20, max_length: 512, overflow: truncate}
batching: {examples_per_step: 10, max_tokens: 1024}
training: {output_dir: OUT, use_cpu: true, learning_rate: 3e-3, num_train_epochs: 2, logging_steps: 1,
           report_to: none, save_strategy: steps, save_steps: 1}
"""


@pytest.fixture
def recipe_file(tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.replace("OUT", str(tmp_path / "run")))
    return path


def command(recipe_file: Path, *more: str, ranks: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return [sys.executable, *launcher, "-m", "packtrain", "train", str(recipe_file), *more]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def summary_of(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "run/summary.json").read_text())


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def test_a_recipe_trains_and_leaves_a_model_that_loads(tmp_path, recipe_file):
    summary = train(load_recipe(recipe_file))
    assert summary.held_out_loss_after < summary.held_out_loss_before - 0.3
    assert summary.updates == 20 and summary.examples == 100 and summary.padding_share == 0.0
    stored = summary_of(tmp_path)
    assert stored["updates"] == 20 and stored["data"]["rows"] == 120
    assert stored["real_tokens"] > 0 and stored["supervised_tokens"] < stored["real_tokens"]
    assert {"torch", "transformers", "packtrain"} <= stored["versions"].keys() and stored["machine"]["cpu"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    assert model.config.vocab_size == len(tokenizer) and tokenizer.pad_token != tokenizer.eos_token
    assert model.config.use_cache  # training without a cache does not slow generation down for good


def test_a_recipe_made_in_python_trains(tmp_path, recipe_file):
    """It was read from no file, so nothing names it."""
    recipe = Recipe.model_validate(load_recipe(recipe_file, ["max_steps=1", "save_strategy=no"]).to_dict())
    assert recipe.sources is None and train(recipe).recipe == "recipe"
    assert summary_of(tmp_path)["recipe"] == "recipe"


def test_lora_trains_the_adapter_only(tmp_path, recipe_file):
    settings = ["lora.r=4", "lora.target_modules=all-linear", "max_steps=3", "training.save_strategy=no"]
    summary = train(load_recipe(recipe_file, settings))
    assert 0 < summary.trainable_parameters < summary.frozen_parameters
    assert (tmp_path / "run/model/adapter_model.safetensors").exists()
    assert not (tmp_path / "run/model/model.safetensors").exists()


def test_held_out_loss_does_not_depend_on_the_layout(recipe_file):
    before = [
        train(
            load_recipe(recipe_file, [f"strategy={name}", "max_steps=1", "save_strategy=no"]), overwrite=True
        ).held_out_loss_before
        for name in ("balanced", "pad_longest", "bfd")
    ]
    assert before[1:] == pytest.approx(before[:1] * 2, rel=1e-5)


OPT = (
    "{model_type: opt, hidden_size: 32, ffn_dim: 64, num_hidden_layers: 2, num_attention_heads: 4, "
    "word_embed_proj_dim: 32}"
)


def test_a_model_that_leaks_between_documents_is_refused(recipe_file):
    """OPT builds its mask without position_ids, so sdpa lets documents of a flat batch see each other."""
    leaking = ["attn_implementation=sdpa", f"model.config={OPT}", "max_steps=1", "save_strategy=no"]
    with pytest.raises(
        ModelError, match="(?s)attention leaks between documents of a flat batch with sdpa: leaks.*allow_contamination"
    ):
        train(load_recipe(recipe_file, leaking))
    train(load_recipe(recipe_file, [*leaking, "allow_contamination=true"]))
    padded = load_recipe(recipe_file, [*leaking, "strategy=pad_longest"])
    train(padded, overwrite=True)  # control: padded, the same model is fine


@pytest.mark.parametrize(("device", "use_cpu"), [("mps", True), ("cuda", False), (None, True)])
def test_a_device_without_float64_is_left_alone(monkeypatch, device, use_cpu):
    """Apple's: sums over tokens are float64."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: device is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *args: device and torch.device(device))
    assert use_cpu_by_default() is use_cpu


def test_nothing_to_resume_is_an_error(recipe_file):
    with pytest.raises(PacktrainError, match="no valid checkpoint to resume from"):
        train(load_recipe(recipe_file), resume=True)


@pytest.mark.ci
@pytest.mark.slow
def test_killed_and_resumed_ends_with_the_weights_of_an_unbroken_run(tmp_path, recipe_file):
    train(load_recipe(recipe_file))
    unbroken = weights_of(tmp_path / "run/model")
    recipe_file.write_text(recipe_file.read_text().replace(str(tmp_path / "run"), str(tmp_path / "killed")))
    for _ in range(20):
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        process = subprocess.Popen(command(recipe_file), env=environment(), stdout=subprocess.DEVNULL)
        while not (tmp_path / "killed/checkpoint-8/packtrain_manifest.json").exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if not (tmp_path / "killed/model").exists():
            break  # the kill came in time
    assert not (tmp_path / "killed/model").exists()
    done = subprocess.run(
        command(recipe_file, "--resume", str(tmp_path / "killed/checkpoint-8")),
        env=environment(), capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    resumed = weights_of(tmp_path / "killed/model")
    assert all(torch.equal(resumed[name], value) for name, value in unbroken.items())


@pytest.mark.ci
@pytest.mark.slow
def test_resuming_a_finished_run_changes_nothing(tmp_path, recipe_file):
    """Also where `max_steps` ends within an epoch, and where the run ends with its last one."""
    for settings in (["max_steps=3"], []):
        recipe_file.write_text(RECIPE.replace("OUT", str(tmp_path / f"run{len(settings)}")))
        first = train(load_recipe(recipe_file, settings))
        weights = weights_of(Path(first.model_dir))
        again = train(load_recipe(recipe_file, settings), resume=True)
        assert again.updates == first.updates and again.epochs == first.epochs
        assert all(torch.equal(weights[name], value) for name, value in weights_of(Path(again.model_dir)).items())


def test_a_directory_under_home_is_one_directory(tmp_path, recipe_file, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    summary = train(load_recipe(recipe_file, ["training.output_dir=~/run", "max_steps=1"]))
    assert summary.output_dir == str(tmp_path / "home/run")
    found = {path.name for path in (tmp_path / "home/run").iterdir()}
    assert {"model", "recipe.yaml", "summary.json", "engine.json", "checkpoint-1"} <= found


def test_a_run_is_not_replaced_unless_asked_to(tmp_path, recipe_file):
    first = train(load_recipe(recipe_file, ["max_steps=2", "save_steps=1", "save_strategy=steps"]))
    (tmp_path / "run/nonfinite.jsonl").write_text("of the first run")
    (tmp_path / "run/mine.txt").write_text("not a file of packtrain's")
    recipe, weights = load_recipe(recipe_file, ["max_steps=1", "learning_rate=0.1"]), weights_of(Path(first.model_dir))
    with pytest.raises(PacktrainError, match="contains a finished run") as caught:
        train(recipe)
    assert (
        caught.value.key == "training.output_dir" and "resume=True, replace it with overwrite=True" in caught.value.fix
    )
    assert all(torch.equal(weights[name], value) for name, value in weights_of(Path(first.model_dir)).items())

    without = load_recipe(
        recipe_file, ["max_steps=1", "save_strategy=no", f"training.output_dir={tmp_path / 'without'}"]
    )
    train(without)
    with pytest.raises(PacktrainError, match="which has kept no checkpoint to continue from") as caught:
        train(without)
    assert caught.value.fix == "replace it with overwrite=True, or choose another training.output_dir"

    (tmp_path / "run/summary.json").unlink()  # as after a crash
    with pytest.raises(PacktrainError, match="contains the checkpoints of a run"):
        train(recipe)
    with pytest.raises(PacktrainError):  # what is refused for another reason removes nothing
        train(load_recipe(recipe_file, ["data.eval_size=0", "data.eval_path=nowhere.jsonl"]), overwrite=True)
    assert (tmp_path / "run/checkpoint-1").exists() and Path(first.model_dir).exists()
    train(recipe, overwrite=True)
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert "checkpoint-2" not in left and "nonfinite.jsonl" not in left and {"checkpoint-1", "mine.txt"} <= left
    assert any(not torch.equal(weights[name], value) for name, value in weights_of(tmp_path / "run/model").items())


def test_updates_that_are_left_out_are_said(tmp_path, recipe_file, caplog):
    summary = train(load_recipe(recipe_file, ["on_nonfinite=skip", "learning_rate=1e12", "max_steps=4"]))
    assert summary.skipped_updates >= 1 and summary_of(tmp_path)["skipped_updates"] == summary.skipped_updates
    assert (
        len(re.findall(r"skipped update \d+: its (loss|gradient) is not finite", caplog.text))
        == summary.skipped_updates
    )
    assert any(name == "skipped" for name, _ in summary._lines())


def test_half_precision_on_a_cpu_is_refused(recipe_file):
    with pytest.raises(PacktrainError, match="training.fp16: has no effect on a CPU"):
        train(load_recipe(recipe_file, ["fp16=true"]))


def test_examples_beyond_the_positions_of_the_model(recipe_file):
    """Learnt ones are an error before training, others a warning."""
    gpt2 = "model.config={model_type: gpt2, n_layer: 1, n_embd: 16, n_head: 2, n_positions: 16}"
    with pytest.raises(PacktrainError, match=r"data.max_length: an example has \d+ tokens, and the model 16 positions"):
        train(load_recipe(recipe_file, [gpt2, "attn_implementation=auto", "max_steps=1"]))
    out = io.StringIO()
    short = ["model.config.max_position_embeddings=16", "max_steps=1"]
    train(load_recipe(recipe_file, short), console=Console(file=out, width=200))
    assert "the model was made for 16 positions" in out.getvalue()


@pytest.mark.ci
@pytest.mark.slow
def test_two_processes_train_the_recipe_as_one_does(tmp_path, recipe_file):
    alone = train(load_recipe(recipe_file, ["model.config.attention_dropout=0"]))
    done = subprocess.run(
        command(recipe_file, "--overwrite", "--set", "model.config.attention_dropout=0", ranks=2),
        env=environment(), capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    both = summary_of(tmp_path)
    rates = [float(rate.replace(",", "")) for rate in re.findall(r"([\d,]+) real tokens/s", done.stdout)]
    assert max(rates) >= round(both["real_tokens_per_second"])  # the mean of the run: rates are of both ranks, too
    assert both["world_size"] == 2 and both["real_tokens"] == alone.real_tokens
    assert both["train_loss_last"] == pytest.approx(alone.train_loss_last, rel=1e-5)
    assert both["held_out_loss_after"] == pytest.approx(alone.held_out_loss_after, rel=1e-5)
    manifest = read_manifest(tmp_path / "run/checkpoint-20")
    assert manifest["world_size"] == 2 and {"rng_state_0.pth", "rng_state_1.pth"} <= manifest["files"].keys()
    verify(tmp_path / "run/checkpoint-20", manifest)
