"""One recipe, trained: data -> plan -> model -> PackTrainer -> saved model and summary.

packtrain train recipes/quickstart.yaml
torchrun --nproc_per_node 2 -m packtrain train recipes/quickstart.yaml
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from rich.console import Console
from transformers import PrinterCallback, TrainingArguments, set_seed

from packtrain.errors import PacktrainError, refused_by
from packtrain.modeling.attention import choose_implementation
from packtrain.modeling.loading import add_lora, count_parameters, load_config, load_model
from packtrain.modeling.positions import check_positions, position_start
from packtrain.packing.cost import Cost
from packtrain.packing.plan import Plan
from packtrain.packing.strategies import resolve_strategy
from packtrain.recipe import Recipe
from packtrain.training.checkpoints.changes import redacted
from packtrain.training.checkpoints.checkpoint import choose_checkpoint
from packtrain.training.engines.deepspeed_config import deepspeed_config
from packtrain.training.engines.engine import fit
from packtrain.training.engines.isolation import check_isolation, compute_dtype
from packtrain.training.engines.launch import asked_world_size, check_processes
from packtrain.training.engines.leaving import leave
from packtrain.training.inputs import Inputs, load_inputs, plan_evaluation, plan_training
from packtrain.training.memory.peak import peak_memory, reset_peak
from packtrain.training.nonfinite import FILE as UPDATES_FILE
from packtrain.training.progress import RichProgress
from packtrain.training.summary import Summary, describe_machine, package_versions
from packtrain.training.trainer import PackTrainer


def train(
    recipe: Recipe,
    *,
    resume: str | bool = False,
    allow_changes: bool = False,
    console: Console | None = None,
    trainer_class: type[PackTrainer] = PackTrainer,
) -> Summary:
    """Train a recipe and return what was measured.

    Args:
        recipe: a checked recipe.
        resume: a checkpoint directory, or True for the newest good one in `output_dir`.
        allow_changes: resume although harmless keys of the recipe have changed.
        console: where progress goes; rank 0's standard output by default.
        trainer_class: what trains, where PackTrainer is to do more.

    Raises:
        PacktrainError: bad data, a plan that does not fit, a model that cannot, a launch that is not what was asked.
    """
    console = console or Console()
    output_dir = _output_dir(recipe)
    trainer, inputs = build_trainer(recipe, console=console, trainer_class=trainer_class)
    say = lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True)  # noqa: E731
    checkpoint = choose_checkpoint(trainer, resume, allow_changes=allow_changes, say=say)
    if trainer.is_world_process_zero():
        if checkpoint is None:
            _say_what_is_there(output_dir, say)
        (output_dir / "recipe.yaml").write_text(yaml.safe_dump(redacted(recipe.to_dict()), sort_keys=False))
    reset_peak()
    fit(trainer, checkpoint, console=console)
    after = trainer.evaluate() if inputs.held_out else {}
    model_dir = output_dir / "model"
    trainer.model.config.use_cache = True  # Trainer turns it off for training; whoever generates wants it on
    trainer.save_model(str(model_dir))
    summary = _summarise(trainer, recipe, inputs, model_dir, after.get("eval_loss"))
    if trainer.is_world_process_zero():
        summary.save(output_dir)
    leave(trainer.accelerator)
    return summary


def build_trainer(
    recipe: Recipe, *, console: Console | None = None, trainer_class: type[PackTrainer] = PackTrainer
) -> tuple[PackTrainer, Inputs]:
    """Everything up to the first step: the recipe's trainer, ready for `.train()`, and what it reads.

    The order matters: the plan gives `gradient_accumulation_steps`, TrainingArguments start the engine, and
    under ZeRO-3 only a model loaded after that is sharded while it loads.
    """
    world_size = asked_world_size()
    inputs = load_inputs(recipe)
    pretrained = recipe.model.model_dump(include={"model_name_or_path", "revision", "trust_remote_code"})
    config = load_config(
        **pretrained, config=recipe.model.config, tokenizer=inputs.tokenizer, new_tokens=inputs.chosen.new_tokens
    )
    plan = plan_training(recipe, inputs.train.lengths, world_size=world_size, cost=Cost.of_config(config))
    args = training_arguments(recipe, plan, evaluate=inputs.held_out is not None)
    set_seed(args.seed)
    auto = recipe.model.dtype == "auto"
    weights = (config.dtype or torch.float32) if auto else getattr(torch, recipe.model.dtype)
    dtype = compute_dtype(args, weights)
    model = load_model(
        config,
        **pretrained,
        dtype=recipe.model.dtype,
        attn_implementation=choose_implementation(
            recipe.model.attn_implementation, layout=plan.layout, device=args.device, dtype=dtype
        ),
    )
    prepared = inputs.chosen.prepare(model, inputs.tokenizer)
    if recipe.lora is not None:
        model = add_lora(model, prepared.lora | recipe.lora, gradient_checkpointing=_checkpoints_activations(args))
    trainer = trainer_class(
        model,
        args,
        train_examples=inputs.train,
        plan=plan,
        objective=inputs.chosen.objective,
        collator=inputs.chosen.collator(
            layout=plan.layout,
            pad_token_id=inputs.tokenizer.pad_token_id,
            padded_to=resolve_strategy(plan.strategy).padded_to,
            max_length=recipe.data.max_length,
            position_start=position_start(model),
        ),
        recipe=recipe,
        probe_memory=recipe.batching.probe_memory,
        on_nonfinite=recipe.batching.on_nonfinite,
        max_skipped_updates=recipe.batching.max_skipped_updates,
        worker_timeout=recipe.data.worker_timeout,
        eval_examples=inputs.held_out,
        eval_plan=inputs.held_out
        and plan_evaluation(recipe, inputs.held_out.lengths, layout=plan.layout, world_size=world_size),
        processing_class=inputs.tokenizer,
        callbacks=[RichProgress(console)],
    )
    trainer.remove_callback(PrinterCallback)
    if console and prepared.note and trainer.is_world_process_zero():
        trained = "; these rows train beside the adapters" if prepared.lora and recipe.lora is not None else ""
        console.print(f"new tokens   {prepared.note}{trained}", highlight=False)
    longest = max(int(part.lengths.max()) for part in (inputs.train, inputs.held_out) if part is not None)
    far = check_positions(model, longest)
    if far and console and trainer.is_world_process_zero():
        console.print(f"warning      {far}", highlight=False)
    if recipe.objective.name != "block_diffusion":  # whose attention isolates and takes no other batch
        allow = recipe.batching.allow_contamination
        found = check_isolation(model, plan.layout, args.device, dtype=dtype, allow_contamination=allow)
        if console and trainer.is_world_process_zero():
            console.print(f"documents of a {plan.layout} batch: {found}", highlight=False, soft_wrap=True)
    check_processes(world_size=args.world_size, n_gpu=args.n_gpu)
    return trainer, inputs


def training_arguments(recipe: Recipe, plan: Plan, *, evaluate: bool) -> TrainingArguments:
    """The recipe's `training:` section as TrainingArguments, with what the plan decides."""
    decided = {
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "per_device_train_batch_size": 1,  # the plan sizes micro-batches; engines only want a number
        "remove_unused_columns": False,
        "ignore_data_skip": True,  # the plan starts at global_step by itself
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,  # RichProgress shows it
    }
    training = {"eval_on_start": evaluate, "use_cpu": use_cpu_by_default()} | recipe.training | decided
    training["deepspeed"] = deepspeed_config(
        training,
        world_size=plan.world_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        use_cpu=training["use_cpu"],
    )
    with refused_by("transformers", "training", training):
        args = TrainingArguments(**training)
    if args.fp16 and args.device.type == "cpu" and training["deepspeed"] is None:
        what, fix = "has no effect on a CPU, where nothing would compute in it", "take bf16: true, or leave it out"
        raise PacktrainError(what, key="training.fp16", value=True, fix=fix)
    return args


def use_cpu_by_default() -> bool:
    """Where there is no accelerator, or Apple's, which has no float64: sums over tokens are made in it."""
    return not torch.accelerator.is_available() or torch.accelerator.current_accelerator().type == "mps"


def _checkpoints_activations(args: TrainingArguments) -> bool:
    """Whether layers are recomputed in the backward pass, under the old name of the setting or the new one."""
    return bool(getattr(args, "activation_checkpointing", False) or args.gradient_checkpointing)


def _output_dir(recipe: Recipe) -> Path:
    """The run's directory, made, before anything is loaded for it."""
    path = Path(recipe.training["output_dir"])
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        what, fix = f"nothing can be written there: {error.strerror}", "choose a directory on a drive with room"
        raise PacktrainError(what, key="training.output_dir", value=str(path), fix=fix) from None


def _say_what_is_there(output_dir: Path, say: Callable[[str], None]) -> None:
    """Of a run that another one has left in its directory."""
    (output_dir / UPDATES_FILE).unlink(missing_ok=True)  # updates that were not finite, of that run
    if (output_dir / "summary.json").exists() or any(output_dir.glob("checkpoint-*")):
        fix = "--resume goes on with it; choose another training.output_dir to keep it"
        say(f"{output_dir} holds another run, whose model, recipe and checkpoints this one will replace ({fix})")


def _summarise(trainer: PackTrainer, recipe: Recipe, inputs: Inputs, model_dir: Path, after: float | None) -> Summary:
    """Collect the figures of a finished run; counts are summed over ranks."""
    meter, plan = trainer.meter, trainer.plan
    counts = torch.tensor(
        [meter.counts.real, meter.counts.computed, meter.counts.supervised],
        dtype=torch.int64,
        device=trainer.args.device,
    )
    real, computed, supervised = trainer.accelerator.reduce(counts, reduction="sum").tolist()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    peak, peak_of = peak_memory()
    trained, frozen = count_parameters(trainer.accelerator.unwrap_model(trainer.model))
    return Summary(
        recipe=Path(recipe.sources.path).stem,
        strategy=recipe.batching.strategy,
        output_dir=str(trainer.args.output_dir),
        model_dir=str(model_dir),
        held_out_loss_before=evaluations[0] if evaluations else None,
        held_out_loss_after=after,
        train_loss_first=losses[0] if losses else None,
        train_loss_last=losses[-1] if losses else None,
        updates=trainer.state.global_step,
        skipped_updates=trainer.finite.skipped,
        micro_batches_per_update=plan.gradient_accumulation_steps,
        examples=len(inputs.train),
        epochs=round(trainer.state.epoch or 0, 4),
        world_size=trainer.args.world_size,
        real_tokens=real,
        supervised_tokens=supervised,
        filler_share=1 - real / computed if computed else None,
        seconds=meter.seconds,
        real_tokens_per_second=real / meter.seconds if meter.seconds else None,
        peak_memory=peak,
        peak_memory_of=peak_of,
        trainable_parameters=trained,
        frozen_parameters=frozen,
        attn_implementation=trainer.model.config._attn_implementation,
        data=inputs.train.report.to_dict(),
        machine=describe_machine(),
        versions=package_versions(),
    )
