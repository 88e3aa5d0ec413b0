"""PackTrainer: transformers' Trainer, fed from a plan.

Eight public methods of Trainer are overridden and nothing else changes, so every TrainingArguments field,
callback, logger and engine (DDP, DeepSpeed, FSDP) behaves as users know it:

    get_train_dataloader / get_eval_dataloader   micro-batches from the plan, from `global_step` on
    set_initial_training_values                  the plan knows how many updates a run has
    get_batch_samples                            the denominator of the loss, summed over the whole step and all ranks
    compute_loss                                 this micro-batch's share of the step's loss
    training_step                                no update from numbers that are not finite; out of memory explained
    evaluation_loop                              sums over tokens and over examples, divided once at the end
    train                                        nothing of a checkpoint is read before it is verified, no pickle runs
    save_model                                   a checkpoint begins with an empty, marked directory; no token is saved
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from packtrain.data.examples import AnyExamples
from packtrain.errors import PacktrainError, hidden, refused_by
from packtrain.modeling.trained_on import TrainedOn, base_of_adapter
from packtrain.objectives.causal import CAUSAL_LM
from packtrain.objectives.objective import Loss
from packtrain.packing.collator import MicroBatches, PackCollator
from packtrain.packing.plan import Plan
from packtrain.recipe.recipe import Recipe
from packtrain.recipe.sections import MAX_SKIPPED_UPDATES, WORKER_TIMEOUT
from packtrain.training.checkpoints import Checkpoints, facts_of
from packtrain.training.compiling import CompileLayers
from packtrain.training.guards.nonfinite import FiniteUpdates
from packtrain.training.guards.out_of_memory import ProbeMemory, explaining_out_of_memory, without_a_trace
from packtrain.training.liger import keep_own_loss
from packtrain.training.loader import PlanLoader, loader_options, values_of_plan
from packtrain.training.meters import Meter, add_sums, evaluation_sums, max_peak, means_of
from packtrain.training.restricted import restricted_unpickling, runs_code
from packtrain.training.sealing import read_manifest
from packtrain.training.tracking import facts_for_trackers, reporting_arguments
from packtrain.training.watchdog import Watchdog

if TYPE_CHECKING:
    from peft import PeftModel


class PackTrainer(Trainer):
    """Trains `model` on the steps of `plan`.

    Args:
        model: a model of transformers, or a peft model around one.
        args: TrainingArguments; `gradient_accumulation_steps` must be the plan's.
        train_examples: what the plan's example ids point into.
        plan: the updates of the whole run.
        collator: lays a micro-batch out in memory; its layout must be the plan's.
        loss: what is learnt.
        eval_examples: held-out examples, with `eval_plan` (one epoch over them).
        recipe: the settings of the run, kept in its checkpoints.
        probe_memory: whether to try the largest micro-batch before the first update; None: on a GPU.
        on_nonfinite, max_skipped_updates: what to do with an update whose loss or gradient is not finite.
        worker_timeout: seconds to wait for a batch of a data-loading worker.
        trainer_kwargs: `callbacks`, `processing_class`, `optimizers` ... as Trainer has them.
    """

    model: PreTrainedModel  # or a peft model around one, which passes its attributes on
    train_dataset: AnyExamples
    eval_dataset: AnyExamples | None
    loss_is_scaled_for_ga = True  # compute_loss divides by the weights of the whole step

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: TrainingArguments,
        *,
        train_examples: AnyExamples,
        plan: Plan,
        collator: PackCollator,
        loss: Loss = CAUSAL_LM,
        eval_examples: AnyExamples | None = None,
        eval_plan: Plan | None = None,
        recipe: Recipe | None = None,
        probe_memory: bool | None = None,
        on_nonfinite: Literal["stop", "skip"] = "stop",
        max_skipped_updates: int = MAX_SKIPPED_UPDATES,
        worker_timeout: int = WORKER_TIMEOUT,
        **trainer_kwargs: Any,
    ):
        if args.gradient_accumulation_steps != plan.gradient_accumulation_steps:
            raise PacktrainError(
                f"the plan has {plan.gradient_accumulation_steps} micro-batches per step",
                key="gradient_accumulation_steps",
                value=args.gradient_accumulation_steps,
                fix=f"set it to {plan.gradient_accumulation_steps}",
            )
        if trainer_kwargs.get("compute_metrics") is not None:
            raise PacktrainError(
                "is not supported: evaluation sums the loss at supervised positions and keeps no logits for metrics",
                key="compute_metrics",
                fix="leave it out, or evaluate the saved model with your own loop",
            )
        self.plan, self.eval_plan, self.collator, self.loss = plan, eval_plan, collator, loss
        self.worker_timeout = worker_timeout
        self.updates_left = True  # False: `train` only restores what a resumed run has made
        self.meter, self._logged_meter = Meter(), Meter()
        self.earlier_peak: tuple[int, str] | None = None  # of memory, before the resume; see `peak_memory`
        self._sums: dict[str, torch.Tensor] = {}  # of the loss's own figures, since the last log
        keep, args = (
            args.save_total_limit,
            reporting_arguments(args, facts_for_trackers(recipe, plan, len(train_examples))),
        )
        args.run_name = hidden(args.run_name) if args.run_name else None  # written by loggers and in training_args.bin
        args.save_total_limit = None  # Trainer would remove the last good checkpoint before the new one is complete
        keep_own_loss(args)
        with refused_by("transformers", "training", vars(args)):
            self.compilation = CompileLayers.asked(args, plan)
            super().__init__(
                model,
                args,
                train_dataset=cast(Any, train_examples),  # Trainer only hands them to the loaders below
                eval_dataset=cast(Any, eval_examples),
                data_collator=collator,
                **trainer_kwargs,
            )
        if self.compilation is not None:
            self.compilation.restore(self.args)
            self.add_callback(self.compilation)
        self.model_accepts_loss_kwargs = True  # releases before `loss_is_scaled_for_ga` read this instead
        self._head = loss.head(self.accelerator.unwrap_model(self.model))
        self.finite = FiniteUpdates(self, on_nonfinite, max_skipped_updates)
        self.checkpoints = Checkpoints(
            self,
            functools.partial(facts_of, recipe, plan, train_examples, self.model.config),
            keep,
            progress=self._progress,
        )
        base = base_of_adapter(recipe.model, self.model.config) if recipe and recipe.lora else None
        self.trained_on = TrainedOn(prompts=train_examples.report.prompts, base_weights=base)
        self.probe: ProbeMemory | None = None
        if ProbeMemory.wanted(self, probe_memory):
            self.probe = ProbeMemory(self, plan, MicroBatches(train_examples, collator, plan.shapes), self.rehearse)
        self.watchdog = Watchdog()
        for callback in (StepEnd(plan, self.meter), self.checkpoints, self.probe, self.watchdog):
            if callback is not None:
                self.add_callback(callback)

    # Data

    def get_train_dataloader(self) -> PlanLoader:
        return self._loader(self.plan, self.train_dataset, lambda: self.state.global_step)

    def get_eval_dataloader(self, eval_dataset: AnyExamples | None = None) -> PlanLoader:
        if self.eval_plan is None or self.eval_dataset is None:
            raise PacktrainError(
                "there is nothing to evaluate on", key="data.eval_size", fix="set data.eval_size or data.eval_path"
            )
        return self._loader(self.eval_plan, self.eval_dataset, lambda: 0)

    def _loader(self, plan: Plan, examples: AnyExamples, global_step: Callable[[], int]) -> PlanLoader:
        return PlanLoader(
            plan=plan,
            dataset=MicroBatches(examples, self.collator, plan.shapes),
            rank=self.args.process_index,
            global_step=global_step,
            dataloader_kwargs=loader_options(self.args, self.worker_timeout),
        )

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader) -> tuple:
        """Returns epochs, updates per epoch and updates in total from the plan; the rest as Trainer computes it."""
        epochs, *values = values_of_plan(self.plan, super().set_initial_training_values(args, dataloader))
        return epochs if self.updates_left else 0, *values

    def notes(self) -> dict[str, str]:
        """Returns what to say when training begins: (name, text) of the largest micro-batch and the resumed schedule."""
        said = {"largest": self.probe.said if self.probe else None, "schedule": self.checkpoints.jump}
        return {name: text for name, text in said.items() if text}

    # Loss

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | None]:
        """Returns this rank's micro-batches of the step, and the loss's denominator (float64, summed over all ranks)."""
        step = self.state.global_step
        self.watchdog.begins((step, 0), f"reading the examples of update {step}")
        self.meter.start_step()
        batches = list(islice(epoch_iterator, num_batches))
        if not batches:  # the resumed epoch is over
            return [], None
        self.meter.fetched(batches)
        self._computed = 0  # micro-batches of this update
        self.watchdog.begins((step, 1), f"with the examples of update {step}")
        none = torch.zeros((), dtype=torch.float64)
        total = sum((self.loss.denominator(batch) for batch in batches), none)
        # pinned batches travel while the device still computes; Trainer would wait for every tensor of every micro-batch
        batches = [send_to_device(batch, device, non_blocking=True) for batch in batches]
        return batches, self.accelerator.reduce(total.to(device, non_blocking=True), reduction="sum")

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns this micro-batch's share of the step's loss, times the ranks that the engine will average over."""
        assert num_items_in_batch is not None and not return_outputs
        losses = self.loss.losses(model, inputs, head=self._head)
        if self.loss.sums is not None:
            add_sums(self._sums, self.loss.sums(losses, inputs))
        share = losses.weighted_sum() / num_items_in_batch
        loss = (share * self.accelerator.num_processes).float()
        self.finite.saw(loss, inputs["example_ids"])
        return loss

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        step, number = self.state.global_step, self._computed
        where = f"update {step} (rank {self.args.process_index}, micro-batch {number})"
        self.watchdog.begins((step, 2 + number), f"in micro-batch {number} of update {step}")
        with self._explained(inputs, where):
            loss = super().training_step(model, inputs, *args, **kwargs)
        self._computed += 1
        if self.accelerator.sync_gradients:  # the update's last micro-batch
            self.finite.check(model)
        return loss

    def _explained(self, batch: Mapping[str, Any], where: str) -> AbstractContextManager[None]:
        return explaining_out_of_memory(batch, where, max_tokens=self.plan.scope.max_tokens, args=self.args)

    def rehearse(self, batch: Mapping[str, Any], times: int) -> None:
        """Computes a micro-batch as an update does, without a trace; a second time with the gradients of the first."""
        model: Any = self.model_wrapped
        with without_a_trace(model, self.args.device):
            for _ in range(times):
                inputs = self._prepare_inputs(dict(batch))
                with self.compute_loss_context_manager():
                    losses = self.loss.losses(model, inputs, head=self._head)
                losses.weighted_sum().float().backward()

    # Evaluation

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: PlanLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Computes a held-out loss that does not depend on how the set was batched or dealt to ranks.

        `eval_loss` is the mean nll over supervised tokens, `eval_loss_per_example` the mean over examples of
        their mean, `eval_tokens` the supervised tokens counted. A loss's own `sums` come on top, or instead.
        """
        model: Any = self.model_wrapped
        if model is self.model and not self.is_in_train:  # not prepared by train(): mixed precision still to be set up
            model = self.accelerator.prepare_model(self.model, evaluation_mode=True)
        was_training = model.training
        model.eval()
        sums = torch.zeros(4, dtype=torch.float64, device=self.args.device)
        own: dict[str, torch.Tensor] = {}
        for batch in dataloader:
            batch = self._prepare_inputs(batch)
            with self._explained(batch, "evaluation"):
                losses = self.loss.losses(model, batch, head=self._head)
            sums += evaluation_sums(losses, batch)
            if self.loss.sums is not None:
                add_sums(own, self.loss.sums(losses, batch))
        model.train(was_training)
        nll, tokens, example_nll, examples = self.accelerator.reduce(sums, reduction="sum").tolist()
        metrics = {
            f"{metric_key_prefix}_loss": nll / max(tokens, 1),
            f"{metric_key_prefix}_loss_per_example": example_nll / max(examples, 1),
            f"{metric_key_prefix}_tokens": int(tokens),
        }
        own = {name: self.accelerator.reduce(own[name], reduction="sum") for name in sorted(own)}
        metrics |= {f"{metric_key_prefix}_{name}": value for name, value in means_of(own).items()}
        return EvalLoopOutput(predictions=cast(Any, None), label_ids=None, metrics=metrics, num_samples=int(examples))

    # Checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Trains, from the beginning or from a checkpoint; True resumes from the newest valid one.

        Raises:
            CheckpointError: the checkpoint is damaged, was not written by packtrain, or belongs to another run.
        """
        if not resume_from_checkpoint:
            return super().train(**kwargs)
        checkpoint = self.checkpoints.admit(resume_from_checkpoint)
        self._go_on_measuring(read_manifest(Path(checkpoint)))
        with self.checkpoints.reading as reading:
            reading.enter_context(restricted_unpickling())
            try:
                return super().train(resume_from_checkpoint=checkpoint, **kwargs)
            except UnpicklingError as error:
                raise runs_code(error, checkpoint) from error

    def _progress(self) -> dict[str, Any]:
        """Returns what a checkpoint carries of the run's figures; called on every rank."""
        peak, peak_of = max_peak(self.earlier_peak)
        measured = self.meter.carried(self._over_ranks) | {"peak_memory": peak, "peak_memory_of": peak_of}
        return {"skipped_updates": self.finite.skipped, "measured": measured}

    def _go_on_measuring(self, manifest: Mapping[str, Any]) -> None:
        measured = manifest.get("measured")
        self.meter.go_on(measured, manifest["step"], counting=self.is_world_process_zero())
        self._logged_meter = copy.copy(self.meter)
        self.earlier_peak = measured and (measured["peak_memory"], measured["peak_memory_of"])

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if _internal_call and output_dir is not None:  # the first thing that Trainer does for a checkpoint
            self.checkpoints.begin(Path(output_dir))
        token, self.args.hub_token = self.args.hub_token, None  # `training_args.bin` would have it in clear
        try:
            super().save_model(output_dir, _internal_call=True)
            if self.args.should_save:
                self.trained_on.save(Path(output_dir or str(self.args.output_dir)))
        finally:
            self.args.hub_token = token
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    # Logs

    def _over_ranks(self, counts: list[int]) -> list[int]:
        return self.accelerator.reduce(torch.tensor(counts, device=self.args.device), reduction="sum").tolist()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds real tokens/s, padding share and the loss's own figures since the last log, over all ranks."""
        if "loss" in logs:
            logs |= self.meter.since(self._logged_meter, self._over_ranks)
            self._logged_meter = copy.copy(self.meter)
            sums = {name: self.accelerator.reduce(self._sums[name], reduction="sum") for name in sorted(self._sums)}
            logs |= means_of(sums, skip=("loss",))
            self._sums.clear()
        super().log(logs, start_time)


class StepEnd(TrainerCallback):
    """Stops the clock after every update, and sets the epoch from the plan (Trainer counts from where it resumed)."""

    def __init__(self, plan: Plan, meter: Meter):
        self.plan, self.meter = plan, meter

    def on_step_end(self, args, state, control, **kwargs):
        self.meter.end_step()
        state.epoch = epoch_after(self.plan, state.global_step)


def epoch_after(plan: Plan, step: int) -> float:
    """Returns the epochs done after update `step` (from 1 on), with its fraction."""
    epoch, index = plan.locate(step - 1)
    return epoch + (index + 1) / plan.steps_in_epoch(epoch)
