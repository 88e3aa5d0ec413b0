"""A run that is not what was asked for stops."""

from __future__ import annotations

import pytest

from packtrain.errors import LaunchError
from packtrain.training.engines.launch import asked_world_size, check_processes


def test_world_size_is_the_launchers():
    assert asked_world_size({}) == 1
    assert asked_world_size({"WORLD_SIZE": "4"}) == 4


def test_accelerate_starting_one_process_instead_of_two_is_noticed():
    env = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"}
    with pytest.raises(LaunchError, match="asked for several processes but started one"):
        asked_world_size(env)
    assert asked_world_size({**env, "WORLD_SIZE": "2"}) == 2
    assert asked_world_size({"ACCELERATE_MIXED_PRECISION": "no"}) == 1  # asked for one


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
