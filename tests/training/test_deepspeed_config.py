"""A DeepSpeed config is checked before DeepSpeed, which ignores what it doesn't know, reads it."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

from packtrain.errors import LaunchError
from packtrain.training.deepspeed_config import GATHER_KEY, TOP_LEVEL_KEYS, deepspeed_config

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
PLAN = dict(world_size=2, gradient_accumulation_steps=4, use_cpu=False, env={})


def checked(config, **training):
    return deepspeed_config({"deepspeed": config, **training}, **PLAN)


def test_runs_without_deepspeed_need_no_config():
    assert deepspeed_config({}, **PLAN) is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"zero_optimizaton": {"stage": 2}}, "did you mean `zero_optimization`"),
        ({"train_batchsize": 8}, "did you mean `train_batch_size`"),
        ({"zero_optimization": 2}, "must be a mapping"),
        ({"xyz": 1}, "leave it out"),
    ],
)
def test_what_deepspeed_would_ignore_is_an_error(config, message):
    with pytest.raises(LaunchError, match=message):
        checked(config)


@needs_deepspeed
@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"stage": 2, "overlap_com": True}, "did you mean `zero_optimization.overlap_comm`"),
        ({"stage": 4}, "zero_optimization.stage"),
        ({"stage": 3, "offload_param": {"device": "gpu"}}, "zero_optimization.offload_param.device"),
        ({"stage": 3, "offload_optimizer": {"devise": "cpu"}}, "zero_optimization.offload_optimizer.devise"),
        ({"stage": 3, GATHER_KEY: False}, "no model could be saved"),
        (
            {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/nowhere"}},
            "nvme_path: must be a writable directory",
        ),
    ],
)
def test_the_zero_section_is_checked_by_deepspeeds_own_schema(section, message):
    with pytest.raises(LaunchError, match=message):
        checked({"zero_optimization": section, "zero_force_ds_cpu_optimizer": False})


@needs_deepspeed
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bf16": True}, r"bf16: must be a mapping \(got True\)"),
        ({"bfloat16": "auto"}, "bfloat16: must be a mapping"),
        ({"fp16": None}, "fp16: must be a mapping"),
        ({"torch_autocast": True}, "torch_autocast: must be a mapping"),
        ({"tensor_parallel": 2}, "tensor_parallel: must be a mapping"),
        ({"fp16": {"enabled": False, "loss_scal": 0}}, "did you mean `fp16.loss_scale`"),
        ({"fp16": {"loss_scale": "much"}}, r"fp16.loss_scale: .*must be a number \(got 'much'\)"),
        ({"bf16": {"immediate_grad_updates": True}}, "did you mean `bf16.immediate_grad_update`"),
        (
            {"bf16": {}, "bfloat16": {"immediate_grad_update": True}},
            "bfloat16: DeepSpeed does not read it next to `bf16`",
        ),
    ],
)
def test_the_sections_of_precision_are_checked(config, message):
    with pytest.raises(LaunchError, match=message):
        checked(config)


@needs_deepspeed
def test_the_older_name_of_bf16_keeps_its_settings():
    config = checked({"bfloat16": {"enabled": "auto", "immediate_grad_update": True}}, bf16=True)
    assert config["bf16"] == {"enabled": True, "immediate_grad_update": True} and "bfloat16" not in config


@needs_deepspeed
def test_the_plan_and_the_recipe_fill_in_what_they_decide():
    given = {"zero_optimization": {"stage": 3}, "gradient_clipping": "auto"}
    config = checked(given, bf16=True, max_grad_norm=0.5)
    assert config == {
        "zero_optimization": {"stage": 3, GATHER_KEY: True},
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
    }
    assert given == {"zero_optimization": {"stage": 3}, "gradient_clipping": "auto"}  # the recipe's, left alone


@needs_deepspeed
@pytest.mark.parametrize(
    ("key", "value", "right"),
    [
        ("gradient_accumulation_steps", 1, 4),
        ("train_micro_batch_size_per_gpu", 8, 1),
        ("train_batch_size", 64, 8),
        ("gradient_clipping", 5.0, 1.0),
        ("bf16", {"enabled": True}, {"enabled": False}),
        ("bf16", {"enabled": True}, {"enabled": "auto"}),
        ("bfloat16", {"enabled": True}, {"enabled": False}),  # its older name, which is not read next to `bf16`
        (
            "torch_autocast",
            {"enabled": True, "dtype": "bfloat16"},
            {"enabled": False},
        ),  # runs in half precision, unseen
        ("gradient_allreduce_op", "sum", "mean"),  # as many times the gradient as there are ranks
        ("tensor_parallel", {"autotp_size": 2}, {"autotp_size": 0}),  # ranks that have other examples
    ],
)
def test_a_contradiction_is_an_error_and_agreement_is_not(key, value, right):
    name = "bf16" if key == "bfloat16" else key
    with pytest.raises(LaunchError, match=rf"{name}.*(contradicts the (plan|recipe)|must be)(.|\n)*leave it out: "):
        checked({key: value})
    checked({key: right})


@needs_deepspeed
def test_the_launchers_config_is_read_from_its_file(tmp_path):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    launched = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}
    config = deepspeed_config({}, **PLAN | {"env": launched})
    assert config["zero_optimization"] == {"stage": 2}
    with pytest.raises(LaunchError, match="training.deepspeed: differs from the config that the launcher names"):
        deepspeed_config({"deepspeed": "other.json"}, **PLAN | {"env": launched})
    # Control: the variable alone, without DeepSpeed being launched, means nothing.
    del launched["ACCELERATE_USE_DEEPSPEED"]
    assert deepspeed_config({}, **PLAN | {"env": launched}) is None


@needs_deepspeed
@pytest.mark.parametrize(
    "key, section",
    [
        ("optimizer", {"type": "SGD", "params": {"lr": "auto"}}),
        ("scheduler", {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01}}),
    ],
)
def test_deepspeeds_own_optimizer_and_schedule_are_refused(key, section):
    """`cosine` would become WarmupLR, and `sgd` AdamW, with nothing said."""
    with pytest.raises(LaunchError, match=f"{key}: would override the recipe(.|\n)*leave it out"):
        checked({"zero_optimization": {"stage": 2}, key: section})
    assert checked({"zero_optimization": {"stage": 2}, key: None})  # control


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"bf16": {"enabled": false}, "bf16": {"enabled": true}}', "bf16 is given twice"),
        ("{", "is not a JSON mapping"),
        ("[]", "is not a JSON mapping"),
    ],
)
def test_a_file_that_is_no_config_is_named(tmp_path, text, message):
    path = tmp_path / "zero.json"
    path.write_text(text)
    with pytest.raises(LaunchError, match=message) as error:
        checked(str(path))
    assert str(path) in str(error.value)
    with pytest.raises(LaunchError, match="cannot be read"):
        checked(str(tmp_path / "missing.json"))


@needs_deepspeed
def test_exactly_the_keys_that_deepspeed_reads_are_known():
    """DeepSpeed's own reader goes over a mapping that notes what it is asked for."""
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, DeepSpeedConfig

    asked: set[str] = set()

    class Keys(set):
        def __contains__(self, key):
            asked.add(key)
            return super().__contains__(key)

    class Watched(dict):
        def get(self, key, default=None):
            asked.add(key)
            return super().get(key, default)

        def __getitem__(self, key):
            asked.add(key)
            return super().__getitem__(key)

        def __contains__(self, key):
            asked.add(key)
            return super().__contains__(key)

        def keys(self):
            return Keys(super().keys())

        def __copy__(self):
            return Watched(self)

    DeepSpeedConfig(Watched(train_batch_size=1))
    assert asked - set(_REMOVED_TOP_LEVEL_CONFIG_KEYS) == TOP_LEVEL_KEYS
