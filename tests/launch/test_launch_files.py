"""The files in launch/ are what accelerate and DeepSpeed read, and each says how it is started."""

from __future__ import annotations

from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser

from packtrain.training.deepspeed_config import deepspeed_config, offload_devices
from tests.launch.helpers import skip_without_libaio

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "launch").glob("*.yaml"))
ENGINES = {
    "cpu": "MULTI_GPU", "single_gpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "multi_node": "DEEPSPEED",
    "zero1": "DEEPSPEED", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED", "zero3_offload_cpu": "DEEPSPEED",
    "zero3_offload_nvme": "DEEPSPEED",
}  # fmt: skip


def test_every_file_is_there():
    assert {file.stem for file in FILES} == set(ENGINES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_knows_every_key(file):
    config = yaml.safe_load(file.read_text())
    options = {action.dest for action in launch_command_parser()._actions}
    assert set(config) <= {field.name for field in fields(ClusterConfig)}
    for section, prefix in {"deepspeed_config": "", "fsdp_config": ""}.items():
        assert {prefix + key for key in config.get(section, {})} <= options
    loaded = load_config_from_file(str(file))
    assert getattr(loaded.distributed_type, "value", loaded.distributed_type) == ENGINES[file.stem]
    assert f"launch/{file.name}" in file.read_text()  # the command that starts it


@pytest.mark.parametrize("file", [file for file in FILES if ENGINES[file.stem] == "DEEPSPEED"], ids=lambda f: f.stem)
def test_its_deepspeed_config_passes_the_checks(file, monkeypatch, tmp_path):
    if find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    monkeypatch.chdir(ROOT)
    config = yaml.safe_load(file.read_text())["deepspeed_config"]
    path = config["deepspeed_config_file"]
    plan = dict(world_size=2, gradient_accumulation_steps=4, use_cpu=True, env={})
    if file.stem == "zero3_offload_nvme":  # its drive is the user's
        skip_without_libaio()
        text = (ROOT / path).read_text().replace("/local_nvme", str(tmp_path))
        path = str(tmp_path / "nvme.json")
        Path(path).write_text(text)
    checked = deepspeed_config({"deepspeed": path}, **plan)
    stage = checked["zero_optimization"]["stage"]
    assert stage == {"multi_node": 2}.get(file.stem, int(file.stem[4:5] if file.stem[4:5].isdigit() else 0))
    assert config["zero3_init_flag"] == (stage == 3)
    device = file.stem.partition("_offload_")[2] or "none"
    assert offload_devices(checked) == {"offload_optimizer": device, "offload_param": device}
