"""Measures the bytes of model states per rank that DeepSpeed allocates, next to the formulas of the memory plan.

    torchrun --nproc_per_node 2 results/zero/measure_bytes.py bytes-2.json    # started by run.py

Trains a tiny Llama for two updates of two micro-batches on every engine, in float32 and in bfloat16, in full and with
LoRA, and counts this rank's tensors (`state_bytes`) at three moments of the second update: between the
micro-batches, after the last backward pass, and inside the optimizer's step.
"""

from __future__ import annotations

import gc
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from packtrain.training.memory.plan import parameters_of
from packtrain.training.memory.state_bytes import state_bytes
from packtrain.training.memory.states import DEVICE, EXACT, HOST, model_states
from packtrain.training.ranks import settle

ENGINES = ("ddp", "zero1", "zero2", "zero3", "zero3_offload_cpu")
MODEL = dict(
    model_type="llama", vocab_size=1000, hidden_size=64, intermediate_size=160, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
)  # fmt: skip
LORA = LoraConfig(r=8, target_modules=["q_proj", "down_proj"])
BETWEEN, BACKWARD, STEP = "between micro-batches", "after backward", "in the step"


def measure(engine: str, *, half: bool, lora: bool) -> list[dict[str, Any]]:
    """Measure one engine: for each kind of state, this rank's bytes at the moment a formula is about, and the formula's."""
    ranks = dist.get_world_size()
    model, optimizer, backward, step = _engine(engine, half, lora)
    parameters = parameters_of(model)
    seen: dict[str, dict[str, int]] = {}
    base = optimizer
    while hasattr(base, "optimizer"):
        base = base.optimizer
    ids = torch.arange(32)[None]
    for update in range(2):
        backward(ids, last=False)
        seen[BETWEEN] = state_bytes(model, optimizer)
        backward(ids, last=True)
        seen[BACKWARD] = state_bytes(model, optimizer)
        if update:  # everything the optimizer allocates is there from its first step on
            hook = base.register_step_pre_hook(lambda *_: seen.update({STEP: state_bytes(model, optimizer)}))
        step()
    hook.remove()

    lines = model_states(parameters, engine, ranks, half=half, accumulates=True)
    exact = {line.what: line.bytes for line in lines if line.basis == EXACT and line.where in (DEVICE, HOST)}
    whole = exact.pop("small parameters, kept whole", 0)
    in_step = exact.pop("gradients in float32", 0)
    offloads = "offload" in engine
    exact["parameters"] += whole
    exact["gradients"] += in_step * offloads  # DeepSpeed keeps them in host memory
    what = (engine, ranks, half, lora)
    rows = [_row(*what, kind, BETWEEN, seen[BETWEEN][kind], size) for kind, size in exact.items()]
    if in_step and not offloads:  # ZeRO-3 keeps the buffer of half-precision gradients as well
        kept = exact["gradients"] if engine == "zero3" else 0
        rows.append(_row(*what, "gradients", STEP, seen[STEP]["gradients"], in_step + kept))
    return rows


def _row(
    engine: str, ranks: int, half: bool, lora: bool, kind: str, moment: str, measured: int, formula: int
) -> dict[str, Any]:
    return {
        "engine": engine, "ranks": ranks, "dtype": "bf16" if half else "float32", "trained": "LoRA" if lora else "full",
        "kind": kind, "moment": moment, "measured": measured, "formula": formula,
    }  # fmt: skip


def _engine(engine: str, half: bool, lora: bool) -> tuple[nn.Module, Any, Any, Any]:
    """Start one engine, and return `(model, optimizer, backward(ids, last), step())`."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**MODEL)
    deepspeed_config = _deepspeed_config(engine, half) if engine != "ddp" else None
    if engine.startswith("zero3"):
        import deepspeed

        sharded = deepspeed.zero.Init(config_dict_or_path=deepspeed_config)
    with sharded if engine.startswith("zero3") else nullcontext():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if half else torch.float32)
    if lora:
        model = get_peft_model(model, LORA)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    if deepspeed_config is None:
        wrapped = nn.parallel.DistributedDataParallel(model)

        def backward(ids: torch.Tensor, last: bool) -> None:
            with nullcontext() if last else wrapped.no_sync():
                wrapped(input_ids=ids, labels=ids).loss.backward()

        def step() -> None:
            optimizer.step()
            optimizer.zero_grad()

        return model, optimizer, backward, step

    import deepspeed

    wrapped, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config)

    def backward(ids: torch.Tensor, last: bool) -> None:
        wrapped.set_gradient_accumulation_boundary(is_boundary=last)
        wrapped.backward(wrapped(input_ids=ids, labels=ids).loss)

    return model, optimizer, backward, wrapped.step


def _deepspeed_config(engine: str, half: bool) -> dict[str, Any]:
    hidden = MODEL["hidden_size"]
    zero: dict[str, Any] = {
        "stage": int(engine[4]),
        "reduce_bucket_size": hidden**2,
        "allgather_bucket_size": hidden**2,
        "stage3_prefetch_bucket_size": hidden**2,
        "stage3_param_persistence_threshold": 10 * hidden,
    }
    if engine.endswith("cpu"):
        zero["offload_optimizer"] = zero["offload_param"] = {"device": "cpu", "pin_memory": False}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "zero_optimization": zero,
        "bf16": {"enabled": half},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def main(path: str) -> None:
    """Measure everything on the ranks of this launch, and let rank 0 write the rows as JSON."""
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    rows = []
    for engine in ENGINES:
        for half in (False, True):
            for lora in (False, True):
                if engine == "ddp" and half:  # its formula is of the weights' dtype, whatever autocast does
                    continue
                rows += measure(engine, half=half, lora=lora)
                gc.collect()
                dist.barrier()
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    dist.barrier()
    settle()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
