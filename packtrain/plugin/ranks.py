"""Do the ranks of an attached trainer train the same? Compared before anything is asked of the trainer.

    learning_rate: 0.01 on rank 1, 0.003 on rank 0
    rows of train_dataset: 1200 on rank 1, 1201 on rank 0

The weights of the trained model may differ: a classifier's new head, or an adapter, is drawn by each rank for itself, and
DDP and DeepSpeed give all ranks the weights of rank 0 when training begins. That is said in the log. Nobody does so for
other models of a trainer, for example a reference model.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any

import numpy as np
from torch import nn
from transformers import Trainer

from packtrain.packing.plan import Plan
from packtrain.plugin.unpadded import models_of
from packtrain.training.agreement import check_agreement, find_differences, weights_hash
from packtrain.training.ranks import settle_at_exit
from packtrain.training.summary import package_versions

logger = logging.getLogger(__name__)

SAMPLED = 256  # rows
# Arguments that hosts may have apart, and those of what only one rank does:
_OWN = (
    *("output_dir", "logging_dir", "run_name", "project", "local_rank", "resume_from_checkpoint", "model_init_kwargs"),
    *("report_to", "disable_tqdm", "push_to_hub", "logging_nan_inf_filter", "skip_memory_metrics", "debug"),
    *("ddp_timeout", "save_total_limit", "save_on_each_node", "dataset_num_proc", "do_train", "do_eval", "do_predict"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
    *("dataloader_multiprocessing_context", "dataloader_in_order"),
)
_OWN_PREFIXES = ("hub_", "log_", "trackio_", "vllm_server_", "vllm_group_")


def check_ranks(trainer: Trainer, asked: Mapping[str, Any]) -> None:
    """Compares arguments, data, models and packages over all ranks; collective, and does nothing for one process.

    Args:
        asked: the arguments of `attach`.

    Raises:
        LaunchError: on every rank, with what differs and where.
    """
    if trainer.args.world_size == 1:
        return
    settle_at_exit()
    check_agreement({**_plain(asked), **_settings(trainer), **_data(trainer), **_models(trainer), **package_versions()})
    if trainer.is_fsdp_enabled:
        return  # see _models
    differences = find_differences({"weights of the model": weights_hash(_trained(trainer))})
    if differences and trainer.args.process_index == 0:
        logger.warning(
            "packtrain: the ranks have other %s; training begins with those of rank 0 everywhere (call set_seed before "
            "the model is made, and load it from the same files, to have the same)",
            differences[0],
        )


def check_plan(plan: Plan) -> None:
    """Compares plans over all ranks; collective.

    Raises:
        LaunchError: on every rank, with what differs and where.
    """
    if plan.world_size > 1:
        accumulated = {"gradient_accumulation_steps of the plan": plan.gradient_accumulation_steps}
        check_agreement(accumulated | {"lengths of the examples": _hash(plan.lengths), "the plan": plan.hash})


def check_order(plan: Plan, order: np.ndarray) -> None:
    """Compares the orders of the first epoch's examples (int64 `[n]`) over all ranks; collective.

    Called at once, and again when training begins: accelerate's sampler takes torch's seed, which a script may have set to
    another one on each rank.

    Raises:
        LaunchError: on every rank, with what differs and where.
    """
    if plan.world_size > 1:
        first = ", ".join(map(str, order[:6].tolist()))
        check_agreement({"the order of examples, by torch's seed": f"{first}, ... ({_hash(order)})"})


def _settings(trainer: Trainer) -> dict[str, Any]:
    given = trainer.args.to_dict()  # without tokens of the Hub
    return {
        name: _plain(value)
        for name, value in given.items()
        if name not in _OWN and not name.startswith(("_", *_OWN_PREFIXES))
    }


def _data(trainer: Trainer) -> dict[str, Any]:
    """Returns numbers of rows, and what some rows of the training data hold, by column."""
    data: Any = trainer.train_dataset
    facts: dict[str, Any] = {"rows of train_dataset": _count(data)}
    held_out: Any = trainer.eval_dataset
    parts = held_out if isinstance(held_out, dict) else {"": held_out}
    facts |= {f"rows of eval_dataset{f' {name}' if name else ''}": _count(part) for name, part in parts.items()}
    return facts | {f"column '{name}' of train_dataset": found for name, found in _columns(data)}


def _count(data: object) -> int | str:
    return len(data) if isinstance(data, Sized) else type(data).__name__


def _columns(data: Any) -> Iterator[tuple[str, str]]:
    """Yields the hash of some rows of every column, but for images and sounds, whose paths hosts may have apart.

    Datasets that compute their rows when they are read are left alone.
    """
    if not hasattr(data, "with_format") or not hasattr(data, "column_names") or not isinstance(data, Sized):
        return
    if data.format["type"] == "custom" or not len(data):
        return
    rows = np.unique(np.linspace(0, len(data) - 1, SAMPLED).astype(np.int64))
    table = data.with_format("arrow")[rows.tolist()]
    for field in table.schema:
        if "binary" not in str(field.type):
            yield field.name, _hash(table[field.name].to_pylist())


def _models(trainer: Trainer) -> dict[str, Any]:
    """Returns what the trainer's models are, and the weights of those that an engine does not make equal."""
    facts: dict[str, Any] = {"weights by name": _hash([_named(*each) for each in _trained(trainer).named_parameters()])}
    for name, model in models_of(trainer).items():
        if name != "model":
            facts[f"weights of {name}"] = weights_hash(model)
    fsdp = getattr(trainer.accelerator.state, "fsdp_plugin", None)  # not there without FSDP
    if fsdp is not None and not fsdp.cpu_ram_efficient_loading:
        facts["weights of the model"] = weights_hash(_trained(trainer))  # each rank keeps shards of its own ones
    return facts


def _named(name: str, weight: nn.Parameter) -> list[Any]:
    shape = getattr(weight, "ds_shape", weight.shape)  # of one that DeepSpeed has sharded
    return [name, str(weight.dtype), list(shape), weight.requires_grad]


def _trained(trainer: Trainer) -> nn.Module:
    return trainer.accelerator.unwrap_model(trainer.model)


def _plain(value: Any) -> Any:
    """Returns plain data as it is, and the type of anything else, whose words may hold an address."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        return [_plain(each) for each in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)]
    return type(value).__name__


def _hash(value: Any) -> str:
    contents = value.tobytes() if isinstance(value, np.ndarray) else json.dumps(value, default=str).encode()
    return hashlib.sha256(contents).hexdigest()[:16]
