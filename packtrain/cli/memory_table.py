"""`packtrain plan --memory 80GiB --gpus 8`: estimate the memory per rank, line by line, and whether it fits.

packtrain plan recipes/sft_lora.yaml --memory 80GiB --gpus 8                   every engine of launch/
packtrain plan recipes/sft_lora.yaml --memory 80GiB --gpus 8 --launch zero3    one of them
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from packtrain.cli.output import NARROWEST_NAME, keep_whole
from packtrain.errors import LaunchError
from packtrain.packing.plan import Plan
from packtrain.recipe.recipe import Recipe
from packtrain.training.launch import engine_of, find_launch_file
from packtrain.training.memory.plan import (
    NOT_COUNTED,
    TIGHT,
    MemoryPlan,
    MicroBatchSize,
    ModelMemory,
    describe_model,
    largest_sizes,
    parse_bytes,
    plan_memory,
)
from packtrain.training.memory.states import DEVICE, ENGINES, ESTIMATED, EXACT, HOST, MEASURED, NVME

MASKED = ("sdpa", "eager", "flex_attention")  # attention that isolates flat documents by a mask
STYLES = {"fits": "green", "tight": "yellow", "does not fit": "red"}
ALONE = ("ddp", "zero3_offload_cpu", "zero3_offload_nvme")  # on one device sharding has no other effect
NAMES = {
    "ddp": "DDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "zero3_offload_cpu": "+CPU",
    "zero3_offload_nvme": "+NVMe", "fsdp2": "FSDP2",
}  # fmt: skip
MARKS = {EXACT: "=", MEASURED: "#", ESTIMATED: "~"}
SHORT = {"fits": "fits", "tight": "tight", "does not fit": "no"}


@dataclass(frozen=True, kw_only=True)
class AskedMemory:
    """The `size` of one device in bytes, and the only `engine` to show, if one was named."""

    size: int
    engine: str | None


def asked_memory(size: str | None, launch: str | None) -> AskedMemory | None:
    """Checks `--memory 80GiB --launch zero3` before anything is read; returns None if no memory was named.

    Raises:
        PacktrainError: not an amount of memory, no launch file of that name, or an engine without formulas.
    """
    if size is None:
        if launch is not None:
            raise LaunchError("needs --memory", key="--launch", value=launch, fix="add for example --memory 80GiB")
        return None
    engine = engine_of(find_launch_file(launch)) if launch is not None else None
    if engine not in (None, *ENGINES):
        fix = f"choose one that starts {', '.join(ENGINES)}"
        raise LaunchError(f"the memory of {engine} cannot be estimated", key="--launch", value=launch, fix=fix)
    return AskedMemory(size=parse_bytes(size), engine=engine)


def show_memory(
    recipe: Recipe,
    plans: Mapping[str, Plan],
    supervised: np.ndarray,
    console: Console,
    *,
    memory: int,
    engine: str | None = None,
) -> None:
    """Prints one table of lines and engines for the recipe's strategy, and one of verdicts for every strategy.

    Args:
        plans: strategy -> plan; the recipe's own is among them.
        supervised: supervised tokens of each example, int `[n]`.
        memory: bytes of one device.
        engine: of `ENGINES`, the only one shown; all that launch/ has by default.

    Raises:
        ModelError: the model can't be loaded, or does not take the adapter.
    """
    own = recipe.batching.strategy
    engines = (engine,) if engine else ENGINES if plans[own].world_size > 1 else ALONE
    model = describe_model(recipe)
    sizes = {name: largest_sizes(plan, supervised) for name, plan in plans.items()}
    checkpoints = any(recipe.training.get(f"{kind}_checkpointing") for kind in ("gradient", "activation"))  # two names

    def of(name: str, checkpointing: bool = checkpoints) -> list[MemoryPlan]:
        return [_plan(recipe, model, plans[name], sizes[name], one, checkpointing) for one in engines]

    by_strategy = {name: of(name) for name in plans}
    console.print(line_table(by_strategy[own], own, sizes[own], memory), crop=False)
    console.print(verdict_table(by_strategy, sizes, own, memory), crop=False)
    if note := explain_logits(model, sizes):
        console.print(note, highlight=False, soft_wrap=True)
    for line in _advice(by_strategy[own], [] if checkpoints else of(own, True), memory):
        console.print(line, highlight=False, soft_wrap=True)
    notes = f"not counted: {'; '.join(NOT_COUNTED)}. Tight: above {TIGHT:.0%} of {_size(memory)}."
    console.print(notes, style="dim", highlight=False, soft_wrap=True)


def _advice(plans: list[MemoryPlan], checkpointed: list[MemoryPlan], memory: int) -> list[str]:
    """Names the simplest engine that fits, or what checkpointing would change if none does."""

    def simplest(of: list[MemoryPlan]) -> str | None:
        fitting = (plan.engine for plan in of if plan.verdict(memory) == "fits")
        found = next(fitting, None)
        return "single_gpu" if found == "ddp" and of[0].ranks == 1 else found

    if found := simplest(plans):
        return [f"the simplest engine that fits: launch/{found}.yaml"] if len(plans) > 1 else []
    if found := simplest(checkpointed):
        return [f"with training.gradient_checkpointing=true it fits: launch/{found}.yaml"]
    return ["nothing fits: use fewer tokens per micro-batch (batching.max_tokens), more devices, or LoRA"]


def explain_logits(model: ModelMemory, sizes: Mapping[str, MicroBatchSize]) -> str:
    """Says why more supervised tokens may take less memory, where logits are whole for one strategy and not for another."""
    from packtrain.objectives.chunks import rows_of_chunk

    rows = rows_of_chunk(model.vocabulary)
    whole = [name for name, size in sizes.items() if size.supervised <= rows]
    if len(whole) in (0, len(sizes)):
        return ""
    return (
        f"logits are made at once for up to {rows:,} supervised tokens of a micro-batch ({', '.join(whole)}), and in "
        "chunks of this many for more, which may take less memory"
    )


def _plan(
    recipe: Recipe, model: ModelMemory, plan: Plan, size: MicroBatchSize, engine: str, checkpointing: bool
) -> MemoryPlan:
    attention, training = recipe.model.attn_implementation, recipe.training
    return plan_memory(
        model,
        size,
        engine=engine,
        ranks=plan.world_size,
        half=bool(training.get("bf16") or training.get("fp16")),
        checkpointing=checkpointing,
        masked=plan.layout == "padded" or attention in MASKED,
        eager=attention == "eager",
        accumulates=plan.gradient_accumulation_steps > 1,
    )


def line_table(plans: list[MemoryPlan], strategy: str, size: MicroBatchSize, memory: int) -> RenderableType:
    """Builds a table with a row per line of the estimate, marked by how it is known, and a column per engine."""
    unit, name = _unit(memory, plans)
    table = _table(
        f"Memory per rank in {name}, {plans[0].ranks} rank{'s' * (plans[0].ranks > 1)}, largest micro-batch of "
        f"{strategy}: {size.tokens:,} tokens, {size.supervised:,} supervised"
    )
    table.add_column("", overflow="fold", min_width=NARROWEST_NAME)
    for plan in plans:
        table.add_column(NAMES[plan.engine], justify="right", no_wrap=True)
    by_plan = [{(line.where, line.what): line for line in plan.lines} for plan in plans]
    for where, prefix in {DEVICE: "", HOST: "host: ", NVME: "NVMe: "}.items():
        keys = dict.fromkeys(key for lines in by_plan for key in lines if key[0] == where)
        for key in keys:
            found = [lines.get(key) for lines in by_plan]
            basis = next(line.basis for line in found if line)
            at_step = ", at step" if any(line and line.transient for line in found) else ""
            cells = (_number(line.bytes / unit) if line else "-" for line in found)
            table.add_row(f"{MARKS[basis]} {prefix}{key[1]}{at_step}", *cells)
        if keys:
            totals = [plan.total(where) for plan in plans]
            cells = (_number(total / unit) if total else "-" for total in totals)
            table.add_row(f"  {prefix}peak", *cells, style="bold", end_section=True)
    table.add_row(f"  on {_size(memory)}", *(_verdict(plan, memory) for plan in plans))
    legend = "   ".join(f"{mark} {basis}" for basis, mark in MARKS.items())
    return Group(Text(), keep_whole(table), Text(f"{legend}   (at step: after activations are freed)\n", "dim"))


def verdict_table(
    by_strategy: Mapping[str, list[MemoryPlan]], sizes: Mapping[str, MicroBatchSize], own: str, memory: int
) -> RenderableType:
    """Builds a table with a row per strategy and a column per engine: the peak, and the verdict if it isn't `fits`."""
    unit, name = _unit(memory, [plan for plans in by_strategy.values() for plan in plans])
    table = _table(f"Peak per rank in {name} by strategy")
    table.add_column("\n\nstrategy", overflow="fold", min_width=NARROWEST_NAME)
    for column in ("largest\nmicro-\nbatch", "of it\nsuper-\nvised"):
        table.add_column(column, justify="right", no_wrap=True)
    for plan in by_strategy[own]:
        table.add_column("\n\n" + NAMES[plan.engine], justify="right", no_wrap=True)
    for strategy, plans in by_strategy.items():
        peaks = []
        for plan in plans:
            peak, verdict = _number(plan.total() / unit), plan.verdict(memory)
            peaks.append(f"[{STYLES[verdict]}]{peak}[/]" + ("" if verdict == "fits" else f"\n{_verdict(plan, memory)}"))
        size = sizes[strategy]
        style = "bold" if strategy == own else None
        table.add_row(strategy, f"{size.tokens:,}", f"{size.supervised:,}", *peaks, style=style)
    return keep_whole(table)


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=False)
    table.padding, table.pad_edge = (0, 0, 0, 0), False
    return table


def _verdict(plan: MemoryPlan, memory: int) -> str:
    verdict = plan.verdict(memory)
    return f"[{STYLES[verdict]}]{SHORT[verdict]}[/]"


def _number(amount: float) -> str:
    return f"{amount:,.1f}" if amount < 99.95 else f"{amount:,.0f}"


def _unit(memory: int, plans: Sequence[MemoryPlan] = ()) -> tuple[int, str]:
    """Returns GiB, or MiB for a small device and for plans that all stay below 1 GiB."""
    small = bool(plans) and all(plan.total(where) < 2**30 for plan in plans for where in (DEVICE, HOST, NVME))
    return (2**20, "MiB") if small or memory < 4 * 2**30 else (2**30, "GiB")


def _size(size: int) -> str:
    unit, name = _unit(size)
    return f"{size / unit:,.1f} {name}"
