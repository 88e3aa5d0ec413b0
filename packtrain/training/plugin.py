"""packtrain's layouts inside a trainer you already have.

    trainer = SFTTrainer(...)                     # or any transformers.Trainer, built as always
    trainer = packtrain.attach(trainer)           # the same examples in the same updates, laid out flat
    trainer.train()

The trainer keeps its own order of examples, loss, optimizer, callbacks, evaluation and logs. What changes is what a
micro-batch looks like: the examples of each update are dealt anew over ranks and accumulation steps by a strategy.
Only the instance is touched: its `get_train_dataloader` and `set_initial_training_values`, and the attention of its
model through `set_attn_implementation`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer

from packtrain.data.examples import Examples
from packtrain.errors import PacktrainError
from packtrain.modeling.attention import choose_implementation
from packtrain.modeling.positions import position_start
from packtrain.objectives.logits import NOT_MODEL_INPUTS
from packtrain.packing.collator import MicroBatches, PackCollator
from packtrain.packing.cost import Cost
from packtrain.packing.plan import MicroBatch, Plan, make_plan
from packtrain.packing.scopes import StepScope
from packtrain.packing.strategies import resolve_strategy
from packtrain.training.engines.isolation import NOT_CHECKED, check_isolation, compute_dtype
from packtrain.training.loader import PlanLoader, values_of_plan
from packtrain.training.meters import Meter
from packtrain.training.plugin_checks import refuse_contradictions, without_effect
from packtrain.training.trainer import StepEnd

logger = logging.getLogger(__name__)

NO_LIMIT = np.iinfo(np.int32).max


def attach(
    trainer: Trainer,
    *,
    strategy: str = "balanced",
    max_tokens: int | None = None,
    attn_implementation: str = "auto",
    allow_contamination: bool = False,
) -> Trainer:
    """Give `trainer` packtrain's layout of its training batches; returns the same trainer.

    A step-scope strategy (`balanced`, `padding_free`, `group_by_length`, ...) keeps the examples of every update, so
    losses and gradients stay those of the trainer before. An epoch-scope one (`bfd`, `optimal`, ...) packs the
    whole epoch: updates then see other examples, and the log says how many.

    Args:
        trainer: a `transformers.Trainer` or `trl.SFTTrainer` over a tokenised `datasets.Dataset` (columns `input_ids`,
            and `labels` or masks), not yet trained.
        strategy: a key of `packtrain.packing.strategies.STRATEGIES`, or `my_package.my_module:function`.
        max_tokens: most tokens in one micro-batch. By default a step-scope strategy keeps the trainer's
            `gradient_accumulation_steps`; with `max_tokens` it is raised until every micro-batch fits.
        attn_implementation: "auto" is `packtrain_varlen` for flat layouts.
        allow_contamination: train even where the model lets documents of a batch see each other.

    Raises:
        PacktrainError: something in the trainer contradicts the layout, or documents of a batch see each other (the
            model itself is asked); says what to change.
    """
    rule = resolve_strategy(strategy)
    refuse_contradictions(trainer, rule.scope, max_tokens)
    examples = Examples.from_dataset(trainer.train_dataset)
    plan = _plan(trainer, examples, strategy, max_tokens)
    changes = [f"{strategy} lays out its training batches"]
    changes += _prepare_model(trainer, plan.layout, attn_implementation, allow_contamination)
    args, ours = trainer.args, plan.gradient_accumulation_steps
    if ours != args.gradient_accumulation_steps:
        changes.append(f"gradient_accumulation_steps {args.gradient_accumulation_steps} -> {ours}")
    if rule.scope == "epoch":
        mean, theirs = len(examples) / plan.steps_in_epoch(0), _examples_per_step(trainer)
        changes.append(f"updates see other examples: {mean:.1f} on average, where the trainer had {theirs}")
        args.max_steps = plan.total_steps
    args.gradient_accumulation_steps = ours
    args.ignore_data_skip = True  # the plan starts at global_step by itself

    collator = PackCollator(
        layout=plan.layout,
        pad_token_id=_pad_token_id(trainer),
        padded_to=rule.padded_to,
        max_length=int(examples.lengths.max()),
        position_start=position_start(trainer.model),
    )
    loader = PlanLoader(
        plan=plan,
        dataset=_ModelInputs(MicroBatches(examples, collator)),
        rank=args.process_index,
        global_step=lambda: trainer.state.global_step,
        dataloader_kwargs={
            "num_workers": args.dataloader_num_workers,
            "pin_memory": args.dataloader_pin_memory and torch.cuda.is_available(),
            "prefetch_factor": args.dataloader_prefetch_factor if args.dataloader_num_workers else None,
        },
    )
    before = trainer.set_initial_training_values
    trainer.get_train_dataloader = lambda: loader
    trainer.set_initial_training_values = lambda *given: values_of_plan(plan, before(*given))
    trainer.add_callback(StepEnd(plan, Meter()))
    for ignored in without_effect(trainer, plan.layout):
        logger.warning("packtrain: %s", ignored)
    logger.warning("packtrain: %s", "; ".join(changes))
    return trainer


def _prepare_model(trainer: Trainer, layout: str, attn_implementation: str, allow_contamination: bool) -> list[str]:
    """Set the model's attention and cache for batches of this layout, and ask it whether documents stay apart; what
    was changed, in words."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    base, changes = _without_adapter(model), []
    before = base.config._attn_implementation
    args, dtype = trainer.args, compute_dtype(trainer.args, base.dtype)
    chosen = choose_implementation(attn_implementation, layout, args.device, dtype)
    if chosen is not None and chosen != before:
        base.set_attn_implementation(chosen)
        changes.append(f"attn_implementation {before} -> {chosen}")
    if base.config.use_cache:
        base.config.use_cache = False
        changes.append("use_cache True -> False")
    found = check_isolation(model, layout, args.device, dtype=dtype, allow_contamination=allow_contamination)
    return [*changes, f"whether documents see each other is {found}"] if found.startswith(NOT_CHECKED) else changes


def _without_adapter(model: torch.nn.Module) -> transformers.PreTrainedModel:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# The plan: the trainer's own order, packtrain's layout


@dataclass(frozen=True, kw_only=True, eq=False)
class _GivenOrder(StepScope):
    """An update is the next `examples_per_step` of the order that the trainer's own sampler has in that epoch."""

    order: Callable[[int], np.ndarray]

    def examples(self, epoch: int, index: int) -> np.ndarray:
        start = index * self.examples_per_step
        return self.order(epoch)[start : start + self.examples_per_step]


def _plan(trainer: Trainer, examples: Examples, strategy: str, max_tokens: int | None) -> Plan:
    args = trainer.args
    rule = resolve_strategy(strategy)
    settings: dict[str, Any] = dict(
        strategy=strategy,
        seed=args.data_seed if args.data_seed is not None else args.seed,
        examples_per_step=_examples_per_step(trainer),
        world_size=args.world_size,
        num_epochs=args.num_train_epochs,
        max_steps=args.max_steps,
        cost=Cost.of_config(trainer.accelerator.unwrap_model(trainer.model).config),
    )
    if rule.scope == "epoch":
        return make_plan(examples.lengths, max_tokens=max_tokens, **settings)
    order = _order_of(trainer)
    micro_steps = args.gradient_accumulation_steps
    while True:
        plan = make_plan(examples.lengths, max_tokens=NO_LIMIT, gradient_accumulation_steps=micro_steps, **settings)
        fields = {name: getattr(plan.scope, name) for name in plan.scope.__dataclass_fields__}
        plan = replace(plan, scope=_GivenOrder(**fields, order=order))
        if max_tokens is None or _fits(plan, max_tokens, rule.padded_to):
            return plan
        if micro_steps >= settings["examples_per_step"]:
            longest = int(examples.lengths.max())
            raise PacktrainError(f"an example has {longest} tokens", key="max_tokens", value=max_tokens)
        micro_steps += 1


def _fits(plan: Plan, max_tokens: int, padded_to: str | None) -> bool:
    """Whether every micro-batch of the run is within `max_tokens`, filler included."""
    widest = int(plan.lengths.max())

    def size(part: MicroBatch) -> int:
        if plan.layout == "flat" or not len(part):
            return int(part.lengths.sum())
        return len(part) * (widest if padded_to == "max_length" else int(part.lengths.max()))

    return all(size(part) <= max_tokens for step in range(plan.total_steps) for part in plan.layout_of(step))


def _examples_per_step(trainer: Trainer) -> int:
    args = trainer.args
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def _order_of(trainer: Trainer) -> Callable[[int], np.ndarray]:
    """epoch -> the order in which the trainer's own data loader would read its examples, int64 `[n]`.

    Taken from the sampler under the prepared loader, which accelerate seeds by epoch, so it is the same on every rank.
    """
    loader = trainer.get_train_dataloader()
    sampler = loader.get_sampler() if hasattr(loader, "get_sampler") else loader.sampler
    if not hasattr(sampler, "set_epoch") and not isinstance(sampler, SequentialSampler):
        raise PacktrainError(
            "the trainer's sampler has no seed per epoch, so its order can't be known",
            key="train_dataset sampler",
            value=type(sampler).__name__,
            fix="leave accelerator_config.use_seedable_sampler on",
        )

    @lru_cache(maxsize=1)
    def order(epoch: int) -> np.ndarray:
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        return np.fromiter(sampler, dtype=np.int64)

    return order


# The batch: what the trainer's own loss passes to the model


class _ModelInputs(Dataset):
    """Micro-batches without the keys that only packtrain's own trainer knows."""

    def __init__(self, micro_batches: MicroBatches):
        self.micro_batches = micro_batches

    def at_epoch(self, epoch: int) -> _ModelInputs:
        return _ModelInputs(self.micro_batches.at_epoch(epoch))

    def __getitem__(self, micro_batch: MicroBatch) -> dict[str, Any]:
        batch = self.micro_batches[micro_batch]
        return {key: value for key, value in batch.items() if key == "labels" or key not in NOT_MODEL_INPUTS}


def _pad_token_id(trainer: Trainer) -> int:
    """The tokenizer's, else the model's, else 0: it only fills, by position, and is never learnt."""
    for owner in (trainer.processing_class, trainer.accelerator.unwrap_model(trainer.model).config):
        if getattr(owner, "pad_token_id", None) is not None:
            return owner.pad_token_id
    return 0
