"""`packtrain plan`: print a histogram of lengths and a table of strategies, for a recipe or a lengths file alone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from packtrain.cli.memory_table import AskedMemory, show_memory
from packtrain.cli.output import NARROWEST_NAME, keep_whole
from packtrain.data.report import DataReport
from packtrain.errors import PlanError
from packtrain.modeling.cost import find_cost
from packtrain.objectives.task import find_training_examples, load_task, plan_recipe
from packtrain.packing.lengths import histogram, load_lengths
from packtrain.packing.plan import Plan, make_plan
from packtrain.packing.recommend import recommend as choose
from packtrain.packing.report import SAMPLED_STEPS, PhaseReport, PlanReport, describe, describe_phases
from packtrain.packing.strategies import STRATEGIES, resolve_strategy
from packtrain.packing.streamed_plan import always_enough_for
from packtrain.recipe.recipe import Recipe

PERCENTILES = (0, 10, 50, 90, 99, 100)
BARS = 14  # at most, in the histogram
BAR_WIDTH = 40
REFERENCE = "pad_longest"  # what most trainers do


def show_plan(
    recipe: Recipe,
    console: Console,
    *,
    every: bool = False,
    recommend: bool = False,
    world_size: int = 1,
    lengths_file: Path | None = None,
    asked: AskedMemory | None = None,
) -> None:
    """Prints the lengths of the recipe's examples and what its strategy, or every strategy, does with them.

    Args:
        asked: the memory of one device, to print an estimate of what a run needs.

    Raises:
        PacktrainError: bad data, or the recipe's own strategy cannot take them.
    """
    lengths, supervised, report, lengths_in = _lengths(recipe, console, lengths_file)
    if report is not None:
        console.print("\n".join(report.lines()), soft_wrap=True, highlight=False, markup=False)
    console.print(length_histogram(lengths, unicode=console.encoding.startswith("utf")))

    own = recipe.batching.strategy
    names = dict.fromkeys([*STRATEGIES, own] if every else [own, REFERENCE])
    rows: list[tuple[str, PlanReport | PlanError]] = []
    plans: dict[str, Plan] = {}
    for name in names:
        try:
            plan = plans[name] = _plan(recipe, name, lengths_in(resolve_strategy(name).layout), world_size)
            rows.append((name, describe(plan, sampled_steps=SAMPLED_STEPS // 4 if every else SAMPLED_STEPS)))
        except PlanError as error:
            if name == own:
                raise
            rows.append((name, error))
    lost = report.tokens_lost if report is not None else 0
    console.print(strategy_table(rows, own=own, world_size=world_size, data_lost=lost), crop=False)
    if phases := describe_phases(plans[own]):
        console.print(phase_table(phases), crop=False)
    if recommend:
        for line in choose(
            recipe.batching,
            recipe.schedule,
            lengths,
            max_length=recipe.data.max_length,
            equal_lengths=recipe.objective.equal_lengths,
            world_size=world_size,
            cost=find_cost(recipe.model),
        ).lines():
            console.print(line, soft_wrap=True, highlight=False)
    if asked is not None:
        show_memory(recipe, plans, supervised, console, memory=asked.size, engine=asked.engine)


def show_lengths(file: Path, console: Console, *, strategy: str, max_tokens: int, every: bool, world_size: int) -> None:
    """Prints what `show_plan` prints, for one epoch of a lengths file and no recipe.

    Raises:
        PlanError: a file or capacity from which nothing can be planned.
    """
    with console.status(f"reading {file}"):
        lengths = load_lengths(file)
        counts = histogram(lengths)
    console.print(counts_histogram(counts, unicode=console.encoding.startswith("utf")))
    rows: list[tuple[str, PlanReport | PlanError]] = []
    for name in dict.fromkeys([*STRATEGIES, strategy] if every else [strategy, REFERENCE]):
        with console.status(f"planning {len(lengths):,} examples with {name}"):
            try:
                plan = make_plan(lengths, strategy=name, max_tokens=max_tokens, world_size=world_size)
                rows.append((name, describe(plan)))
            except PlanError as error:
                if name == strategy:
                    raise
                rows.append((name, error))
    console.print(strategy_table(rows, own=strategy, world_size=world_size), crop=False)


def _lengths(
    recipe: Recipe, console: Console, file: Path | None
) -> tuple[np.ndarray, np.ndarray, DataReport | None, Callable[[str], np.ndarray]]:
    """Returns lengths, supervised tokens (all, if only lengths are known), the report of the data, and what gives the
    lengths in a layout, which differ where an example is several documents."""
    if file is not None:
        lengths = load_lengths(file)
        return lengths, lengths, None, lambda layout: lengths
    examples, why = find_training_examples(recipe)
    if examples is None:
        console.print(f"tokenising: {why}", style="dim", soft_wrap=True, highlight=False)
        examples = load_task(recipe).train
    return examples.lengths, examples.supervised, examples.report, examples.lengths_in


def _plan(recipe: Recipe, strategy: str, lengths: np.ndarray, world_size: int) -> Plan:
    """Plans the recipe with another strategy; `tokens_per_step`, `shapes` and `schedule` are kept where they have a
    meaning."""
    changed: dict[str, str | None] = {"strategy": strategy}
    rule, schedule = resolve_strategy(strategy), {}
    if recipe.data.streaming:
        if rule.scope == "epoch":
            raise PlanError(f"{strategy!r} packs the whole epoch, and streamed rows are never all there")
        if recipe.schedule.gradient_accumulation_steps == "auto":
            schedule = {
                "gradient_accumulation_steps": always_enough_for(recipe.batching, recipe.data.max_length, world_size)
            }
    if strategy != recipe.batching.strategy and rule.scope == "step":
        changed["tokens_per_step"] = None
    if strategy != recipe.batching.strategy and rule.scope == "epoch":
        changed["schedule"] = None
    if strategy != recipe.batching.strategy and rule.layout != "flat":
        changed["shapes"] = None
    batching, training = recipe.batching.model_copy(update=changed), dict(recipe.training) | schedule
    other = recipe.model_copy(update={"batching": batching, "training": training})
    return plan_recipe(other, lengths, world_size=world_size, cost=find_cost(recipe.model))


# -------------------------------------------------------------------------------------------------- the histogram


def length_histogram(lengths: np.ndarray, *, unicode: bool = True) -> RenderableType:
    """Draws `counts_histogram` for lengths, int `[n]`."""
    return counts_histogram(histogram(lengths), unicode=unicode)


def counts_histogram(counts: np.ndarray, *, unicode: bool = True) -> RenderableType:
    """Draws bars over lengths (each range sqrt(2) or 2 times as wide as the one before), percentiles and totals.

    Args:
        counts: int64 `[longest + 1]`, examples of each length.
        unicode: whether the terminal has block characters.
    """
    total, tokens = int(counts.sum()), int((counts * np.arange(len(counts))).sum())
    if not total:
        return Text("no examples")
    cumulative = np.cumsum(counts)
    ranks = [max(1, int(np.ceil(total * percentile / 100))) for percentile in PERCENTILES]
    quantiles = np.searchsorted(cumulative, ranks).tolist()  # the smallest length that many examples don't exceed

    bars = Table.grid(padding=(0, 1))
    bars.add_column(justify="right")
    bars.add_column(width=BAR_WIDTH)
    bars.add_column(justify="right")
    bars.add_column(justify="right")
    edges = _edges(quantiles[0], quantiles[-1])
    inside = [int(counts[low:high].sum()) for low, high in pairwise(edges)]
    for (low, high), count in zip(pairwise(edges), inside, strict=True):
        bar = ("█" if unicode else "#") * round(BAR_WIDTH * count / max(inside))
        label = f"{low:,}" if high == low + 1 else f"{low:,}-{high - 1:,}"
        bars.add_row(label, Text(bar, "cyan"), f"{count:,}", f"{count / total:.1%}")

    names = [{0: "shortest", 50: "median", 100: "longest"}.get(p, f"{p}%") for p in PERCENTILES]
    percentiles = "   ".join(f"{name} {value:,}" for name, value in zip(names, quantiles, strict=True))
    head = f"\n{total:,} examples, {tokens:,} tokens, mean {tokens / total:,.1f}"
    return Group(Text(head, "bold"), bars, Text(percentiles + "\n"))


def _edges(shortest: int, longest: int) -> list[int]:
    """Returns range bounds from `shortest` to above `longest`, growing by a constant factor.

    >>> _edges(5, 100)
    [5, 6, 8, 11, 16, 23, 32, 45, 64, 91, 101]
    """
    for factor in (2**0.5, 2.0, 4.0):
        grid = [round(factor**power) for power in range(1, 64) if factor**power < 2**40]
        inner = sorted({edge for edge in grid if shortest < edge <= longest})
        if len(inner) < BARS:
            break
    return [shortest, *inner, longest + 1]


# ------------------------------------------------------------------------------------------------------ the table


def strategy_table(
    rows: list[tuple[str, PlanReport | PlanError]], *, own: str, world_size: int = 1, data_lost: int = 0
) -> RenderableType:
    """Builds a table with a row per strategy, the recipe's own in bold; strategies that change the updates are marked.

    Args:
        rows: name and report, or why the strategy cannot take these lengths.
        data_lost: tokens that `overflow` took from the data, whatever the strategy.
    """
    title = f"Strategies on {world_size} device{'s' if world_size > 1 else ''}"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=False)
    table.padding, table.pad_edge = (0, 0, 0, 1), False
    table.add_column("\nstrategy", overflow="fold", min_width=NARROWEST_NAME)
    for column in ("\nupdates", "micro-\nbatches", "examples per update\nmin   mean   max"):
        table.add_column(column, justify="right", no_wrap=True)
    last = ["pad-\nding", "largest\nbatch", "tokens\nlost"]
    for column in last if world_size == 1 else [*last, "\nABR"]:
        table.add_column(column, justify="right", no_wrap=True)

    notes, packed = {}, {}
    for name, report in rows:
        style = "bold" if name == own else None
        if isinstance(report, PlanError):
            table.add_row(name, style=style)
            notes[f"{name} cannot be used: {report.what}"] = None
            continue
        changed = resolve_strategy(name).scope == "epoch"
        if changed:
            notes["* packs the whole epoch: updates see other examples than with plain padding"] = None
        if report.examples_split:
            notes[f"{name} splits {report.examples_split:,} example{'' if report.examples_split == 1 else 's'}"] = None
        if report.sampled_updates < report.updates:
            notes[
                f"the columns from `examples per update` on are from {report.sampled_updates:,} updates, evenly spaced"
            ] = None
        if report.bound:
            packed.setdefault(_how_few(report.packs, report.bound), []).append(name)
        for note in report.notes:
            notes[f"{name}: {note}"] = None
        low, mean, high = report.examples_per_update
        table.add_row(
            name + (" *" if changed else ""),
            f"{report.updates:,}",
            f"{report.micro_batches:,}",
            f"{low:,} {mean:6,.1f} {high:5,}",
            f"{report.padding_share:.1%}",
            f"{report.largest_micro_batch:,}",
            f"{report.tokens_dropped + data_lost:,}",
            *([] if world_size == 1 else [f"{report.attention_imbalance:.2f}"]),
            style=style,
        )
    notes |= {f"{', '.join(names)}: {few}": None for few, names in packed.items()}
    if world_size > 1:
        what = "attention balance ratio (arXiv:2503.07680, eq. 2), the share of attention that devices idle for the busiest"
        notes[f"ABR: {what}; 0 is even. The communication ratio (eq. 3) is 0: no document is spread over devices"] = (
            None
        )
    return Group(Text(), keep_whole(table), Text("\n".join(["", *notes]), "dim"))


# ----------------------------------------------------------------------------------------------------- the phases


def phase_table(phases: list[PhaseReport]) -> RenderableType:
    """Builds a table with a row per phase of the first epoch."""
    table = Table(title="Phases of the first epoch", title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.show_edge, table.padding, table.pad_edge = False, (0, 0, 0, 2), False
    for column in (
        "until",
        "longest\nexample",
        "examples",
        "examples\nper update",
        "tokens per update\nmin    mean    max",
    ):
        table.add_column(column, justify="right", no_wrap=True, vertical="bottom")
    table.add_column("updates", justify="right", no_wrap=True)
    for phase in phases:
        low, mean, high = phase.tokens_per_update
        table.add_row(
            f"{phase.until:.1%}",
            f"{phase.longest:,}",
            f"{phase.examples:,}",
            f"{phase.examples_per_update:,}",
            f"{low:,} {mean:7,.0f} {high:6,}",
            f"{phase.updates:,}",
        )
    note = "every example of the epoch is seen once and whole; the last update of a phase may have fewer examples"
    return Group(Text(), keep_whole(table), Text(f"\n{note}", "dim"))


def _how_few(packs: int, bound: int) -> str:
    """Compares a number of packs with the fewest that are proved to be needed.

    >>> _how_few(5, 5)
    '5 packs, the fewest possible'
    >>> _how_few(1, 1)
    '1 pack, the fewest possible'
    >>> _how_few(200_001, 200_000)
    '200,001 packs, proved to be less than 0.01% above the fewest possible'
    """
    if packs == bound:
        return f"{packs:,} pack{'' if packs == 1 else 's'}, the fewest possible"
    gap = packs / bound - 1
    most = f"at most {gap:.2%}" if gap >= 1e-4 else "less than 0.01%"
    return f"{packs:,} packs, proved to be {most} above the fewest possible"
