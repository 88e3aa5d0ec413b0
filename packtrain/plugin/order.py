"""Plans an attached trainer: its own order of examples, packtrain's layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch.utils.data import SequentialSampler
from transformers import Trainer

from packtrain.data.examples import Examples
from packtrain.errors import PacktrainError
from packtrain.modeling.cost import cost_of
from packtrain.packing.cost import Cost
from packtrain.packing.plan import MicroBatch, Plan, make_plan
from packtrain.packing.scopes import StepScope
from packtrain.packing.strategies import resolve_strategy

NO_LIMIT = np.iinfo(np.int32).max


class TrainersOrder:
    """Maps an epoch to the order in which the trainer's own data loader reads its examples, int64 `[n]`.

    It comes from the sampler of the prepared loader, which accelerate seeds by epoch, so it is the same on every rank. The
    seed is the one at construction; `renew` takes the present one.
    """

    def __init__(self, trainer: Trainer):
        self._get_loader = trainer.get_train_dataloader
        self.renew()

    def renew(self) -> None:
        self.loader = self._get_loader()
        get_sampler = getattr(self.loader, "get_sampler", None)
        self.sampler = get_sampler() if get_sampler else self.loader.sampler
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def check(self) -> None:
        if not hasattr(self.sampler, "set_epoch") and not isinstance(self.sampler, SequentialSampler):
            raise PacktrainError(
                "is not seeded per epoch, so its order cannot be known",
                key="train_dataset sampler",
                value=type(self.sampler).__name__,
                fix="keep accelerator_config.use_seedable_sampler on, or give your own sampler a `set_epoch(epoch)`",
            )

    def __call__(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            set_epoch = getattr(self.sampler, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(epoch)
            self._epoch, self._order = epoch, np.fromiter(self.sampler, dtype=np.int64)
        return self._order


@dataclass(frozen=True, kw_only=True, eq=False)
class GivenOrder(StepScope):
    """Makes an update of the next `examples_per_step` examples in the order of the trainer's own sampler."""

    order: Callable[[int], np.ndarray]

    def examples(self, epoch: int, index: int) -> np.ndarray:
        start = index * self.examples_per_step
        return self.order(epoch)[start : start + self.examples_per_step]


def plan_attached(
    trainer: Trainer, examples: Examples, strategy: str, max_tokens: int | None, order: TrainersOrder
) -> Plan:
    """Plans the trainer's whole run; `max_tokens` raises the number of accumulation steps until every micro-batch fits."""
    args, rule = trainer.args, resolve_strategy(strategy)
    settings: dict[str, Any] = dict(
        strategy=strategy,
        seed=args.data_seed if args.data_seed is not None else args.seed,
        examples_per_step=examples_per_step(trainer),
        world_size=args.world_size,
        num_epochs=args.num_train_epochs,
        max_steps=args.max_steps,
        cost=_cost(trainer),
    )
    if rule.scope == "epoch":
        assert max_tokens is not None, "refused before"
        return make_plan(examples.lengths, max_tokens=max_tokens, **settings)
    order.check()
    micro_steps = args.gradient_accumulation_steps
    while True:
        plan = make_plan(examples.lengths, max_tokens=NO_LIMIT, gradient_accumulation_steps=micro_steps, **settings)
        fields = {name: getattr(plan.scope, name) for name in plan.scope.__dataclass_fields__}
        plan = replace(plan, scope=GivenOrder(**fields, order=order))
        if max_tokens is None or fits_max_tokens(plan, max_tokens):
            return plan
        if micro_steps >= settings["examples_per_step"]:
            longest, fix = int(examples.lengths.max()), "raise it, or remove longer rows from train_dataset"
            raise PacktrainError(
                f"is too small: the longest example has {longest} tokens", key="max_tokens", value=max_tokens, fix=fix
            )
        micro_steps += 1


def fits_max_tokens(plan: Plan, max_tokens: int) -> bool:
    """Returns whether every micro-batch of the run has at most `max_tokens`, padding included."""
    widest, padded_to = int(plan.lengths.max()), resolve_strategy(plan.strategy).padded_to

    def size(part: MicroBatch) -> int:
        if plan.layout == "flat" or not len(part):
            return int(part.lengths.sum())
        return len(part) * (widest if padded_to == "max_length" else int(part.lengths.max()))

    return all(size(part) <= max_tokens for step in range(plan.total_steps) for part in plan.layout_of(step))


def examples_per_step(trainer: Trainer) -> int:
    args = trainer.args
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def _cost(trainer: Trainer) -> Cost:
    """Returns the cost of the model, or of its tokens alone if the config says nothing about attention."""
    return cost_of(trainer.accelerator.unwrap_model(trainer.model).config)
