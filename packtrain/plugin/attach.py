"""Attaches packtrain's layouts to a trainer that you already have.

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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import numpy as np
from torch.utils.data import Dataset
from transformers import Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from packtrain.data.examples import Examples
from packtrain.errors import DataError, LaunchError, ModelError, PacktrainError
from packtrain.modeling.attention.varlen import choose_implementation
from packtrain.modeling.audit.causality import check_causal
from packtrain.modeling.audit.settings import base, switchable
from packtrain.modeling.isolation import check_isolation, compute_dtype
from packtrain.modeling.per_document import compute_per_document
from packtrain.modeling.positions import check_positions, position_start
from packtrain.modeling.unpad import predicts_next_token
from packtrain.objectives.logits import NOT_MODEL_INPUTS
from packtrain.packing.collator import MicroBatches, PackCollator
from packtrain.packing.plan import MicroBatch, Plan
from packtrain.packing.strategies import resolve_strategy
from packtrain.plugin.asking import named, not_askable, untouched
from packtrain.plugin.checks import (
    NoCopy,
    SameLoss,
    agreed_settings,
    refuse_changes,
    refuse_contradictions,
    refuse_empty,
    refuse_means,
    refuse_misuse,
    refuse_own_methods,
    refuse_unproved,
    without_effect,
)
from packtrain.plugin.order import TrainersOrder, examples_per_step, fits_max_tokens, plan_attached
from packtrain.plugin.proof import Proof
from packtrain.plugin.ranks import check_order, check_plan, check_ranks
from packtrain.plugin.unpadded import has_own_loss, unpad_trainer
from packtrain.plugin.verdicts import RankFailed, Verdicts
from packtrain.training.loader import PlanLoader, loader_options, values_of_plan
from packtrain.training.meters import Meter
from packtrain.training.trainer import StepEnd

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)
AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


def attach(
    trainer: AnyTrainer,
    *,
    strategy: str = "balanced",
    max_tokens: int | None = None,
    layout: Literal["auto", "flat", "unpad"] = "auto",
    attn_implementation: str = "auto",
    allow_contamination: bool = False,
    allow_differences: bool = False,
) -> AnyTrainer:
    """Lets `trainer` train without padding, and returns it.

    Where the trainer's own loss takes flat batches and is a sum over its examples, a step-scope strategy (`balanced`,
    `padding_free`, `group_by_length`, ...) deals the examples of every update anew, so losses and gradients stay the same.
    This is checked: the trainer computes its own loss of some documents in both layouts and in parts, and loss and
    gradients must agree. An epoch-scope strategy (`bfd`, `optimal`, ...) packs the whole epoch: updates then see other
    examples, and the log says how many.

    Any other trainer (TRL's DPOTrainer or RewardTrainer, classification, masked language modelling, a loss that is a mean
    of each micro-batch) keeps its own batches, and the layers of its model run without their padding (see
    `packtrain.unpad`); its own loss and gradients of some of its batches must be the same.

    Args:
        trainer: a `transformers.Trainer`, or a subclass such as TRL's, not yet trained. Flat batches need a tokenised
            `datasets.Dataset` (columns `input_ids`, and `labels` or masks).
        strategy: a key of `packtrain.packing.strategies.STRATEGIES`, or `my_package.my_module:function`.
        max_tokens: most tokens in one micro-batch. By default a step-scope strategy keeps the trainer's
            `gradient_accumulation_steps`; with `max_tokens` it is raised until every micro-batch fits.
        layout: "flat" for the first of these ways, "unpad" for the second; "auto" tries the first, and takes the second
            where a flat step-scope strategy without `max_tokens` cannot be used.
        attn_implementation: "auto" is `packtrain_varlen` for flat layouts.
        allow_contamination: train even where attention leaks between the documents of a batch, which changes losses.
        allow_differences: train even where the trainer's own batches of the same documents have a different loss.

    Raises:
        PacktrainError: a setting of the trainer contradicts the layout, attention leaks between the documents of a batch
            (checked on the model itself), or their loss changes (checked on the trainer itself); on every rank where one
            refuses. It says what to change; the trainer is left as it was.
        LaunchError: on every rank, where ranks differ in their arguments, data, models or packages.
    """
    if isinstance(trainer, Trainer):  # else refused below
        asked = {"strategy": strategy, "max_tokens": max_tokens, "layout": layout}
        asked |= {"attn_implementation": attn_implementation, "allow_contamination": allow_contamination}
        check_ranks(trainer, asked | {"allow_differences": allow_differences})
    refuse_misuse(trainer, strategy, max_tokens, layout)
    rule = resolve_strategy(strategy)
    allowed = dict(allow_contamination=allow_contamination, allow_differences=allow_differences)
    with Verdicts(trainer.args.world_size) as verdicts:
        with verdicts.shared():
            _refuse_seen_answers(trainer)
        if layout == "unpad":
            return _unpad(trainer, verdicts)
        try:
            return _attach_flat(trainer, verdicts, strategy, max_tokens, attn_implementation, **allowed)
        except LaunchError:
            raise
        except PacktrainError as error:
            either = layout == "auto" and not isinstance(error, RankFailed)
            if either and rule.scope == "step" and rule.layout == "flat" and max_tokens is None:
                return _unpad(trainer, verdicts, error)
            error.where = ": ".join(part for part in (named(trainer), error.where) if part)
            raise


def _unpad(trainer: AnyTrainer, verdicts: Verdicts, instead_of: PacktrainError | None = None) -> AnyTrainer:
    unpad_trainer(trainer, verdicts, instead_of=instead_of)
    trainer.add_callback(SameLoss(trainer))
    return trainer


def _refuse_seen_answers(trainer: Trainer) -> None:
    """Refuses a causal language model by its class that is none by its config, as BERT without `is_decoder`."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    causal = type(base(model)).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() and predicts_next_token(
        base(model)
    )
    if causal and not has_own_loss(trainer) and not_askable(trainer) is None:
        check_causal(model)


def _attach_flat(
    trainer: AnyTrainer,
    verdicts: Verdicts,
    strategy: str,
    max_tokens: int | None,
    attn_implementation: str,
    *,
    allow_contamination: bool,
    allow_differences: bool,
) -> AnyTrainer:
    with verdicts.shared():
        refuse_contradictions(trainer)
        refuse_own_methods(trainer)
        rule, examples = resolve_strategy(strategy), _examples(trainer)
        beyond = _beyond_positions(trainer, examples)
        order = TrainersOrder(trainer)
        plan = plan_attached(trainer, examples, strategy, max_tokens, order)
    check_plan(plan)
    if rule.scope == "step":
        check_order(plan, order(0))
    collator = PackCollator(
        layout=plan.layout,
        pad_token_id=_pad_token_id(trainer),
        padded_to=rule.padded_to,
        max_length=int(examples.lengths.max()),
        position_start=position_start(trainer.accelerator.unwrap_model(trainer.model)),
    )
    batches = _ModelInputs(MicroBatches(examples, collator))
    changes = [f"{strategy} lays out the training batches", *_cut_rows(trainer, examples), *beyond]
    with _as_it_was_if_refused(trainer) as undo, untouched(trainer), verdicts.shared():
        changes += _without_cache(trainer)
        per_document = undo.enter_context(compute_per_document(trainer.accelerator.unwrap_model(trainer.model)))
        longest = int(examples.lengths.max())
        if per_document.what and longest > (per_document.threshold or 0):
            changes.append(f"{' and '.join(per_document.what)}: of the longest row -> of each document")
        proof = Proof(trainer, order.loader, plan, max_tokens, verdicts)
        changes += _prepare_model(trainer, plan.layout, attn_implementation, allow_contamination, longest, undo)
        changes.append(proof.of(batches, allow_differences=allow_differences or allow_contamination))
        if rule.scope == "step" and not (allow_differences or allow_contamination):
            refuse_unproved(trainer, proof)
            refuse_means(trainer, plan, proof)
        refuse_empty(trainer, plan, proof)
    args, ours = trainer.args, plan.gradient_accumulation_steps
    if ours != args.gradient_accumulation_steps:
        changes.append(f"gradient_accumulation_steps {args.gradient_accumulation_steps} -> {ours}")
    if rule.scope == "epoch":
        mean, theirs = len(examples) / plan.steps_in_epoch(0), examples_per_step(trainer)
        changes.append(f"updates see other examples than before, {mean:.1f} on average instead of {theirs}")
        args.max_steps = plan.total_steps
    args.gradient_accumulation_steps = ours
    args.ignore_data_skip = True  # the plan starts at global_step by itself

    loader = PlanLoader(
        plan=plan,
        dataset=batches,
        rank=args.process_index,
        global_step=lambda: trainer.state.global_step,
        dataloader_kwargs=loader_options(args),
    )
    agreed, before = agreed_settings(trainer), trainer.set_initial_training_values

    def at_training() -> PlanLoader:
        refuse_changes(agreed_settings(trainer), agreed)
        refuse_contradictions(trainer)
        if rule.scope == "step":
            _take_todays_order(order, plan, max_tokens)
            check_order(plan, order(0))
        return loader

    ours_instead: Any = trainer  # methods of this one trainer
    ours_instead.get_train_dataloader = at_training
    ours_instead.set_initial_training_values = lambda *given: values_of_plan(plan, before(*given))
    trainer.add_callback(NoCopy(trainer))
    trainer.add_callback(StepEnd(plan, Meter()))
    level = logging.WARNING if trainer.is_world_process_zero() else logging.DEBUG  # it is the same on all ranks
    for ignored in without_effect(trainer, plan, is_sum=proof.is_sum):
        logger.log(level, "packtrain: %s", ignored)
    logger.log(level, "packtrain: %s", "; ".join(changes))
    return trainer


def _take_todays_order(order: TrainersOrder, plan: Plan, max_tokens: int | None) -> None:
    """Renews the order of examples: Trainer takes its seed when training begins, and it may have changed since `attach`."""
    attached = order(0)
    order.renew()
    if max_tokens is not None and not np.array_equal(attached, order(0)) and not fits_max_tokens(plan, max_tokens):
        what = "the order of examples has changed since the trainer was attached, and micro-batches no longer fit"
        raise PacktrainError(
            what, key="max_tokens", value=max_tokens, fix="call set_seed before attach, or raise max_tokens"
        )


# The model


@contextmanager
def _as_it_was_if_refused(trainer: Trainer) -> Iterator[ExitStack]:
    """Undoes what was changed, and what the stack it yields holds, where the trainer is refused."""
    inner = base(trainer.accelerator.unwrap_model(trainer.model))
    implementation, use_cache = inner.config._attn_implementation, inner.config.use_cache
    with ExitStack() as undo:
        try:
            yield undo
        except PacktrainError:
            inner.config.use_cache = use_cache
            if inner.config._attn_implementation != implementation:
                inner.set_attn_implementation(implementation)
            raise
        undo.pop_all()


def _without_cache(trainer: Trainer) -> list[str]:
    config = base(trainer.accelerator.unwrap_model(trainer.model)).config
    changed, config.use_cache = config.use_cache, False
    return ["use_cache True -> False"] if changed else []


def _prepare_model(
    trainer: Trainer,
    layout: str,
    attn_implementation: str,
    allow_contamination: bool,
    longest: int,
    undo: ExitStack,
) -> list[str]:
    """Sets the model's attention for this layout, checks that documents are isolated, and says what was changed."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    inner, changes = base(model), []
    before = inner.config._attn_implementation
    args, dtype = trainer.args, compute_dtype(trainer.args, inner.dtype)
    chosen = choose_implementation(attn_implementation, layout, args.device, dtype)
    by_name = attn_implementation != "auto" or chosen is None or switchable(inner, chosen)  # GPT-J has its own only
    if chosen is not None and chosen != before and by_name:
        inner.set_attn_implementation(chosen)
    found = check_isolation(
        model, layout, args.device, dtype=dtype, allow_contamination=allow_contamination, longest=longest
    )
    if (now := inner.config._attn_implementation) != before:
        changes.append(f"attn_implementation {before} -> {now}")
    if not found.checked:
        changes.append(f"whether attention leaks between documents was {found.says}")
    if found.padding is not None:
        undo.callback(found.padding.remove)
        changes.append(found.padding.says())
    return changes


# The batch: what the trainer's own loss passes to the model


def _examples(trainer: Trainer) -> Examples:
    try:
        return Examples.from_dataset(cast("datasets.Dataset", trainer.train_dataset))  # see refuse_contradictions
    except DataError as error:
        if "on_bad_row" not in (error.fix or ""):  # of a recipe
            raise
        fix = "correct these rows, or remove them with `train_dataset.filter`"
        raise DataError(error.what, where=error.where, key="train_dataset", value=error.value, fix=fix) from None


def _cut_rows(trainer: Trainer, examples: Examples) -> list[str]:
    """Says how many rows are as long as the trainer cuts them: TRL's SFTTrainer does so without a message."""
    most = getattr(trainer.args, "max_length", None)  # of SFTConfig
    full = int((examples.lengths == most).sum())
    cuts = f"to which {type(trainer).__name__} cuts longer ones"
    return [f"{full:,} of {len(examples):,} rows have max_length={most:,} tokens, {cuts}"] if full else []


def _beyond_positions(trainer: Trainer, examples: Examples) -> list[str]:
    """Says that rows are longer than what the model was made for, and refuses those that it has no positions for."""
    try:
        said = check_positions(trainer.accelerator.unwrap_model(trainer.model), int(examples.lengths.max()))
    except ModelError as error:
        fix = "truncate these rows when they are tokenised, or remove them with `train_dataset.filter`"
        raise ModelError(error.what, key="train_dataset", fix=fix) from None
    return [said] if said else []


class _ModelInputs(Dataset):
    """Yields micro-batches without the keys that only packtrain's own trainer knows."""

    def __init__(self, micro_batches: MicroBatches):
        self.micro_batches = micro_batches

    def at_epoch(self, epoch: int) -> _ModelInputs:
        return _ModelInputs(self.micro_batches.at_epoch(epoch))

    def __getitem__(self, micro_batch: MicroBatch) -> dict[str, Any]:
        batch = self.micro_batches[micro_batch]
        return {key: value for key, value in batch.items() if key == "labels" or key not in NOT_MODEL_INPUTS}


def _pad_token_id(trainer: Trainer) -> int:
    """Returns the pad token of the tokenizer, else of the model, else 0: padding is masked by position and never learnt."""
    owners = (trainer.processing_class, trainer.accelerator.unwrap_model(trainer.model).config)
    ids = (getattr(owner, "pad_token_id", None) for owner in owners)
    return next((number for number in ids if number is not None), 0)
