"""`packtrain plan --memory 80GiB --gpus 8`: what a run needs per rank, line by line, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from rich.console import Console, RenderableType
from rich.table import Table

from packtrain.packing.plan import Plan
from packtrain.recipe import Recipe
from packtrain.training.memory_plan import (
    NOT_COUNTED,
    TIGHT,
    MemoryPlan,
    MicroBatchSize,
    ModelMemory,
    describe_model,
    largest_micro_batch,
    plan_memory,
)
from packtrain.training.memory_states import DEVICE, ENGINES, HOST, NVME

MASKED = ("sdpa", "eager", "flex_attention")  # attention that isolates flat documents by a mask
STYLES = {"fits": "green", "tight": "yellow", "does not fit": "red"}
ALONE = ("ddp", "zero3_offload_cpu", "zero3_offload_nvme")  # on one device sharding has no other effect
NAMES = {"ddp": "DDP", "fsdp2": "FSDP2", "zero3_offload_cpu": "ZeRO-3 CPU", "zero3_offload_nvme": "ZeRO-3 NVMe"}


def show_memory(
    recipe: Recipe, plans: Mapping[str, Plan], supervised: np.ndarray, console: Console, *, memory: int
) -> None:
    """Prints one table of lines and engines for the recipe's strategy, and one of verdicts for every strategy.

    Args:
        plans: strategy -> plan; the recipe's own is among them.
        supervised: supervised tokens of each example, int `[n]`.
        memory: bytes of one device.

    Raises:
        ModelError: the model can't be had, or takes no such adapter.
    """
    own = recipe.batching.strategy
    model = describe_model(recipe)
    sizes = {name: largest_micro_batch(plan, supervised) for name, plan in plans.items()}
    engines = ENGINES if plans[own].world_size > 1 else ALONE
    by_strategy = {
        name: [_plan(recipe, model, plan, sizes[name], engine) for engine in engines] for name, plan in plans.items()
    }
    console.print(line_table(by_strategy[own], own, sizes[own], memory))
    console.print(verdict_table(by_strategy, sizes, own, memory))
    if best := next((plan for plan in by_strategy[own] if plan.verdict(memory) == "fits"), None):
        alone = plans[own].world_size == 1 and best.engine == "ddp"
        console.print(f"the simplest that fits: launch/{'single_gpu' if alone else best.engine}.yaml", highlight=False)
    notes = f"not counted: {'; '.join(NOT_COUNTED)}. Tight: above {TIGHT:.0%} of {_size(memory)}."
    console.print(notes, style="dim", highlight=False)


def _plan(recipe: Recipe, model: ModelMemory, plan: Plan, size: MicroBatchSize, engine: str) -> MemoryPlan:
    attention, training = recipe.model.attn_implementation, recipe.training
    return plan_memory(
        model,
        size,
        engine=engine,
        ranks=plan.world_size,
        half=bool(training.get("bf16") or training.get("fp16")),
        checkpointing=bool(training.get("gradient_checkpointing")),
        masked=plan.layout == "padded" or attention in MASKED,
        eager=attention == "eager",
        accumulates=plan.gradient_accumulation_steps > 1,
    )


def line_table(plans: list[MemoryPlan], strategy: str, size: MicroBatchSize, memory: int) -> RenderableType:
    """Rows are lines, columns engines."""
    title = (
        f"Memory per rank ({plans[0].ranks}), largest micro-batch of {strategy}: "
        f"{size.tokens:,} tokens, {size.supervised:,} supervised"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for plan in plans:
        table.add_column(_name(plan.engine), justify="right")
    by_plan = [{(line.where, line.what): line for line in plan.lines} for plan in plans]
    places = {DEVICE: "", HOST: "host: ", NVME: "NVMe: "}
    for where, prefix in places.items():
        keys = dict.fromkeys(key for lines in by_plan for key in lines if key[0] == where)
        for key in keys:
            bases = {lines[key].basis for lines in by_plan if key in lines}
            moment = ", at the step" if any(key in lines and lines[key].transient for lines in by_plan) else ""
            label = f"{prefix}{key[1]} ({' or '.join(sorted(bases))}{moment})"
            table.add_row(label, *(_size(lines[key].bytes) if key in lines else "-" for lines in by_plan))
        if keys:
            totals = [plan.total(where) for plan in plans]
            table.add_row(f"{prefix}peak", *(_size(total) if total else "-" for total in totals), style="bold")
            table.add_section()
    table.add_row(f"on {_size(memory)}", *(_verdict(plan, memory) for plan in plans))
    return table


def verdict_table(
    by_strategy: Mapping[str, list[MemoryPlan]], sizes: Mapping[str, MicroBatchSize], own: str, memory: int
) -> RenderableType:
    """Rows are strategies, columns engines: the peak on the device, coloured by verdict."""
    table = Table(title=f"Peak per rank by strategy, of {_size(memory)}", title_justify="left")
    table.add_column("strategy")
    table.add_column("largest\nmicro-batch", justify="right")
    table.add_column("supervised", justify="right")
    for plan in by_strategy[own]:
        table.add_column(_name(plan.engine), justify="right")
    for strategy, plans in by_strategy.items():
        peaks = [f"[{STYLES[plan.verdict(memory)]}]{_size(plan.total())}[/]\n{plan.verdict(memory)}" for plan in plans]
        size = sizes[strategy]
        style = "bold" if strategy == own else None
        table.add_row(strategy, f"{size.tokens:,}", f"{size.supervised:,}", *peaks, style=style)
    return table


def _verdict(plan: MemoryPlan, memory: int) -> str:
    verdict = plan.verdict(memory)
    return f"[{STYLES[verdict]}]{verdict}[/]"


def _name(engine: str) -> str:
    return NAMES.get(engine, engine.replace("zero", "ZeRO-"))


def _size(size: int) -> str:
    """Bytes in GiB, or in MiB where that would be 0.0."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:,.1f} MiB"
