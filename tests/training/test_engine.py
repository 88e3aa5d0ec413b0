"""The requested engine and the one in use are compared field by field."""

from __future__ import annotations

import dataclasses
import json
from io import StringIO

import pytest
import torch
from rich.console import Console
from transformers import TrainerCallback, TrainingArguments

from packtrain.errors import LaunchError, PacktrainError
from packtrain.training.engine import Engine, EngineReport, asked_engine, differences, engine_in_force
from packtrain.training.memory.plan import parse_bytes
from packtrain.training.memory.state_bytes import state_bytes
from packtrain.training.progress import RichProgress
from packtrain.training.resharding import correct_resumed_optimizer, prepare_resume
from packtrain.training.run import fit
from tests.training.helpers import make_trainer

ZERO2 = Engine(
    name="DeepSpeed", world_size=2, zero_stage=2, offload_optimizer="none", offload_param="none", mixed_precision="no",
    gradient_accumulation_steps=4, gradient_clipping=1.0,
)  # fmt: skip


def arguments(tmp_path, **training) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, gradient_accumulation_steps=4, **training)


def test_what_the_launcher_and_the_recipe_ask_for(tmp_path):
    launched = {"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"}
    args = arguments(tmp_path)
    assert asked_engine(args, {"zero_optimization": {"stage": 2}}, launched) == ZERO2
    assert asked_engine(args, None, launched).zero_stage == 2  # accelerate's own default
    offloaded = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    assert asked_engine(args, offloaded, launched).offload_optimizer == "cpu"
    assert asked_engine(args, None, {"WORLD_SIZE": "2"}).name == "DDP"
    assert asked_engine(args, None, {}).name == "single process"
    assert asked_engine(args, None, {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}).name == "FSDP"


def test_every_difference_is_named():
    fields = {"name": "DDP", "zero_stage": None, "gradient_accumulation_steps": 1}
    found = differences(ZERO2, Engine(**{**vars(ZERO2), **fields}))
    assert len(found) == 3
    assert "zero_stage: 2 was requested, None is in use" in found
    assert differences(ZERO2, ZERO2) == []


def test_a_run_stores_what_is_in_force(tmp_path):
    trainer = make_trainer(tmp_path, strategy="balanced", max_steps=2)
    fit(trainer)
    stored = json.loads((tmp_path / "engine.json").read_text())
    assert stored["engine"]["name"] == "single process"
    assert stored["engine"]["gradient_accumulation_steps"] == trainer.plan.gradient_accumulation_steps
    elements = sum(parameter.numel() for parameter in trainer.model.parameters())
    assert stored["trained_parameters"] == elements
    assert stored["dtypes"] == {"trained": ["float32"], "frozen": []}
    before, after = stored["bytes_per_rank_before"][0], stored["bytes_per_rank_after"][0]
    assert before == {"parameters": 4 * elements, "gradients": 0, "master weights": 0, "optimizer states": 0}
    assert after == before | {"optimizer states": 8 * elements}


def test_another_engine_than_was_asked_for_stops_the_run(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, strategy="balanced", max_steps=2)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    with pytest.raises(LaunchError, match="DeepSpeed was requested, single process is in use.*zero_stage: 3"):
        fit(trainer)
    assert trainer.state.global_step == 0


def test_a_checkpoint_of_deepspeed_is_refused_without_it(tmp_path):
    trainer = make_trainer(tmp_path, strategy="balanced", max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    prepare_resume(trainer, tmp_path / "checkpoint-1")  # one of its own kind will do
    (tmp_path / "checkpoint-1/latest").write_text("global_step1")
    with pytest.raises(LaunchError, match="was written by DeepSpeed(.|\n)*resume with ZeRO stage 0, or"):
        prepare_resume(trainer, tmp_path / "checkpoint-1")
    for shard, stage in {
        "zero_pp_rank_0_mp_rank_00_optim_states.pt": 2,
        "zero_pp_rank_0_mp_rank_00_model_states.pt": 3,
    }.items():
        (tmp_path / "checkpoint-1/global_step1").mkdir(exist_ok=True)
        (tmp_path / "checkpoint-1/global_step1" / shard).touch()
        with pytest.raises(LaunchError, match=f"--launch zero{stage}"):  # the fix can be typed
            prepare_resume(trainer, tmp_path / "checkpoint-1")
    with pytest.raises(LaunchError, match="is not a checkpoint"):
        prepare_resume(trainer, tmp_path / "nowhere")


def test_an_optimizer_that_is_elsewhere_than_the_run_is_refused(tmp_path):
    """The failure of universal checkpoints under ZeRO-3: step counters shared by groups, so ahead of the run."""
    trainer = make_trainer(tmp_path, strategy="balanced", max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    correct_resumed_optimizer(trainer, tmp_path / "checkpoint-2")
    state = next(iter(trainer.optimizer.optimizer.state.values()))
    state["step"] = torch.tensor(4.0)
    with pytest.raises(LaunchError, match="the restored optimizer counts 2, 4 updates, and it counted 2"):
        correct_resumed_optimizer(trainer, tmp_path / "checkpoint-2")


def test_bytes_of_views_count_once():
    model = torch.nn.Linear(8, 8, bias=False)
    model.tied = model.weight
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    counted = state_bytes(model, optimizer)
    assert counted == {"parameters": 256, "gradients": 256, "master weights": 0, "optimizer states": 512}


@pytest.mark.parametrize(("text", "size"), [("80GiB", 80 * 2**30), ("80 GB", 80 * 10**9), ("512mib", 512 * 2**20)])
def test_amounts_of_memory(text, size):
    assert parse_bytes(text) == size
    with pytest.raises(ValueError, match="must be an amount of memory"):
        parse_bytes(text[:-1] + "x")


def test_an_error_of_the_first_forward_pass_is_not_taken_for_a_refused_setting(tmp_path):
    """Tried before the first update, when the trainer has taken its settings."""
    trainer = make_trainer(tmp_path, strategy="balanced", max_steps=2, probe_memory=True)

    def broken(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    trainer.model.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="^CUDA error") as raised:
        fit(trainer)
    assert not isinstance(raised.value, PacktrainError)


def test_a_setting_that_the_trainer_refuses_is_named(tmp_path):
    trainer = make_trainer(tmp_path, strategy="balanced", max_steps=2, lr_scheduler_kwargs={"nonsense": 1})
    with pytest.raises(PacktrainError, match="training: is rejected by the trainer.*nonsense"):
        fit(trainer)


def test_the_terminal_is_given_back_when_training_breaks(tmp_path):
    console = Console(file=StringIO(), force_terminal=True, width=80)
    trainer = make_trainer(tmp_path, strategy="balanced", max_steps=3)
    trainer.add_callback(RichProgress(console))

    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("broken")

    trainer.add_callback(Break())
    with pytest.raises(RuntimeError, match="broken"):
        fit(trainer)
    written = console.file.getvalue()
    hidden, shown = "\x1b[?25l", "\x1b[?25h"
    assert written.count(hidden) == written.count(shown) == 1


def test_fsdp_on_cpu_ranks_is_refused_with_what_runs_there(tmp_path):
    trainer = make_trainer(tmp_path, strategy="balanced", max_steps=2)
    report = EngineReport(trainer, dataclasses.replace(engine_in_force(trainer), name="FSDP"))
    with pytest.raises(LaunchError, match="FSDP was requested(.|\n)*train by ddp or zero2"):
        report.on_train_begin(trainer.args, trainer.state, trainer.control)
