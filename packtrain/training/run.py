"""One recipe, trained: `build` makes the trainer, `train` runs it, saves the model and returns a summary.

It is what `packtrain train quickstart` does, and on every rank `torchrun --nproc_per_node 2 -m packtrain train quickstart`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from rich.console import Console
from transformers import PreTrainedConfig, PreTrainedModel, PrinterCallback, TrainingArguments, set_seed

from packtrain.data.store import tokenizer_fingerprint
from packtrain.errors import CheckpointError, PacktrainError, refused_by
from packtrain.modeling.adapters import continue_adapter, merge_adapter
from packtrain.modeling.attention.varlen import choose_implementation
from packtrain.modeling.audit.causality import check_causal
from packtrain.modeling.cost import cost_of
from packtrain.modeling.isolation import cannot_ask, check_isolation, compute_dtype
from packtrain.modeling.loading import add_lora, count_parameters, load_config, load_model, weights_dtype
from packtrain.modeling.per_document import compute_per_document
from packtrain.modeling.positions import check_positions, position_start
from packtrain.objectives.objective import Task
from packtrain.objectives.task import load_task, plan_training
from packtrain.packing.plan import AnyPlan, plan_evaluation
from packtrain.packing.strategies import resolve_strategy
from packtrain.recipe.recipe import Recipe, check_recipe
from packtrain.training.agreement import check_agreement, weights_hash
from packtrain.training.arguments import training_arguments
from packtrain.training.checkpoints import choose_checkpoint, facts_of, redacted
from packtrain.training.continuing import check_what_is_left, find_place, recipe_of_record, resume_command
from packtrain.training.early_stopping import EarlyStopping
from packtrain.training.engine import EngineReport, asked_engine
from packtrain.training.guards.out_of_memory import checkpoints_activations, is_out_of_memory, of_optimizer
from packtrain.training.guards.stops import StopOnSignal
from packtrain.training.loader import worker_failure
from packtrain.training.meters import max_peak, reset_peak
from packtrain.training.model_card import write_model_card
from packtrain.training.output_dir import clear, explaining_a_full_drive, make_output_dir, refuse_to_replace
from packtrain.training.output_lock import only_run
from packtrain.training.progress import RichProgress
from packtrain.training.ranks import asked_rank, asked_world_size, check_processes, leave
from packtrain.training.resharding import prepare_resume
from packtrain.training.samples import SampleAnswers
from packtrain.training.sealing import read_manifest
from packtrain.training.summary import Summary, describe_machine, package_versions
from packtrain.training.tracking import check_trackers
from packtrain.training.trainer import PackTrainer
from packtrain.training.unused_parameters import uses_every_parameter

if TYPE_CHECKING:
    from peft import PeftModel

Say = Callable[[str], None]
PLACES = ("training.output_dir", "training.logging_dir", "training.run_name")  # which hosts may have apart


def train(
    recipe: Recipe,
    *,
    resume: str | bool = False,
    allow_changes: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    trainer_class: type[PackTrainer] = PackTrainer,
) -> Summary:
    """Trains a recipe and returns what was measured.

    Args:
        recipe: a checked recipe.
        resume: a checkpoint directory, or True for the newest good one in `output_dir`.
        allow_changes: resume although harmless keys of the recipe have changed.
        overwrite: remove the run that is in `output_dir`, with its checkpoints, instead of refusing to replace it.
        console: where progress goes; rank 0's standard output by default.
        trainer_class: what trains, where PackTrainer is to do more.

    Raises:
        PacktrainError: bad data, a plan that does not fit, a model that cannot, a launch that is not what was asked.
    """
    check_recipe(recipe)
    if overwrite and resume is not False:
        what, fix = "would remove the run that resume=True continues", "leave one of the two out"
        raise PacktrainError(what, key="overwrite=True", fix=fix)
    console = console or Console()
    check_trackers(recipe.training.get("report_to"))
    output_dir = make_output_dir(recipe)
    with only_run(output_dir) if asked_rank() == 0 else nullcontext():
        if resume is False and not overwrite and asked_rank() == 0:
            refuse_to_replace(output_dir)
        with explaining_a_full_drive(output_dir):
            return _train_in(output_dir, recipe, resume, allow_changes, overwrite, console, trainer_class)


def _train_in(
    output_dir: Path,
    recipe: Recipe,
    resume: str | bool,
    allow_changes: bool,
    overwrite: bool,
    console: Console,
    trainer_class: type[PackTrainer],
) -> Summary:
    trainer = build(recipe, console=console, resume=resume, allow_changes=allow_changes, trainer_class=trainer_class)
    checkpoint = trainer.checkpoints.chosen
    if checkpoint is not None and not trainer.updates_left:
        recipe = recipe_of_record(checkpoint, recipe, _sayer(console if asked_rank() == 0 else Console(quiet=True)))
    if trainer.is_world_process_zero():
        if resume is False:  # after all that could refuse this run
            clear(output_dir, overwrite=overwrite)
        sections = {name: section for name, section in redacted(recipe.to_dict()).items() if section is not None}
        (output_dir / "recipe.yaml").write_text(yaml.safe_dump(sections, sort_keys=False))
    reset_peak()
    told = trainer.train_dataset.report
    fit(trainer, None if checkpoint is None else str(checkpoint), console=console)
    if trainer.is_world_process_zero() and trainer.train_dataset.report != told:  # rows were read while it trained
        for line in trainer.train_dataset.report.lines():
            _sayer(console)(line)
    best = trainer.checkpoints.best_step()
    if best is not None and trainer.is_world_process_zero():
        _sayer(console)(f"the best model, of step {best:,}, is loaded")
    with _recorded_at(trainer, best):
        after = trainer.evaluate() if trainer.eval_dataset is not None else {}
    model_dir = output_dir / "model"
    trainer.model.config.use_cache = True  # Trainer turns it off for training; whoever generates wants it on
    trainer.save_model(str(model_dir))
    summary = _summarise(trainer, recipe, model_dir, after.get("eval_loss"), best)
    if trainer.is_world_process_zero():
        summary.save(output_dir)
        write_model_card(recipe, summary, model_dir)
    leave(trainer.accelerator)
    return summary


def build(
    recipe: Recipe,
    *,
    console: Console | None = None,
    resume: str | bool = False,
    allow_changes: bool = False,
    trainer_class: type[PackTrainer] = PackTrainer,
) -> PackTrainer:
    """Does everything up to the first step; returns the recipe's trainer, ready for `.train()`.

    The order matters: what needs no model is checked before one is loaded; the plan gives `gradient_accumulation_steps`,
    TrainingArguments start the engine, and under ZeRO-3 only a model loaded after that is sharded while it loads.

    Args:
        resume, allow_changes: as `train`; the checkpoint that is chosen is the trainer's `checkpoints.chosen`.
    """
    ranks = asked_world_size()
    task = load_task(recipe)
    if console and asked_rank() == 0:
        _say_data(task, _sayer(console))
    config = load_config(recipe.model, tokenizer=task.tokenizer, new_tokens=task.new_tokens, fields=task.config_fields)
    plan = plan_training(recipe, task.train, world_size=ranks, cost=cost_of(config))
    args = training_arguments(recipe, plan, evaluate=task.held_out is not None)
    check_processes(world_size=args.world_size, n_gpu=args.n_gpu)
    facts = facts_of(recipe, plan, task.train, config)
    check_agreement(_shared(recipe, task, facts) | {"resume": resume, "allow_changes": allow_changes})
    checkpoint = choose_checkpoint(
        resume,
        output_dir=Path(str(args.output_dir)),
        facts=lambda: facts,
        allow_changes=allow_changes,
        say=_sayer(console or Console(quiet=True)),
        command=resume_command(recipe),
    )
    say = _sayer(console if console and asked_rank() == 0 else Console(quiet=True))
    left = not checkpoint or check_what_is_left(Path(checkpoint), plan, recipe, say, deepspeed=bool(args.deepspeed))
    model = prepare_model(recipe, task, config, args, layout=plan.layout, console=console)
    check_agreement({"the model's weights": weights_hash(model), "the checkpoint": _sealed_as(checkpoint)})
    if ranks > 1 and args.ddp_find_unused_parameters is None and uses_every_parameter(model):
        args.ddp_find_unused_parameters = False
    trainer = make_trainer(recipe, task, plan, args, model, console=console, checkpoint=checkpoint, kind=trainer_class)
    trainer.updates_left = left
    check_documents(recipe, trainer, console=console)
    if prompts := recipe.training.get("sample_prompts"):
        trainer.add_callback(SampleAnswers(trainer, recipe, prompts, console))
    said = task.begin(trainer)
    if said and console and trainer.is_world_process_zero():
        _sayer(console)(said)
    return trainer


def _shared(recipe: Recipe, task: Task, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what must be the same on all ranks, by the names that users know."""
    sections = facts["recipe"]
    settings = {f"{name}.{key}": value for name, part in sections.items() for key, value in (part or {}).items()}
    held_out = task.held_out and task.held_out.fingerprint
    return {name: value for name, value in settings.items() if name not in PLACES} | {
        "the training examples": facts["data_fingerprint"],
        "the held-out examples": held_out,
        "the tokenizer": tokenizer_fingerprint(task.tokenizer),
        "the plan": facts["plan_hash"],
        "the weights of model.model_name_or_path": facts["base_weights"],
        **package_versions(),
    }


def _sealed_as(checkpoint: str | None) -> str | None:
    """Says when a checkpoint was sealed, as this rank reads it; None where it starts afresh."""
    if checkpoint is None:
        return None
    try:
        manifest = read_manifest(Path(checkpoint))
    except CheckpointError as error:
        return error.what
    return f"of step {manifest.get('step')}, sealed at {manifest.get('sealed_at')}"


def prepare_model(
    recipe: Recipe,
    task: Task,
    config: PreTrainedConfig,
    args: TrainingArguments,
    *,
    layout: str,
    console: Console | None = None,
) -> PreTrainedModel | PeftModel:
    """Loads the model with the attention that the layout needs, and makes it ready for the task.

    Raises:
        ModelError: it can't be loaded, does not take the adapter, or has too few positions.
    """
    objective = recipe.objective
    dtype = compute_dtype(args, weights_dtype(recipe.model, config))
    attention = choose_implementation(recipe.model.attn_implementation, layout, args.device, dtype)
    set_seed(args.seed)
    model = load_model(
        recipe.model,
        config,
        attn_implementation=attention,
        auto_class=objective.auto_class,
        new_weights=objective.new_weights,
        device=args.device,
    )
    model = merge_adapter(model, recipe.model)
    prepared = task.prepare(model)
    if recipe.lora is not None:
        lora = prepared.lora | recipe.lora
        model = add_lora(model, lora, gradient_checkpointing=checkpoints_activations(args))
        continue_adapter(model, recipe.model)
    say = _sayer(console if console and args.process_index == 0 else Console(quiet=True))
    if prepared.note:
        trained = "; these rows train with the adapters" if prepared.lora and recipe.lora is not None else ""
        say(f"new tokens   {prepared.note}{trained}")
    if far := check_positions(model, task.longest()):
        say(f"warning      {far}")
    compute_per_document(model)
    return model


def make_trainer(
    recipe: Recipe,
    task: Task,
    plan: AnyPlan,
    args: TrainingArguments,
    model: PreTrainedModel | PeftModel,
    *,
    console: Console | None = None,
    checkpoint: str | None = None,
    kind: type[PackTrainer] = PackTrainer,
) -> PackTrainer:
    """Puts model, task and plan together."""
    batching, max_length, eval_plan = recipe.batching, recipe.data.max_length, None
    if task.held_out is not None:
        eval_plan = plan_evaluation(
            batching,
            task.held_out.lengths,
            layout=plan.layout,
            max_length=max_length,
            world_size=plan.world_size,
            equal_lengths=recipe.objective.equal_lengths,
        )
    strategy = resolve_strategy(plan.strategy)
    trainer = kind(
        model,
        args,
        train_examples=task.train,
        plan=plan,
        loss=task.loss,
        collator=task.collator(strategy, max_length=max_length, position_start=position_start(model)),
        eval_examples=task.held_out,
        eval_plan=eval_plan,
        recipe=recipe,
        probe_memory=batching.probe_memory,
        on_nonfinite=batching.on_nonfinite,
        max_skipped_updates=batching.max_skipped_updates,
        worker_timeout=recipe.data.worker_timeout,
        processing_class=task.tokenizer,
        callbacks=[RichProgress(console), *EarlyStopping.asked(recipe.training, console)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.checkpoints.chosen = None if checkpoint is None else Path(checkpoint)
    return trainer


def check_documents(recipe: Recipe, trainer: PackTrainer, *, console: Console | None = None) -> None:
    """Asks the model, where it will train, whether attention leaks between the documents of a batch.

    Raises:
        ModelError: it does, and the recipe doesn't allow it; or it sees the tokens that it is to predict.
    """
    if recipe.objective.brings_attention:  # made for its own batches; it takes no other
        return
    layout, model = trainer.plan.layout, trainer.accelerator.unwrap_model(trainer.model)
    if recipe.objective.predicts_next and cannot_ask(model) is None:
        check_causal(model)
    found = check_isolation(
        model,
        layout,
        trainer.args.device,
        dtype=compute_dtype(trainer.args, model.dtype),
        allow_contamination=recipe.batching.allow_contamination,
        longest=_longest_row(recipe, trainer),
    )
    if console and trainer.is_world_process_zero():
        _sayer(console)(f"documents of a {layout} batch: {found.says}")


def _longest_row(recipe: Recipe, trainer: PackTrainer) -> int:
    """Returns the most tokens of a document, or of a padded row: what arithmetic that depends on a length can meet."""
    if resolve_strategy(trainer.plan.strategy).padded_to == "max_length":
        return recipe.data.max_length
    parts = (trainer.train_dataset, trainer.eval_dataset)
    return max(part.longest for part in parts if part is not None)


def fit(trainer: PackTrainer, checkpoint: str | None = None, *, console: Console | None = None) -> None:
    """Runs `trainer.train()` with the engine checked before the first update, from a checkpoint of any number of ranks.

    Raises:
        LaunchError: the engine is not the one that was requested, or can't read the checkpoint.
        CheckpointError: `checkpoint` is damaged, not ours or of another run, one could not be saved, or the best is damaged.
        DataError: a data-loading worker was killed, or hangs.
        NonFiniteError: an update's loss or gradient is not finite.
        OutOfMemory: a micro-batch or the optimizer does not fit.
        Stopped: a signal has ended the run early.
    """
    if checkpoint is not None:
        checkpoint = trainer.checkpoints.admit(checkpoint)
        prepare_resume(trainer, checkpoint)
        manifest = read_manifest(Path(checkpoint))
        trainer.finite.skipped = manifest.get("skipped_updates", 0)
        find_place(trainer.plan, checkpoint, manifest)
    if trainer.is_deepspeed_enabled:  # 0.19 calls what torch 2.13 has renamed, in every layer of every step
        warnings.filterwarnings("ignore", message=r".torch\.distributed\.", category=FutureWarning)
    config: Any = trainer.args.deepspeed  # a mapping, by `training_arguments`
    asked = asked_engine(trainer.args, config)
    trainer.add_callback(EngineReport(trainer, asked, resumed_from=checkpoint, console=console, notes=trainer.notes))
    stop = StopOnSignal(trainer)
    trainer.add_callback(stop)
    try:
        with stop.listening():
            trainer.train(resume_from_checkpoint=checkpoint)
    except Exception as error:
        unsaved = trainer.checkpoints.failed(error)
        exhausted = of_optimizer(trainer.state.global_step) if is_out_of_memory(error) else None
        if failure := worker_failure(error) or unsaved or exhausted:
            raise failure from error
        if not trainer.checkpoints.begun:  # optimizer, scheduler, engine and loggers are made before
            with refused_by("the trainer", "training", vars(trainer.args)):
                raise
        raise
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, RichProgress):
                callback.stop()
    if (stopped := stop.early()) is not None:
        leave(trainer.accelerator)
        raise stopped
    trainer.checkpoints.verify_best()


def _sayer(console: Console) -> Say:
    """Prints lines as they are."""
    return lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True)


def _say_data(task: Task, say: Say) -> None:
    """Says which rows were read and what became of them."""
    for line in task.train.report.lines():
        say(line)
    if task.held_out is not None and task.held_out.report.files != task.train.report.files:
        for line in task.held_out.report.lines():
            say(f"evaluation: {line}")


@contextmanager
def _recorded_at(trainer: PackTrainer, step: int | None) -> Iterator[None]:
    """Records what is evaluated while open under `step`, whose weights the model has; None: under the last."""
    state = trainer.state
    before = state.global_step, state.epoch
    if step is not None:
        state.global_step, state.epoch = step, trainer.plan.epochs_after(step)
    try:
        yield
    finally:
        state.global_step, state.epoch = before


def _summarise(trainer: PackTrainer, recipe: Recipe, model_dir: Path, after: float | None, best: int | None) -> Summary:
    """Collects the figures of a finished run; counts are summed over ranks."""
    meter, plan = trainer.meter, trainer.plan
    counts = torch.tensor(
        [meter.counts.real, meter.counts.computed, meter.counts.supervised],
        dtype=torch.int64,
        device=trainer.args.device,
    )
    real, computed, supervised = trainer.accelerator.reduce(counts, reduction="sum").tolist()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    peak, peak_of = max_peak(trainer.earlier_peak)
    trained, frozen = count_parameters(trainer.accelerator.unwrap_model(trainer.model))
    return Summary(
        recipe=Path(recipe.sources.path).stem if recipe.sources is not None else "recipe",
        strategy=recipe.batching.strategy,
        output_dir=str(trainer.args.output_dir),
        model_dir=str(model_dir),
        held_out_loss_before=evaluations[0] if evaluations else None,
        held_out_loss_after=after,
        best_step=best,
        train_loss_first=losses[0] if losses else None,
        train_loss_last=losses[-1] if losses else None,
        updates=trainer.state.global_step,
        skipped_updates=trainer.finite.skipped,
        micro_batches_per_update=plan.gradient_accumulation_steps,
        examples=plan.examples_after(trainer.state.global_step),
        examples_seen=plan.count_examples(trainer.state.global_step),
        epochs=round(trainer.state.epoch or 0, 4),
        world_size=trainer.args.world_size,
        real_tokens=real,
        supervised_tokens=supervised,
        padding_share=1 - real / computed if computed else None,
        measured_after=meter.after,
        seconds=meter.seconds,
        real_tokens_per_second=real / meter.seconds if meter.seconds else None,
        peak_memory=peak,
        peak_memory_of=peak_of,
        trainable_parameters=trained,
        frozen_parameters=frozen,
        attn_implementation=trainer.model.config._attn_implementation,
        data=trainer.train_dataset.report.to_dict(),
        evaluation_data=trainer.eval_dataset.report.to_dict() if trainer.eval_dataset is not None else None,
        held_out_fingerprint=trainer.eval_dataset.fingerprint if trainer.eval_dataset is not None else None,
        machine=describe_machine(),
        versions=package_versions(),
    )
