"""Finds settings of a trainer that contradict packtrain's layout of its batches, or have no effect on it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import suppress
from numbers import Integral
from typing import Any

from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.loss.loss_utils import ForCausalLMLoss

from packtrain.data.tokens import open_dataset
from packtrain.errors import DataError, PacktrainError
from packtrain.modeling.audit.settings import base
from packtrain.modeling.loading import has_router_loss
from packtrain.packing.plan import Plan
from packtrain.packing.strategies import resolve_strategy
from packtrain.packing.stream import PackedStream
from packtrain.plugin.asking import LIBRARIES, model_of, named
from packtrain.plugin.proof import Proof
from packtrain.plugin.unpadded import is_unpadded

LAYOUTS = ("auto", "flat", "unpad")
# Methods by which a trainer may change a batch:
SEES_ROWS = ("training_step", "_prepare_inputs", "_prepare_input", "get_batch_samples")
AGREED = ("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps")


def refuse_misuse(trainer: Trainer, strategy: str, max_tokens: int | None, layout: str) -> None:
    """Raises PacktrainError for what no layout of a trainer's batches can be made of."""
    if not isinstance(trainer, Trainer):
        fix = "call packtrain.attach(trainer) with the trainer that you train with"
        if isinstance(trainer, nn.Module):
            fix = "packtrain.unpad(model) runs a model without padding in any loop; packtrain.attach takes its trainer"
        raise PacktrainError("must be a transformers.Trainer", key="trainer", value=type(trainer).__name__, fix=fix)
    resolve_strategy(strategy)
    if max_tokens is not None and (not isinstance(max_tokens, Integral) or max_tokens < 1):
        raise PacktrainError("must be a positive integer", key="max_tokens", value=max_tokens)
    if layout not in LAYOUTS:
        raise PacktrainError(f"must be one of {', '.join(LAYOUTS)}", key="layout", value=layout)
    if layout == "unpad" and max_tokens is not None:
        what, fix = "has no effect where the trainer keeps its own batches", 'leave it out, or use layout="flat"'
        raise PacktrainError(what, key="max_tokens", value=max_tokens, fix=fix)
    _refuse_models(trainer)
    if trainer.train_dataset is None and not _is_own(trainer, "get_train_dataloader"):
        what, fix = (
            "has no train_dataset, so there is nothing to lay out",
            "build it with train_dataset=..., then attach",
        )
        raise PacktrainError(what, key="trainer", value=type(trainer).__name__, fix=fix)
    if isinstance(trainer.train_dataset, PackedStream):
        what = "lays its rows out without padding already, so there is nothing to attach"
        fix = "train without attach, and let `get_train_dataloader` return `DataLoader(packs, batch_size=None)`"
        raise PacktrainError(what, key="train_dataset", value="PackedStream", fix=fix)
    args = trainer.args
    if trainer.is_in_train:
        what, fix = "has begun to train, so its batches are made", "attach before trainer.train(), or build it anew"
        raise PacktrainError(what, key="trainer", value=type(trainer).__name__, fix=fix)
    if "get_train_dataloader" in vars(trainer) or any(
        isinstance(each, SameLoss) for each in trainer.callback_handler.callbacks
    ):
        raise PacktrainError("is attached already", key="trainer", fix="call attach once")
    if is_unpadded(trainer):
        fix = "call `.remove()` of what packtrain.unpad returned first, or train without attach"
        raise PacktrainError("is unpadded already", key="trainer.model", fix=fix)
    if getattr(args, "packing", False):
        what, fix = "must be False: the trainer has packed its examples already", "build the trainer with packing=False"
        raise PacktrainError(what, key="packing", value=True, fix=fix)
    if args.n_gpu > 1:
        what, fix = "must be 1: DataParallel would split a flat batch", "start one process per GPU"
        raise PacktrainError(what, key="n_gpu", value=args.n_gpu, fix=fix)
    if resolve_strategy(strategy).scope == "epoch" and max_tokens is None:
        fix = f"set it to the most tokens of a micro-batch that fit in memory, for example {_suggested_tokens(trainer)}"
        raise PacktrainError("must be set for a strategy that packs the whole epoch", key="max_tokens", fix=fix)


def _suggested_tokens(trainer: Trainer) -> int:
    """Returns what the trainer's own micro-batches may hold: its rows times their longest, 2048 where that is not known."""
    data: Any = trainer.train_dataset
    longest = getattr(trainer.args, "max_length", None) or 2048  # of SFTConfig
    if "input_ids" in (getattr(data, "column_names", None) or ()) and hasattr(data, "with_format"):
        with suppress(DataError):  # said where its rows are read
            longest = int(open_dataset(data).input_ids.lengths().max()) or longest
    return trainer.args.per_device_train_batch_size * longest


def refuse_contradictions(trainer: Trainer) -> None:
    """Raises PacktrainError for settings that cannot be combined with a plan, also where they come after attaching."""
    args = trainer.args
    data: Any = trainer.train_dataset
    if not hasattr(data, "column_names") or not hasattr(data, "__len__"):
        what = "must be a tokenised datasets.Dataset of known length"
        streamed = 'load it without streaming, or pack it with PackedStream; attach(layout="unpad") keeps its batches'
        fix = "make one with datasets.Dataset.from_list" if hasattr(data, "__len__") else streamed
        raise PacktrainError(what, key="train_dataset", value=type(data).__name__, fix=fix)
    if data.format["type"] == "custom":
        what, fix = "has a transform, which runs when a row is read, but packtrain reads the table", "use `dataset.map`"
        raise PacktrainError(what, key="train_dataset", value="with_transform", fix=fix)
    if getattr(trainer.data_collator, "mlm", False):
        what, fix = (
            "must be False: packtrain's batches have no randomly masked tokens",
            "build the collator with mlm=False",
        )
        raise PacktrainError(what, key="data_collator.mlm", value=True, fix=fix)
    if getattr(trainer.data_collator, "loss_weighting", "token") == "example":
        what = "must be 'token': the trainer's own loss counts every token alike, whatever the batch's `loss_weights`"
        fix = "leave it out; `packtrain train` counts every example alike with `objective.loss_weighting: example`"
        raise PacktrainError(what, key="data_collator.loss_weighting", value="example", fix=fix)
    if args.dataloader_drop_last:
        what = "must be False: packtrain drops no example"
        raise PacktrainError(what, key="dataloader_drop_last", value=True, fix="leave it out")
    if args.auto_find_batch_size:
        what, fix = "must be False: all batches are planned once", "leave it out; max_tokens limits a micro-batch"
        raise PacktrainError(what, key="auto_find_batch_size", value=True, fix=fix)
    if args.train_sampling_strategy not in ("random", "sequential"):
        what = (
            f"does not go with flat batches: transformers' {args.train_sampling_strategy} chooses which examples share a "
            "batch, and packtrain would deal them anew"
        )
        fix = 'use attach(layout="unpad"), which keeps its batches'
        if args.train_sampling_strategy == "group_by_length":
            fix = 'use attach(strategy="group_by_length") instead'
        raise PacktrainError(what, key="train_sampling_strategy", value=args.train_sampling_strategy, fix=fix)
    shared = trainer.get_tp_size() * trainer.get_cp_size() * trainer.get_sp_size()
    if shared > 1:
        what = "makes ranks share their examples, and packtrain gives every rank its own"
        raise PacktrainError(what, key="parallelism_config", value=shared, fix="use data parallelism (DDP, FSDP, ZeRO)")


def refuse_own_methods(trainer: Trainer) -> None:
    """Raises PacktrainError for methods of a trainer's own that packtrain would replace, or that may read rows."""
    if _is_own(trainer, "get_train_dataloader"):
        owner = next(cls for cls in type(trainer).__mro__ if "get_train_dataloader" in vars(cls))
        what = "has its own `get_train_dataloader`, which packtrain would replace with all of train_dataset"
        fix = "give the rows as train_dataset, and their order by a sampler with `set_epoch(epoch)`"
        raise PacktrainError(what, key="trainer", value=owner.__name__, fix=fix)
    for method in SEES_ROWS:
        if _is_own(trainer, method):
            what = f"has its own `{method}`, which may depend on which row a token is in"
            fix = 'use attach(layout="unpad"), which keeps the rows of its batches'
            raise PacktrainError(what, key="trainer", value=type(trainer).__name__, fix=fix)


def _refuse_models(trainer: Trainer) -> None:
    model = model_of(trainer)
    inner = base(model)
    if not isinstance(inner, PreTrainedModel):
        raise PacktrainError("must be a transformers model", key="trainer.model", value=type(inner).__name__)
    if inner.config.is_encoder_decoder:
        what, fix = "reads two sequences per document, and packtrain lays out one", "use a decoder or an encoder"
        raise PacktrainError(what, key="trainer.model", value=type(inner).__name__, fix=fix)
    if any(getattr(config, "alora_invocation_tokens", None) for config in getattr(model, "peft_config", {}).values()):
        what = "act from a token of each row on, and a row without padding holds several documents"
        raise PacktrainError(what, where=named(trainer), key="alora_invocation_tokens", fix="use a plain LoRA adapter")
    if trainer.model_init is not None:
        what, fix = "builds another model than the attached one when training begins", "pass `model` instead"
        raise PacktrainError(what, key="trainer.model_init", fix=fix)


def refuse_unproved(trainer: Trainer, proof: Proof) -> None:
    """Refuses to deal examples anew where the loss may not be a sum over the update, and could not be asked."""
    if proof.not_asked is None:
        return
    if has_router_loss(base(model_of(trainer)).config):
        what = "adds a router loss per micro-batch, which depends on the layout"
        fix = 'set it to False, or use attach(layout="unpad"), which keeps the micro-batches, or allow_differences=True'
        raise PacktrainError(what, key="output_router_logits", value=True, fix=fix)
    if proof.fails:
        fix = "correct it, so that it trains with padding; allow_differences=True attaches without a comparison"
        raise PacktrainError(f"cannot be compared: {proof.not_asked}", key="trainer", fix=fix)
    own = _is_own(trainer, "compute_loss") or trainer.compute_loss_func is not None
    if own or getattr(base(model_of(trainer)), "loss_function", None) is not ForCausalLMLoss:
        whose = "its own loss" if own else "a loss that is not that of a causal language model"
        what = f"has {whose}, which could not be computed before training: {proof.not_asked}"
        fix = 'use attach(layout="unpad"), which keeps its batches, or allow_differences=True'
        raise PacktrainError(what, key="trainer", value=type(trainer).__name__, fix=fix)


def refuse_means(trainer: Trainer, plan: Plan, proof: Proof) -> None:
    """Refuses to deal examples anew where the loss is a mean of each micro-batch: it would weigh them otherwise."""
    if proof.not_asked is None and _averages_micro_batches(trainer, plan, proof.is_sum):
        what = "has a loss that is a mean of each micro-batch, so it depends on which examples share one"
        fix = 'use attach(layout="unpad"), which keeps them together, or allow_differences=True'
        raise PacktrainError(what, key="trainer", value=type(trainer).__name__, fix=fix)


def refuse_empty(trainer: Trainer, plan: Plan, proof: Proof) -> None:
    """Refuses a plan with micro-batches without examples where their loss is not a number: weights would be none, too."""
    if proof.takes_empty:
        return
    if any(not len(part) for step in range(plan.total_steps) for part in plan.layout_of(step)):
        what = "has a loss that is not a number for a micro-batch without labels, and this plan has such ones"
        fix = 'use attach(layout="unpad"), or gradient_accumulation_steps=1 on one rank'
        raise PacktrainError(what, key="trainer", value=type(trainer).__name__, fix=fix)


def _is_own(trainer: Trainer, method: str) -> bool:
    """Returns whether a trainer has its own method, not that of transformers or TRL."""
    owner = next(cls for cls in type(trainer).__mro__ if method in vars(cls))
    return not owner.__module__.startswith(LIBRARIES) or method in vars(trainer)


def agreed_settings(trainer: Trainer) -> dict[str, Any]:
    """Returns what the plan was made of and the loss was compared with, to be compared when training begins."""
    model = base(model_of(trainer))
    objects = {"train_dataset": trainer.train_dataset, "data_collator": trainer.data_collator, "trainer.model": model}
    attention = {"attn_implementation": model.config._attn_implementation}
    return {name: getattr(trainer.args, name) for name in AGREED} | objects | attention | agreed_loss(trainer)


def agreed_loss(trainer: Trainer) -> dict[str, Any]:
    """Returns what computes the loss of a trainer, to be compared when training begins."""
    return {"compute_loss_func": trainer.compute_loss_func, "compute_loss": vars(trainer).get("compute_loss")}


def refuse_changes(now: Mapping[str, Any], agreed: Mapping[str, Any]) -> None:
    """Raises PacktrainError for something that has changed since the trainer was attached."""
    for name, value in now.items():
        plain = value is None or isinstance(value, str | int | float)
        if value is not agreed[name] and not (plain and value == agreed[name]):
            what, fix = "has changed since the trainer was attached", "set it before you call attach"
            raise PacktrainError(what, key=name, value=value if plain else type(value).__name__, fix=fix)


class NoCopy(TrainerCallback):
    """Refuses to train a copy of an attached trainer, whose methods read the progress of the first one.

    Raises:
        PacktrainError: when training begins.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = weakref.ref(trainer)  # which a deep copy leaves as it is

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer()
        if trainer is None or trainer.state is not state:
            what, fix = "is a copy of an attached trainer, and would read that one's progress", "copy it, then attach"
            raise PacktrainError(what, key="trainer", fix=fix)


class SameLoss(TrainerCallback):
    """Refuses to train with another loss than the one that was compared.

    Raises:
        PacktrainError: when training begins.
    """

    def __init__(self, trainer: Trainer):
        self.trainer, self.agreed = weakref.ref(trainer), agreed_loss(trainer)

    def on_train_begin(self, args, state, control, **kwargs):
        if (trainer := self.trainer()) is not None:
            refuse_changes(agreed_loss(trainer), self.agreed)


def without_effect(trainer: Trainer, plan: Plan, *, is_sum: bool) -> Iterator[str]:
    """Yields a sentence for every setting that training ignores, or follows differently than before.

    Args:
        is_sum: whether the loss of an update is a sum over its micro-batches, see `packtrain.plugin.proof.Proof`.
    """
    args = trainer.args
    multiple = getattr(args, "pad_to_multiple_of", None)  # of TRL
    if isinstance(multiple, int):
        yield f"pad_to_multiple_of={multiple} applies to evaluation only"
    for name in ("split_batches", "dispatch_batches"):
        if getattr(args.accelerator_config, name, False):
            yield f"accelerator_config.{name} applies to evaluation only: the plan deals micro-batches to ranks"
    if args.dataloader_persistent_workers:
        yield "dataloader_persistent_workers applies to evaluation only: every epoch of training starts its own workers"
    for name, plain in (("dataloader_multiprocessing_context", (None, "fork")), ("dataloader_in_order", (True,))):
        if args.dataloader_num_workers and getattr(args, name, plain[0]) not in plain:
            yield f"{name} applies to evaluation only: training starts its workers as Python does, and keeps their order"
    if plan.layout == "flat" and args.neftune_noise_alpha:
        yield "neftune_noise_alpha scales its noise by the length of a row, and a row now holds several documents"
    if has_router_loss(trainer.accelerator.unwrap_model(trainer.model).config):
        yield "output_router_logits adds a router loss per micro-batch, which depends on the layout"
    if _averages_micro_batches(trainer, plan, is_sum):
        yield (
            "the loss of an update is no sum over its examples (a mean of micro-batches' means, for example), so it "
            "depends a little on which examples share a micro-batch"
        )


def _averages_micro_batches(trainer: Trainer, plan: Plan, is_sum: bool) -> bool:
    args = trainer.args
    across_ranks = args.average_tokens_across_devices or args.world_size == 1
    return plan.gradient_accumulation_steps * args.world_size > 1 and not (is_sum and across_ranks)
