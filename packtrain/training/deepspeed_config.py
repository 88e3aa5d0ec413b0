"""DeepSpeed's config, read and checked before DeepSpeed reads it.

DeepSpeed takes what it knows from the config and ignores the rest, so a misspelled `zero_optimizaton` trains without
ZeRO and says nothing. Here every key is checked first, and what the plan and the recipe decide (batch sizes,
clipping, precision) is filled in, or has to agree:

    {"zero_optimization": {"stage": 2}}     is all that a config needs to say
    "gradient_accumulation_steps": 4        is an error unless the plan has 4 micro-batches per step
    "torch_autocast": {"enabled": true}     is an error: the recipe's `training.bf16` decides

The config is the one the launcher names (`accelerate launch --config_file launch/zero2.yaml`), or the recipe's
`training.deepspeed`, a path or a mapping (`torchrun ... --set deepspeed=launch/deepspeed/zero2.json`).
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packtrain.errors import LaunchError
from packtrain.recipe.fields import did_you_mean

# Exactly the top-level keys that deepspeed 0.19.8 reads (a test watches it read).
TOP_LEVEL_KEYS = frozenset(
    """
    activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger
    communication_data_type compile csv_monitor data_efficiency data_types dataloader_drop_last
    datastates_ckpt disable_allgather disable_python_gc dump_state expert_parallel flops_profiler fp16
    gradient_accumulation_steps gradient_allreduce_op gradient_clipping gradient_predivide_factor
    hybrid_engine log_level managed_gradient_accumulation memory_breakdown optimizer pipeline
    prescale_gradients scheduler seq_parallel_communication_data_type steps_per_print tensor_parallel
    tensorboard timers torch_autocast train_batch_size train_micro_batch_size_per_gpu
    use_data_before_expert_parallelism vocabulary_size wall_clock_breakdown wandb weight_quantization
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
    """.split()
)
CONFIG_VARIABLE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
GATHER_KEY = "stage3_gather_16bit_weights_on_model_save"


def deepspeed_config(
    training: Mapping[str, Any],
    *,
    world_size: int,
    gradient_accumulation_steps: int,
    use_cpu: bool,
    env: Mapping[str, str] | None = None,
) -> dict[str, Any] | None:
    """Returns the config for `TrainingArguments(deepspeed=...)`, checked and filled; None for a run without DeepSpeed.

    Args:
        training: the recipe's `training:` section.
        world_size: ranks that were launched.
        gradient_accumulation_steps: of the plan.
        use_cpu: ranks run on the CPU, where DeepSpeed compiles its communication first.

    Raises:
        LaunchError: an unknown key, a contradiction, a file or a tool that isn't there.
    """
    env = os.environ if env is None else env  # as it is now, not as it was at import
    config, where = _read(training.get("deepspeed"), env)
    if config is None:
        return None
    _check_keys(config, TOP_LEVEL_KEYS, where)
    _refuse_optimizer(config, where)
    _check_zero_section(config.setdefault("zero_optimization", {}), where)
    _check_sections(config, where)
    _fill(config, training, world_size, gradient_accumulation_steps, where)
    _check_tools(config, use_cpu, where)
    return config


def _read(given: object, env: Mapping[str, str]) -> tuple[dict[str, Any] | None, str]:
    """Reads the config as it was given, and where it stands."""
    path = env.get(CONFIG_VARIABLE) if env.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true" else None
    if given and path and given != path:
        fix = "launch with launch/ddp.yaml, or leave `deepspeed` out of the recipe"
        raise LaunchError(
            "differs from the config that the launcher names", key="training.deepspeed", value=given, fix=fix
        )
    source = given or path
    if not source:
        return None, ""
    if isinstance(source, Mapping):
        return copy.deepcopy(dict(source)), "training.deepspeed"
    where = str(source)
    try:
        config = json.loads(Path(where).read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except OSError as error:
        fix = "give a path relative to the directory in which the run starts"
        raise LaunchError(f"cannot be read: {error.strerror}", where=where, fix=fix) from None
    except ValueError as error:
        raise LaunchError(f"is not a JSON mapping: {error}", where=where) from None
    if not isinstance(config, dict):
        raise LaunchError("is not a JSON mapping", where=where)
    return config, where


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise ValueError(f"{', '.join(sorted(twice))} is given twice")
    return dict(pairs)


# ------------------------------------------------------------------------------------------------------- the keys


def _check_keys(section: Mapping[str, Any], known: frozenset[str], where: str, prefix: str = "") -> None:
    for key in section:
        if key not in known:
            near = did_you_mean(key, known)
            fix = f"did you mean `{prefix}{near}`?" if near else "leave it out: DeepSpeed would not read it"
            raise LaunchError("is not a key of DeepSpeed's config", where=where, key=prefix + key, fix=fix)


def _refuse_optimizer(config: Mapping[str, Any], where: str) -> None:
    """Refuses sections that replace the recipe's optimizer and schedule without a word, whatever it says of them."""
    settings = {
        "optimizer": "`training.optim`, `learning_rate`, `weight_decay` and the betas",
        "scheduler": "`training.lr_scheduler_type`, `warmup_steps` and `learning_rate`",
    }
    for key, decided in settings.items():
        if (section := config.get(key)) is not None:
            fix = f"leave it out: {decided} of the recipe decide"
            raise LaunchError("would override the recipe", where=where, key=key, value=section, fix=fix)


def _check_zero_section(section: object, where: str) -> None:
    """Checks keys and values of `zero_optimization`, its offload sections included, by DeepSpeed's own schema."""
    name = "zero_optimization"
    _check_mapping(section, where, name, '{"stage": 2}')
    assert isinstance(section, dict)
    if find_spec("deepspeed") is None:
        raise LaunchError("DeepSpeed is not installed", where=where, fix="pip install 'packtrain[deepspeed]'")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    _check_schema(section, DeepSpeedZeroConfig, where, name)
    stage, gather = section.get("stage", 0), section.get(GATHER_KEY, True)
    if stage == 3 and gather is False:
        fix = "set it to true, or leave it out"
        raise LaunchError(
            "must be true, because no model could be saved without it", where=where, key=f"{name}.{GATHER_KEY}", fix=fix
        )
    if stage == 3:
        section[GATHER_KEY] = True


def _check_sections(config: dict[str, Any], where: str) -> None:
    """Checks `bf16` and `fp16` by DeepSpeed's own schemas, and gives `bfloat16` the name that DeepSpeed reads first."""
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config

    if "bf16" in config and "bfloat16" in config:
        fix = "put all of it into `bf16`"
        raise LaunchError("DeepSpeed does not read it next to `bf16`", where=where, key="bfloat16", fix=fix)
    for name, schema in {
        "bf16": DeepSpeedBF16Config,
        "bfloat16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
    }.items():
        if name in config:
            _check_mapping(config[name], where, name, '{"enabled": "auto"}')
            _check_schema({key: value for key, value in config[name].items() if value != "auto"}, schema, where, name)
    for name in ("torch_autocast", "tensor_parallel"):
        _check_mapping(config.get(name, {}), where, name, "{}")
    if "bfloat16" in config:
        config["bf16"] = config.pop("bfloat16")


def _check_mapping(section: object, where: str, name: str, example: str) -> None:
    if not isinstance(section, dict):
        raise LaunchError("must be a mapping", where=where, key=name, value=section, fix=f"write for example {example}")


def _check_schema(section: Mapping[str, Any], schema: Any, where: str, name: str) -> None:
    """Checks keys, then values of a section by a schema of DeepSpeed's."""
    from pydantic import ValidationError

    _check_keys(section, frozenset(_names(schema)), where, f"{name}.")
    try:
        schema(**section)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, (name, *first["loc"])))
        fix = "correct it, or leave it out"
        raise LaunchError(first["msg"], where=where, key=key, value=first["input"], fix=fix) from None


def _names(schema: Any) -> Iterator[str]:
    for name, field in schema.model_fields.items():
        yield name
        if field.alias:
            yield field.alias


# ----------------------------------------------------------------------------------------------------- the values


def _fill(config: dict[str, Any], training: Mapping[str, Any], world_size: int, accumulation: int, where: str) -> None:
    """Puts in what the plan and the recipe decide; what the config says itself has to agree."""
    plan = (
        "leave it out: the plan lays micro-batches out, and `batching.examples_per_step` sets the examples of an update"
    )
    decided = {
        "train_micro_batch_size_per_gpu": (1, plan),  # the plan sizes micro-batches, DeepSpeed counts them
        "gradient_accumulation_steps": (accumulation, plan),
        "train_batch_size": (world_size * accumulation, plan),
        "gradient_clipping": (float(training.get("max_grad_norm", 1.0)), _decides("max_grad_norm")),
        "bf16.enabled": (bool(training.get("bf16", False)), _decides("bf16")),
        "fp16.enabled": (bool(training.get("fp16", False)), _decides("fp16")),
    }
    only = {  # what DeepSpeed does by itself, and what alone is right here
        "torch_autocast.enabled": (False, _decides("bf16")),
        "gradient_allreduce_op": ("mean", "leave it out: losses are weighted for a mean over the ranks"),
        "tensor_parallel.autotp_size": (0, "leave it out: every rank has examples of its own"),
    }
    for key, (value, fix) in (decided | only).items():
        *sections, name = key.split(".")
        node = config
        for section in sections:
            node = node.setdefault(section, {}) if key in decided else node.get(section) or {}
        said = node.get(name, "auto")
        if said != "auto" and said != value:
            what = f"contradicts {'the plan' if fix is plan else 'the recipe'}, which has {json.dumps(value)}"
            what = f"must be {json.dumps(value)}" if key in only else what
            raise LaunchError(what, where=where, key=key, value=said, fix=fix)
        if key in decided:
            node[name] = value
    del config["train_batch_size"]  # DeepSpeed multiplies itself, and ZeRO-3 on CPU reads it before it knows its ranks


def _decides(name: str) -> str:
    return f"leave it out: `training.{name}` of the recipe decides"


# ------------------------------------------------------------------------------------------------------ the tools


def offload_devices(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns `{"offload_optimizer": "cpu", "offload_param": "none"}`, whatever the config leaves out."""
    zero = config.get("zero_optimization", {})
    return {name: str((zero.get(name) or {}).get("device", "none")) for name in ("offload_optimizer", "offload_param")}


def _check_tools(config: Mapping[str, Any], use_cpu: bool, where: str) -> None:
    """Checks for compilers, libaio and directories that DeepSpeed would miss in the middle of its start."""
    devices = offload_devices(config)
    compiles_adam = devices["offload_optimizer"] != "none" and config.get("zero_force_ds_cpu_optimizer", True)
    for tool, package in {"g++": "install the system package g++", "ninja": "run `pip install ninja`"}.items():
        if (use_cpu or compiles_adam) and shutil.which(tool) is None:
            compiled = "its CPU optimizer" if compiles_adam else "its communication for CPU ranks"
            what = f"DeepSpeed compiles {compiled} at the first start and needs {tool}"
            raise LaunchError(what, where=where, fix=package)
    for name, device in devices.items():
        if device == "nvme":
            path = config["zero_optimization"][name].get("nvme_path")
            _check_nvme(path, f"zero_optimization.{name}.nvme_path", where)


def _check_nvme(path: str | None, key: str, where: str) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder  # ty: ignore[missing-module-member] (made at run time)

    if not path or not os.access(path, os.W_OK) or not os.path.isdir(path):
        fix = "name a directory on a local NVMe drive"
        raise LaunchError("must be a writable directory", where=where, key=key, value=path, fix=fix)
    if not AsyncIOBuilder().is_compatible(verbose=False):
        fix = "install libaio with its headers (Debian: apt-get install libaio-dev)"
        raise LaunchError("DeepSpeed's async-io needs libaio, which is not installed", where=where, key=key, fix=fix)
