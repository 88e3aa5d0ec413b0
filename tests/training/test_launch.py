"""A run that is not what was asked for stops."""

from __future__ import annotations

import pytest

from packtrain.errors import LaunchError
from packtrain.training.launch import asked_world_size, check_in_force

ONE = dict(world_size=1, n_gpu=0, engine="NO")


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
        (ONE, {"WORLD_SIZE": "2"}, "2 processes were launched but 1 take part"),
        (ONE | {"n_gpu": 2}, {}, "2 GPUs by DataParallel"),
        (ONE, {"ACCELERATE_USE_DEEPSPEED": "true"}, "DEEPSPEED was asked for but NO is in force"),
        (ONE | {"engine": "MULTI_CPU"}, {"ACCELERATE_USE_FSDP": "true"}, "FSDP was asked for but MULTI_CPU"),
    ],
)
def test_differences_stop_the_run(in_force, env, message):
    with pytest.raises(LaunchError, match=message):
        check_in_force(**in_force, env=env)


def test_what_was_asked_for_passes():
    check_in_force(**ONE, env={})
    check_in_force(world_size=2, n_gpu=0, engine="MULTI_CPU", env={"WORLD_SIZE": "2"})
    check_in_force(
        world_size=2, n_gpu=1, engine="DEEPSPEED", env={"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"}
    )
