"""Out of memory: which micro-batch, how large, and which knob to turn; and that in minute one, not in hour seven.

    error: update 0, the run's largest micro-batch, tried before it: out of memory with 16,384 tokens in 31 documents,
    the longest of 2,048, 9,120 supervised
        fix: lower batching.max_tokens (it is 16,384; the updates stay the same), or set training.gradient_checkpointing

`ProbeMemory` runs the micro-batch of the plan that needs the most memory forward and backward before the first update,
and once more after it, when the optimizer has made its states. It changes nothing: gradients are dropped, and the
random state, the model's buffers and its mode are what they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from packtrain.errors import OutOfMemory, PacktrainError
from packtrain.packing.collator import MicroBatches
from packtrain.packing.plan import MicroBatch
from packtrain.training.memory.activations import activation_formula
from packtrain.training.memory.peak import peak_memory
from packtrain.training.memory.plan import MicroBatchSize, sampled_micro_batches

if TYPE_CHECKING:
    from packtrain.training.trainer import PackTrainer

_WORDS = ("DefaultCPUAllocator: can't allocate memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Of a device or of this process; torch's CPU allocator raises a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


@contextmanager
def explained(trainer: PackTrainer, batch: Mapping[str, Any], where: str) -> Iterator[None]:
    """A want of memory within, where `batch` is computed, becomes an OutOfMemory that says so."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise _of_batch(trainer, batch, where) from error


def of_optimizer(trainer: PackTrainer) -> OutOfMemory:
    """Where no micro-batch was being computed."""
    return OutOfMemory(
        "out of memory outside of the micro-batches, most likely for the states of the optimizer",
        where=f"update {trainer.state.global_step}",
        fix="train an adapter (lora:), shard the states over ranks (launch/), or choose another training.optim",
    )


def _of_batch(trainer: PackTrainer, batch: Mapping[str, Any], where: str) -> OutOfMemory:
    if "cu_seq_lens_q" in batch:
        lengths, layout = batch["cu_seq_lens_q"].diff(), ""
    else:
        lengths, layout = batch["attention_mask"].sum(dim=1), " with padding"
    labels, capacity = batch["labels"], trainer.plan.scope.max_tokens
    documents = len(lengths)
    what = (
        f"out of memory with {labels.numel():,} tokens{layout} in {documents:,} document{'s' if documents > 1 else ''}, "
        f"the longest of {int(lengths.max()):,}, {int((labels != -100).sum()):,} supervised"
    )
    knob = f"lower batching.max_tokens (it is {capacity:,}; the updates stay the same)"
    fixes = [knob if documents > 1 else "lower data.max_length: a document is a micro-batch by itself"]
    if not (trainer.args.gradient_checkpointing or getattr(trainer.args, "activation_checkpointing", False)):
        fixes.append("set training.gradient_checkpointing: true")
    if layout:
        fixes.append("choose a batching.strategy without padding, for example balanced")
    return OutOfMemory(what, where=where, fix=", or ".join(fixes))


class ProbeMemory(TrainerCallback):
    """See the module's docstring.

    Attributes:
        said: what came of it, for people; "" before.
    """

    def __init__(self, trainer: PackTrainer):
        self.trainer, self.said = trainer, ""
        self._again = True

    @classmethod
    def wanted(cls, trainer: PackTrainer, asked: bool | None) -> bool:
        """Whether to try: by default on a device with memory of its own.

        Raises:
            PacktrainError: asked for with DeepSpeed.
        """
        if trainer.is_deepspeed_enabled:
            if asked:
                what, fix = "can't be had with DeepSpeed, which keeps what a backward pass gives", "leave it out"
                fix += "; `packtrain plan RECIPE --memory 80GiB` says what the run needs"
                raise PacktrainError(what, key="batching.probe_memory", value=True, fix=fix)
            return False
        return trainer.args.device.type != "cpu" if asked is None else asked

    def on_train_begin(self, args, state, control, **kwargs):
        self._try("tried before it")
        self._again = not self.trainer.optimizer.state  # a resumed run has them

    def on_step_end(self, args, state, control, **kwargs):
        if self._again:
            self._again = False
            self._try("tried with the optimizer's states")

    def _try(self, when: str) -> None:
        trainer = self.trainer
        step, micro_batch, size = largest_micro_batch(trainer)
        epoch, _ = trainer.plan.locate(step)
        batch = MicroBatches(trainer.train_dataset, trainer.collator).at_epoch(epoch)[micro_batch]
        where = f"update {trainer.state.global_step}, the run's largest micro-batch, {when}"
        with explained(trainer, batch, where):
            forward_and_backward(trainer, batch, times=min(2, trainer.plan.gradient_accumulation_steps))
        peak, of = peak_memory()
        self.said = (
            f"{size.tokens:,} tokens in {len(micro_batch):,} documents, tried: peak {peak / 2**20:,.0f} MiB ({of})"
        )


def forward_and_backward(trainer: PackTrainer, batch: Mapping[str, Any], *, times: int) -> None:
    """As an update computes a micro-batch, without a trace; a second time with the gradients of the first."""
    model, device = trainer.model_wrapped, trainer.args.device
    was_training, buffers = model.training, [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = [] if device.type == "cpu" else [device]
    alone = model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()
    try:
        model.train()
        with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type), alone:
            for _ in range(times):
                inputs = trainer._prepare_inputs(dict(batch))
                with trainer.compute_loss_context_manager():
                    losses = trainer.objective.losses(model, inputs, head=trainer._head)
                losses.weighted_sum().float().backward()
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def largest_micro_batch(trainer: PackTrainer) -> tuple[int, MicroBatch, MicroBatchSize]:
    """The micro-batch of any rank that needs the most memory by the formulas of `plan.py`, and its update.

    All ranks find the same one, so that those of a sharded model gather its layers together. Of a run of more than a
    thousand updates a thousand are looked at.
    """
    args, config = trainer.args, trainer.model.config.get_text_config()
    item = 2 if args.bf16 or args.fp16 else trainer.accelerator.unwrap_model(trainer.model).dtype.itemsize
    checkpointing = bool(args.gradient_checkpointing or getattr(args, "activation_checkpointing", False))
    try:
        activations = activation_formula(config, itemsize=item)
    except (TypeError, AttributeError):  # a config with other names: tokens alone
        activations = None
    masked = trainer.plan.layout == "padded"

    def needs(size: MicroBatchSize) -> int:
        kept = activations.bytes(size.tokens, checkpointing=checkpointing) if activations else size.tokens
        logits = (8 + item) * config.vocab_size * size.supervised if activations else 0
        return kept + logits + masked * size.rows * size.width**2

    supervised = trainer.train_dataset.supervised
    return max(sampled_micro_batches(trainer.plan, supervised), key=lambda found: needs(found[2]))
