"""What in a trainer contradicts packtrain's layout of its batches, and what of it has no effect there."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import Trainer

from packtrain.errors import PacktrainError
from packtrain.modeling.router_loss import has_router_loss


def refuse_contradictions(trainer: Trainer, scope: str, max_tokens: int | None) -> None:
    """Raises PacktrainError for what cannot be had together with a plan of scope "step" or "epoch"."""
    if not isinstance(trainer, Trainer):
        raise PacktrainError("is not a transformers.Trainer", key="trainer", value=type(trainer).__name__)
    args, data = trainer.args, trainer.train_dataset
    if "get_train_dataloader" in vars(trainer):
        raise PacktrainError("has its batches laid out already", key="trainer", fix="attach once")
    if getattr(args, "packing", False):
        what, fix = "the trainer has packed its examples already", "build it with packing=False"
        raise PacktrainError(what, key="packing", value=True, fix=fix)
    if not hasattr(data, "column_names") or not hasattr(data, "__len__"):
        what, fix = "packtrain needs a tokenised datasets.Dataset of known length", "load it without streaming"
        raise PacktrainError(what, key="train_dataset", value=type(data).__name__, fix=fix)
    if getattr(trainer.data_collator, "mlm", False):
        what, fix = "its collator masks tokens at random, which packtrain's batches don't", "give it mlm=False"
        raise PacktrainError(what, key="data_collator.mlm", value=True, fix=fix)
    if args.dataloader_drop_last:
        raise PacktrainError("packtrain drops no example", key="dataloader_drop_last", value=True, fix="leave it out")
    if args.auto_find_batch_size:
        what, fix = "the plan of all batches is made once", "leave it out; max_tokens bounds a micro-batch"
        raise PacktrainError(what, key="auto_find_batch_size", value=True, fix=fix)
    if args.train_sampling_strategy == "group_by_length":
        what, fix = "packtrain orders examples itself", 'leave it out; attach(strategy="group_by_length") sorts updates'
        raise PacktrainError(what, key="train_sampling_strategy", value="group_by_length", fix=fix)
    if args.n_gpu > 1:
        what, fix = "DataParallel would split a flat batch", "start one process per GPU"
        raise PacktrainError(what, key="n_gpu", value=args.n_gpu, fix=fix)
    shared = trainer.get_tp_size() * trainer.get_cp_size() * trainer.get_sp_size()
    if shared > 1:
        what = "packtrain deals every rank examples of its own, and these ranks share theirs"
        raise PacktrainError(what, key="parallelism_config", value=shared, fix="use data parallelism (DDP, FSDP, ZeRO)")
    if scope == "epoch" and max_tokens is None:
        raise PacktrainError("a strategy that packs the whole epoch needs the size of a pack", key="max_tokens")


def without_effect(trainer: Trainer, layout: str) -> Iterator[str]:
    """What the user has set and training will not follow, or not as before, each in a sentence."""
    args, collator = trainer.args, trainer.data_collator
    if not type(collator).__module__.startswith(("transformers.", "trl.")):
        name = getattr(collator, "__name__", type(collator).__name__)
        yield f"data_collator {name} is asked for evaluation only: training reads input_ids and labels from the dataset"
    if isinstance(getattr(args, "pad_to_multiple_of", None), int):
        yield f"pad_to_multiple_of {args.pad_to_multiple_of} is for evaluation only"
    for name in ("split_batches", "dispatch_batches"):
        if getattr(args.accelerator_config, name, False):
            yield f"accelerator_config.{name} is for evaluation only: the plan deals micro-batches to ranks"
    if args.dataloader_persistent_workers:
        yield "dataloader_persistent_workers is for evaluation only: every epoch starts its workers"
    for name, plain in (("dataloader_multiprocessing_context", (None, "fork")), ("dataloader_in_order", (True,))):
        if args.dataloader_num_workers and getattr(args, name, plain[0]) not in plain:
            yield f"{name} is for evaluation only: training starts its workers as Python does, and keeps their order"
    if layout == "flat" and args.neftune_noise_alpha:
        yield "neftune_noise_alpha scales its noise by the length of a row, which is now that of all its documents"
    if has_router_loss(trainer.accelerator.unwrap_model(trainer.model).config):
        yield "output_router_logits adds a router loss of each micro-batch, which depends on its layout"
    if _averages_micro_batches(trainer):
        yield "its loss is a mean of micro-batches' means, so it depends a little on which examples share one"


def _averages_micro_batches(trainer: Trainer) -> bool:
    """Whether the trainer does without the one denominator for all tokens of an update."""
    args = trainer.args
    micro_batches = args.gradient_accumulation_steps * args.world_size
    counts = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
    across_ranks = args.average_tokens_across_devices or args.world_size == 1
    return micro_batches > 1 and (not counts or not across_ranks or bool(args.label_smoothing_factor))
