"""Out of memory: which micro-batch, how large, and which knob to turn; and that in minute one, not in hour seven.

    error: update 0, the run's largest micro-batch, tried before it: out of memory with 16,384 tokens in 31 documents,
    the longest of 2,048, 9,120 supervised
        fix: lower batching.max_tokens (it is 16,384; the updates stay the same), or set training.gradient_checkpointing

`ProbeMemory` runs the micro-batch of the plan that needs the most memory forward and backward before the first update,
and once more after it, when the optimizer has made its states. It changes nothing: gradients are dropped, and the
random state, the model's buffers and its mode are what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from packtrain.errors import OutOfMemory, PacktrainError
from packtrain.packing.collator import MicroBatches
from packtrain.packing.plan import AnyPlan, MicroBatch
from packtrain.training.memory.activations import activation_formula
from packtrain.training.memory.plan import MicroBatchSize, logit_bytes, sampled_micro_batches
from packtrain.training.meters import peak_memory

if TYPE_CHECKING:
    from peft import PeftModel

_WORDS = ("DefaultCPUAllocator: can't allocate memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether a device or this process ran out of memory; torch's CPU allocator raises a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


@contextmanager
def explaining_out_of_memory(
    batch: Mapping[str, Any], where: str, *, max_tokens: int, args: TrainingArguments
) -> Iterator[None]:
    """Turns running out of memory within, where `batch` is computed, into an OutOfMemory that says what to change.

    Args:
        max_tokens: the capacity that the batch was planned for.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise _of_batch(batch, where, max_tokens, args) from error


def of_optimizer(step: int) -> OutOfMemory:
    """Returns the error for memory that ran out in update `step` while no micro-batch was being computed."""
    return OutOfMemory(
        "out of memory outside of the micro-batches, most likely for the optimizer states",
        where=f"update {step}",
        fix="train an adapter (lora:), shard the states over ranks (launch/), or choose another training.optim",
    )


def _of_batch(batch: Mapping[str, Any], where: str, max_tokens: int, args: TrainingArguments) -> OutOfMemory:
    if "cu_seq_lens_q" in batch:
        lengths, layout = batch["cu_seq_lens_q"].diff(), ""
    else:
        lengths, layout = batch["attention_mask"].sum(dim=1), " with padding"
    labels = batch["labels"]
    documents = len(lengths)
    what = (
        f"out of memory with {labels.numel():,} tokens{layout} in {documents:,} document{'s' if documents > 1 else ''}, "
        f"the longest of {int(lengths.max()):,}, {int((labels != -100).sum()):,} supervised"
    )
    knob = f"lower batching.max_tokens (it is {max_tokens:,}; the updates stay the same)"
    fixes = [knob if documents > 1 else "lower data.max_length: this document is a micro-batch by itself"]
    if not checkpoints_activations(args):
        fixes.append("set training.gradient_checkpointing: true")
    if layout:
        fixes.append("choose a batching.strategy without padding, for example balanced")
    return OutOfMemory(what, where=where, fix=", or ".join(fixes))


class ProbeMemory(TrainerCallback):
    """Tries the run's heaviest micro-batch; see the module's docstring.

    Args:
        trainer: that runs it.
        plan: whose micro-batches are looked at.
        batches: `MicroBatch -> batch`.
        rehearse: `(batch, times)`: computes a micro-batch forward and backward without a trace.

    Attributes:
        said: the result for people; "" before.
    """

    def __init__(
        self, trainer: Trainer, plan: AnyPlan, batches: MicroBatches, rehearse: Callable[[Mapping[str, Any], int], None]
    ):
        self.trainer, self.plan, self.batches, self.rehearse, self.said = trainer, plan, batches, rehearse, ""
        self._again = True

    @classmethod
    def wanted(cls, trainer: Trainer, asked: bool | None) -> bool:
        """Returns whether to try: by default on a device with its own memory.

        Raises:
            PacktrainError: requested with DeepSpeed.
        """
        if trainer.is_deepspeed_enabled:
            if asked:
                what, fix = (
                    "is not supported with DeepSpeed, which keeps the gradients of every backward pass",
                    "leave it out",
                )
                fix += "; `packtrain plan RECIPE --memory 80GiB` estimates what the run needs"
                raise PacktrainError(what, key="batching.probe_memory", value=True, fix=fix)
            return False
        return trainer.args.device.type != "cpu" if asked is None else asked

    def on_train_begin(self, args, state, control, **kwargs):
        self._try("tried before it")
        self._again = not getattr(self.trainer.optimizer, "state", None)  # a resumed run has them

    def on_step_end(self, args, state, control, **kwargs):
        if self._again:
            self._again = False
            self._try("tried with the optimizer's states")

    def _try(self, when: str) -> None:
        trainer, plan = self.trainer, self.plan
        model = trainer.accelerator.unwrap_model(trainer.model)
        step, micro_batch, size = heaviest_micro_batch(plan, self.batches.examples.supervised, model, trainer.args)
        epoch, _ = plan.locate(step)
        batch = self.batches.at_epoch(epoch)[micro_batch]
        where = f"update {trainer.state.global_step}, the run's largest micro-batch, {when}"
        with explaining_out_of_memory(batch, where, max_tokens=plan.scope.max_tokens, args=trainer.args):
            self.rehearse(batch, min(2, plan.gradient_accumulation_steps))
        peak, of = peak_memory()
        self.said = (
            f"{size.tokens:,} tokens in {len(micro_batch):,} documents, tried: peak {peak / 2**20:,.0f} MiB ({of})"
        )


@contextmanager
def without_a_trace(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Puts gradients, buffers, mode and random state of a model back as they were, and leaves ranks unsynchronised."""
    was_training, buffers = model.training, [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = [] if device.type == "cpu" else [device]
    alone = model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()
    try:
        model.train()
        with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type), alone:
            yield
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def heaviest_micro_batch(
    plan: AnyPlan, supervised: np.ndarray, model: PreTrainedModel | PeftModel, args: TrainingArguments
) -> tuple[int, MicroBatch, MicroBatchSize]:
    """Returns the micro-batch of any rank that needs the most memory by the formulas of `memory`, and its update.

    All ranks find the same one, so that those of a sharded model gather its layers together. Of a run of more than a
    thousand updates a thousand are looked at.
    """
    config = model.config.get_text_config()
    item = 2 if args.bf16 or args.fp16 else model.dtype.itemsize
    checkpointing = checkpoints_activations(args)
    try:
        activations = activation_formula(config, itemsize=item)
    except (TypeError, AttributeError):  # a config with other names: tokens alone
        activations = None
    masked = plan.layout == "padded"

    def needs(size: MicroBatchSize) -> int:
        kept = activations.bytes(size.tokens, checkpointing=checkpointing) if activations else size.tokens
        if activations is None:
            return kept + masked * size.rows * size.width**2
        how = dict(hidden_size=config.hidden_size, head=0, item=item, item_of_head=item)  # the head is always the same
        logits = sum(logit_bytes(config.vocab_size, size.supervised, **how))
        return kept + logits + masked * size.rows * size.width**2

    return max(sampled_micro_batches(plan, supervised), key=lambda found: needs(found[2]))


def checkpoints_activations(args: TrainingArguments) -> bool:
    """Returns whether layers are recomputed in the backward pass, under the old name of the setting or the new one."""
    return bool(getattr(args, "activation_checkpointing", False) or args.gradient_checkpointing)
