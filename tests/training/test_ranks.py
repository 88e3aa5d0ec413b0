"""A run of other processes than were asked for stops, and the end of one of several is not a failure of it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from packtrain.errors import LaunchError
from packtrain.training.ranks import (
    PAUSE,
    asked_rank,
    asked_world_size,
    check_launcher,
    check_processes,
    meeting,
    start_cpu_group,
)
from tests.training.helpers import make_trainer

ROOT = Path(__file__).parents[2]


def test_world_size_is_the_launchers():
    assert asked_world_size({}) == 1
    assert asked_world_size({"WORLD_SIZE": "4"}) == 4


def test_accelerate_starting_one_process_instead_of_two_is_noticed():
    env = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"}
    with pytest.raises(LaunchError, match="configured for several processes but started one"):
        asked_world_size(env)
    assert asked_world_size({**env, "WORLD_SIZE": "2"}) == 2
    assert asked_world_size({"ACCELERATE_MIXED_PRECISION": "no"}) == 1  # asked for one


def test_deepspeed_without_a_launcher_is_refused_before_it_looks_for_mpi(monkeypatch):
    monkeypatch.setattr("packtrain.training.ranks.find_spec", lambda name: None)
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    check_launcher(deepspeed=True, env=launched)
    for name in launched:
        with pytest.raises(
            LaunchError, match="training.deepspeed: needs a launcher(.|\n)*--launch ddp, or with `torchrun"
        ):
            check_launcher(deepspeed=True, env={key: value for key, value in launched.items() if key != name})
    monkeypatch.setattr("packtrain.training.ranks.find_spec", lambda name: name)
    check_launcher(deepspeed=True, env={})  # DeepSpeed asks MPI


@pytest.mark.parametrize(
    ("in_force", "env", "message"),
    [
        ({"world_size": 1, "n_gpu": 0}, {"WORLD_SIZE": "2"}, "2 processes were launched but 1 take part"),
        ({"world_size": 1, "n_gpu": 2}, {}, "2 GPUs by DataParallel"),
    ],
)
def test_differences_stop_the_run(in_force, env, message):
    with pytest.raises(LaunchError, match=message):
        check_processes(**in_force, env=env)


def test_what_was_launched_passes():
    check_processes(world_size=1, n_gpu=0, env={})
    check_processes(world_size=2, n_gpu=1, env={"WORLD_SIZE": "2"})


def end_with_a_late_thread(seconds: float, pause: float, how: str = "leave") -> subprocess.CompletedProcess:
    """Two ranks whose threads of gloo drop a tensor `seconds` late, and who leave them `pause` seconds."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [*launcher, "-m", "tests.programs.late_thread", str(seconds), str(pause), how],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.ci
@pytest.mark.slow
def test_a_late_thread_of_gloo_does_not_abort_the_run():
    done = end_with_a_late_thread(0.1 * PAUSE, 10 * PAUSE)  # a hundred times as long, as the machine may be busy
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.ci
@pytest.mark.slow
def test_nor_the_script_of_a_user_whose_trainer_is_attached():
    done = end_with_a_late_thread(0.1 * PAUSE, 10 * PAUSE, "attach")
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.ci
@pytest.mark.slow
def test_it_would_abort_that_of_a_stock_trainer():
    done = end_with_a_late_thread(5.0, 0.0, "stock")
    assert "exitcode: -6" in done.stderr


@pytest.mark.ci
@pytest.mark.slow
def test_it_would_without_the_pause():
    done = end_with_a_late_thread(5.0, 0.0)
    assert done.returncode != 0
    assert "exitcode: -6" in done.stderr


@pytest.mark.parametrize("text", ["abc", "-1", "1.5", "0x2", "٣", "9" * 6000 + "x"])
def test_variables_of_a_launcher_that_are_no_numbers_are_named(text):
    with pytest.raises(LaunchError, match="WORLD_SIZE: is not a number of ranks"):
        asked_world_size({"WORLD_SIZE": text})
    with pytest.raises(LaunchError, match="RANK: is not a number of ranks"):
        asked_rank({"RANK": text})
    assert (asked_rank({"RANK": "3"}), asked_rank({})) == (3, 0)  # control


@pytest.fixture
def port(monkeypatch) -> Iterator[int]:
    """A port in use, at which two ranks are to meet; this process is one of them."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        yield taken.getsockname()[1]


def test_a_port_in_use_is_said(port, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(
        LaunchError, match=rf"(?s)rank 0 cannot meet the others there.*127.0.0.1:{port}.*port that is free"
    ):
        with meeting():
            start_cpu_group({"use_cpu": True, "ddp_timeout": 2})
    assert not dist.is_initialized()


def test_an_address_where_nobody_waits_is_said(port, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(LaunchError, match="rank 1 cannot meet the others there.*127.0.0.1:1"):
        with meeting():
            start_cpu_group({"use_cpu": True, "ddp_timeout": 2})


def test_an_environment_that_compiles_the_whole_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")  # the control: what launchers set
    make_trainer(tmp_path, strategy="balanced")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(LaunchError, match="ACCELERATE_DYNAMO_BACKEND: has accelerate compile the whole model"):
        make_trainer(tmp_path, strategy="balanced")
