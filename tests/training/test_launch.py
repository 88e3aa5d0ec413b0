"""`--launch NAME` is `accelerate launch --config_file launch/NAME.yaml`, on every visible GPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from packtrain.cli import main
from packtrain.errors import LaunchError
from packtrain.training.launch import LAUNCHED_BY, engine_of, find_launch_file, launch_command, relaunch

LAUNCH = Path(__file__).parents[2] / "launch"
LAUNCHER = [sys.executable, "-m", "packtrain.cli.launcher", "--config_file"]


def test_the_command_is_the_documented_one(monkeypatch):
    monkeypatch.chdir(LAUNCH.parent)
    file = find_launch_file("zero2")
    assert file == LAUNCH / "zero2.yaml"
    words = ["train", "recipes/sft.yaml", "--set", "training.seed=1"]
    packtrain = ["-m", "packtrain", *words]
    assert launch_command(file, words, devices=8) == [*LAUNCHER, str(file), "--num_processes", "8", *packtrain]
    assert launch_command(file, words, devices=0) == [*LAUNCHER, str(file), *packtrain]  # the file's own number
    alone = find_launch_file("single_gpu")
    assert launch_command(alone, words, devices=8) == [*LAUNCHER, str(alone), *packtrain]


@pytest.mark.parametrize(
    ("name", "devices", "processes"),
    [("ddp", 1, "1"), ("zero3_offload_cpu", 1, "1"), ("multi_node", 8, "16"), ("multi_node", 0, None)],
)
def test_one_process_for_every_gpu_of_every_host(name, devices, processes):
    command = launch_command(find_launch_file(name), ["train", "recipe.yaml"], devices=devices)
    given = command[command.index("--num_processes") + 1] if "--num_processes" in command else None
    assert given == processes


@pytest.mark.parametrize(("use_cpu", "given"), [("false", True), ("true", False)])
def test_a_run_on_the_cpu_has_the_processes_of_its_file(monkeypatch, use_cpu, given):
    """Also where there are GPUs, which it leaves alone."""
    started, told = [], []
    monkeypatch.setattr(
        "os.execve", lambda file, command, env: (started.append(command), told.append(env[LAUNCHED_BY]), sys.exit(0))
    )
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 8)
    with pytest.raises(SystemExit):
        recipe = str(LAUNCH.parent / "recipes/quickstart.yaml")
        main(["train", recipe, "--launch", "cpu", "--set", f"use_cpu={use_cpu}"])
    assert ("--num_processes" in started[0]) == given
    assert told == ["cpu"] and LAUNCHED_BY not in os.environ  # the ranks suggest commands that start as many


def test_elsewhere_its_deepspeed_config_is_still_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = launch_command(find_launch_file("zero2"), ["train", "mine.yaml"], devices=0)
    config = command[command.index("--deepspeed_config_file") + 1]
    assert Path(config) == LAUNCH / "deepspeed/zero2.json" and Path(config).exists()


def test_a_copy_of_a_launch_file_finds_its_deepspeed_config(tmp_path, monkeypatch):
    """As a user copies one to change the number of processes: first next to the copy, at last packtrain's own."""
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "mine/two.yaml"
    copy.parent.mkdir()
    copy.write_text((LAUNCH / "zero2.yaml").read_text())

    def found() -> Path:
        command = launch_command(copy, ["train", "mine.yaml"], devices=0)
        return Path(command[command.index("--deepspeed_config_file") + 1])

    assert found() == LAUNCH / "deepspeed/zero2.json" and engine_of(copy) == "zero2"
    near = copy.parent / "launch/deepspeed/zero2.json"
    near.parent.mkdir(parents=True)
    near.write_text((LAUNCH / "deepspeed/zero3.json").read_text())
    assert found() == near and engine_of(copy) == "zero3"
    copy.write_text(copy.read_text().replace("zero2.json", "zero9.json"))
    for asked in (found, lambda: engine_of(copy)):
        with pytest.raises(LaunchError, match="two.yaml: .*names a file that does not exist.*zero9.json"):
            asked()


def test_a_path_will_do(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("distributed_type: MULTI_GPU\n")
    assert find_launch_file(str(file)) == file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("distributed_type: [", "cannot be read: while parsing"),
        ("- a", r"is not a mapping \(got \['a'\]\)"),
        ("", "is not a"),
    ],
)
def test_a_file_that_is_no_launch_file_is_named(text, message, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    for asked in (lambda: launch_command(file, ["train"], devices=0), lambda: engine_of(file)):
        with pytest.raises(LaunchError, match=f"mine.yaml: {message}(.|\n)*as launch/zero2.yaml"):
            asked()
    (tmp_path / "ds.json").write_text(text)
    file.write_text("distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: ds.json}\n")
    with pytest.raises(LaunchError, match="ds.json: (cannot be read|is not a mapping)"):
        engine_of(file)
    (tmp_path / "ds.json").write_text('{\n\t"zero_optimization": {"stage": 1}}')  # with a tab, which YAML refuses
    assert engine_of(file) == "zero1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("distributed_type: NOSUCH", "distributed_type: is no kind that accelerate knows (got 'NOSUCH')"),
        ("distributed_type: MULTI_GPUS", "did you mean MULTI_GPU?"),
        ("model: {model_name_or_path: m}", "distributed_type: is missing: this is no accelerate config"),
        (
            "{distributed_type: MULTI_GPU, num_processes: two}",
            "num_processes: must be a whole number above 0 (got 'two')",
        ),
    ],
)
def test_a_launch_file_that_accelerate_would_fail_of_is_named(text, message, tmp_path):
    """Control: `NO` without quotes, which YAML reads as false, is the kind of one process."""
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(LaunchError) as caught:
        launch_command(tmp_path / "mine.yaml", [], devices=0)
    assert message in str(caught.value) and "mine.yaml" in str(caught.value) and caught.value.fix
    (tmp_path / "mine.yaml").write_text("distributed_type: NO")
    assert launch_command(tmp_path / "mine.yaml", [], devices=0)


def test_a_name_that_is_no_file_is_an_error():
    with pytest.raises(LaunchError, match="did you mean zero3_offload_cpu"):
        find_launch_file("zero3_offload_cp")


def test_a_launched_process_does_not_launch_again(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match="already started"):
        relaunch("zero2", ["train", "recipe.yaml"])
