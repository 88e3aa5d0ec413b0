"""The peers: other people's trainers on the same model, examples, updates and seed.

TRL's `SFTTrainer` and transformers' `Trainer`, with `DataCollatorWithFlattening` or with one of its samplers against
padding, each in its own code as installed, with the attention that its documentation would have on this hardware:
flash-attn where it is installed and the layout is flat, else sdpa. All that is settled for them is on this page and in
`trainers.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Sampler
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_pt_utils import BatchRebalanceSampler
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from packtrain.compare.measure import RunFailed, Timed
from packtrain.compare.trainers import TRAINERS
from packtrain.data.examples import AnyExamples
from packtrain.packing.plan import AnyPlan, Plan
from packtrain.recipe.recipe import Recipe
from packtrain.recipe.sections import library_arguments
from packtrain.training.trainer import PackTrainer

COLUMNS = datasets.Features(
    {"input_ids": datasets.List(datasets.Value("int32")), "labels": datasets.List(datasets.Value("int64"))}
)


class PlannedOrder(Sampler):
    """Gives the examples of each epoch in the order in which the plan's updates see them."""

    def __init__(self, plan: Plan):
        self.plan, self.epoch = plan, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.plan.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(np.concatenate([self.plan.examples(step) for step in steps_of(self.plan, self.epoch)]).tolist())


class PlannedRebalance(BatchRebalanceSampler):
    """Gives one rank its micro-batches of each of the plan's updates, as transformers' own sampler makes them.

    Args:
        plan: over `plan.world_size` ranks.
        accumulation: micro-batches of a rank in an update; fewer in one with too few examples.
        rank: whose.
    """

    def __init__(self, plan: Plan, accumulation: int, rank: int):
        ranks = plan.world_size
        size = ranks * accumulation
        super().__init__(plan.lengths.tolist(), size, dp_size=ranks, grad_accum=accumulation, rank=rank)
        self.plan = plan

    def __len__(self) -> int:
        return sum(self._slots(step) for step in steps_of(self.plan, self.epoch))

    def __iter__(self) -> Iterator[list[int]]:
        for step in steps_of(self.plan, self.epoch):
            examples = self.plan.examples(step)
            for part in self._deal(self.plan.lengths[examples].tolist(), self._slots(step)):
                yield examples[part].tolist()

    def _deal(self, lengths: list[int], slots: int) -> Iterable[Any]:
        """Return the indices of this rank's micro-batches of an update."""
        size = len(lengths)
        return BatchRebalanceSampler(lengths, size, self.dp_size, grad_accum=slots, shuffle=False, rank=self.rank)

    def _slots(self, step: int) -> int:
        examples = len(self.plan.examples(step))
        if examples < self.dp_size:
            what = f"update {step + 1} has {examples} examples, fewer than the {self.dp_size} ranks"
            raise RunFailed(
                what, fix="choose data.num_rows and batching.examples_per_step so that the last one has more"
            )
        return min(self.grad_accum, examples // self.dp_size)


class PlannedShares(PlannedRebalance):
    """Gives one rank its micro-batches of each of the plan's updates, in the plan's order and of as many examples.

    accelerate deals full updates in the same way, but an epoch's short last update it fills up with examples of the first
    one. Trainer passes on what a `BatchRebalanceSampler` gives, without accelerate.
    """

    def _deal(self, lengths: list[int], slots: int) -> Iterable[Any]:
        return np.array_split(np.arange(len(lengths)), slots * self.dp_size)[self.rank :: self.dp_size]


def steps_of(plan: Plan, epoch: int) -> range:
    """Returns the updates of an epoch."""
    first = sum(plan.steps_in_epoch(earlier) for earlier in range(epoch))
    return range(first, min(first + plan.steps_in_epoch(epoch), plan.total_steps))


class InOrder(Trainer):
    """Mixin in front of a Trainer: the examples come in the order of `planned_order`, if there is one."""

    planned_order: PlannedOrder | PlannedRebalance | None = None

    def _get_train_sampler(self, train_dataset=None):
        return self.planned_order or super()._get_train_sampler(train_dataset)


class TimedPeer(Timed, InOrder):
    """What every peer has in front of its own Trainer."""

    train_dataset: datasets.Dataset


class TimedStockTrainer(TimedPeer):
    """transformers' Trainer, timed."""


def as_peer(peer: str, recipe: Recipe) -> Recipe:
    """Give the recipe the attention that a user of the peer would have, and lift packtrain's refusals."""
    attention = recipe.model.attn_implementation
    if attention == "auto":
        attention = flash_attention() if TRAINERS[peer].is_flat and torch.cuda.is_available() else "sdpa"
    model = recipe.model.model_copy(update={"attn_implementation": attention})
    batching = recipe.batching.model_copy(update={"allow_contamination": True})
    return recipe.model_copy(update={"model": model, "batching": batching})


def flash_attention() -> str:
    """Name the newest flash-attention that is installed, as `attn_implementation` calls it; else sdpa."""
    if is_flash_attn_3_available():
        return "flash_attention_3"
    return "flash_attention_2" if is_flash_attn_2_available() else "sdpa"


def build_peer(peer: str, recipe: Recipe, packtrain: PackTrainer) -> tuple[TimedPeer, int]:
    """Build the peer's trainer, ready for `.train()`, and count the tokens that its own preparation dropped.

    Args:
        peer: a key of `TRAINERS`.
        recipe: of the variant; `training:` goes to the peer's configuration as it stands.
        packtrain: the trainer that packtrain would use: its model, plan, examples and tokenizer are the peer's.
    """
    trainer = _trl_trainer if TRAINERS[peer].package == "trl" else _stock_trainer
    built = trainer(peer, recipe, packtrain)
    plan = packtrain.plan
    assert isinstance(plan, Plan), "rows are counted before they are compared"
    accumulation, rank = built.args.gradient_accumulation_steps, built.args.process_index
    if built.args.train_sampling_strategy == "batch_rebalance":
        built.planned_order = PlannedRebalance(plan, accumulation, rank)
    elif TRAINERS[peer].keeps_order:
        built.planned_order = PlannedShares(plan, accumulation, rank) if plan.world_size > 1 else PlannedOrder(plan)
    built.remove_callback(PrinterCallback)
    given = int(packtrain.train_dataset.lengths.sum(dtype=np.int64))
    return built, given - sum(len(ids) for ids in built.train_dataset["input_ids"])


def _trl_trainer(peer: str, recipe: Recipe, packtrain: PackTrainer) -> TimedPeer:
    from trl import SFTConfig, SFTTrainer

    class TimedSFTTrainer(TimedPeer, SFTTrainer):
        """TRL's trainer, timed."""

    options: dict[str, Any] = dict(TRAINERS[peer].options)
    unchanged = {"bf16": False, "gradient_checkpointing": False}  # TrainingArguments' defaults; SFTConfig has others
    settings: dict[str, Any] = unchanged | _arguments(recipe, **_sizes(peer, recipe, packtrain.plan)) | options
    settings["max_length"] = recipe.data.max_length if options.get("packing") else None  # examples are cut already
    tokenizer: Any = packtrain.processing_class
    return TimedSFTTrainer(
        packtrain.model,
        SFTConfig(**settings),
        train_dataset=as_dataset(packtrain.train_dataset),
        processing_class=tokenizer,
    )


def _stock_trainer(peer: str, recipe: Recipe, packtrain: PackTrainer) -> TimedPeer:
    tokenizer: Any = packtrain.processing_class
    flat = TRAINERS[peer].is_flat
    settings: dict[str, Any] = _arguments(recipe, **_sizes(peer, recipe, packtrain.plan)) | dict(TRAINERS[peer].options)
    return TimedStockTrainer(
        packtrain.model,
        TrainingArguments(**settings),
        train_dataset=as_dataset(packtrain.train_dataset),
        data_collator=DataCollatorWithFlattening(return_flash_attn_kwargs=True)
        if flat
        else DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )


def _arguments(recipe: Recipe, **sizes: int) -> dict[str, Any]:
    return library_arguments(recipe.training) | {"disable_tqdm": True, "logging_nan_inf_filter": False} | sizes


def _sizes(peer: str, recipe: Recipe, plan: AnyPlan) -> dict[str, int]:
    """Size micro-batches no larger than packtrain's.

    They get as many examples as ranks and the plan's accumulation leave each, so that an update sees `examples_per_step`;
    or, for packers, as many rows of `max_length` as `max_tokens` holds.
    """
    accumulation = plan.gradient_accumulation_steps
    if TRAINERS[peer].packs:
        rows = max(1, recipe.batching.max_tokens // recipe.data.max_length)
        return {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
    examples = recipe.batching.examples_per_step // plan.world_size
    accumulation = next(steps for steps in range(accumulation, examples + 1) if examples % steps == 0)
    return {"per_device_train_batch_size": examples // accumulation, "gradient_accumulation_steps": accumulation}


def as_dataset(examples: AnyExamples) -> datasets.Dataset:
    """Make the tokenised examples a `datasets.Dataset` of `input_ids` and `labels`, stored as `datasets` would."""

    def rows() -> Iterator[dict[str, Any]]:
        for index in range(len(examples)):
            yield examples[index]

    return datasets.Dataset.from_list(list(rows()), features=COLUMNS)
