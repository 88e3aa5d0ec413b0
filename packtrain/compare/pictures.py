"""Pictures of the first update of every variant: the documents of its micro-batches, and how a plan deals them to ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.ticker import FuncFormatter, MaxNLocator

from packtrain.compare.comparison import Comparison
from packtrain.compare.drawing import BLOCKS, COLOURS, drawing, tick
from packtrain.compare.results import PICTURED_RANKS, slug

MOST_ROWS = 48  # of one micro-batch
MOST_MICRO_BATCHES = 4
FLAT_ROW = 2.4  # height of a row with several documents; that of one with a single document is 1
GAP = 1.2  # between micro-batches

Layout = Sequence[Mapping[str, Any]]


def packing_pictures(comparison: Comparison) -> Iterator[str]:
    """Draw the first update of every variant of which it is known: its micro-batches as they went through the model."""
    for row in comparison.rows:
        layout = next((run.end.layout for run in (*row.learning_runs, *row.timed_runs) if run.end.layout), None)
        if layout:
            real, computed = _tokens(layout)
            alt = f"{row.name}, first update: {len(layout)} micro-batches, "
            alt += f"{real:,} real of {computed:,} computed tokens"
            name, title = f"first-update-of-{slug(row.name)}", f"{row.name}: first update"
            label = "tokens of a row; a block is a document, grey is padding"
            yield picture(layout, title=title, name=name, alt=alt, label=label)


def rank_pictures(comparison: Comparison) -> Iterator[str]:
    """Draw the first update of every variant that was planned over several ranks; not one of fewer packs than ranks."""
    for row in comparison.rows:
        layout = next((run.end.over_ranks for run in row.learning_runs if run.end.over_ranks), None)
        if layout and sum(any(lengths) for batch in layout for lengths in batch["rows"]) >= PICTURED_RANKS:
            real, awaited = _tokens(layout)
            waiting = f"{1 - real / awaited:.0%}"
            alt = f"{row.name}, first update on {PICTURED_RANKS} ranks: {len(layout)} micro-steps, "
            alt += f"{waiting} of the tokens' time spent waiting, computed by the plan"
            name = f"plan-on-{PICTURED_RANKS}-ranks-of-{slug(row.name)}"
            title = f"{row.name} dealt to {PICTURED_RANKS} ranks: {waiting} waiting"
            ran = f"{comparison.ranks} rank{'' if comparison.ranks == 1 else 's'}"
            label = f"tokens of each of {PICTURED_RANKS} ranks; computed by the plan, not measured (it ran on {ran})"
            yield picture(layout, title=title, name=name, alt=alt, label=label, group="micro-step")


def _tokens(layout: Layout) -> tuple[int, int]:
    """Count the tokens of documents, and of the boxes they lie in."""
    real = sum(sum(map(sum, batch["rows"])) for batch in layout)
    return real, sum(batch["width"] * len(batch["rows"]) for batch in layout)


def picture(layout: Layout, *, title: str, name: str, alt: str, label: str, group: str = "micro-batch") -> str:
    """Draw the first micro-batches of an update: documents as coloured blocks, padding as the grey rest of a row.

    Args:
        layout: for each micro-batch `width` (tokens of a row) and `rows` (lengths of the documents of each).
        title, name, alt: of the figure.
        label: of the horizontal axis.
        group: what the rows of one item of the layout are.
    """
    shown = layout[:MOST_MICRO_BATCHES]
    plural = "micro-batches" if group == "micro-batch" else f"{group}s"
    more = f" (first {len(shown)} of {len(layout)} {plural})" if len(layout) > len(shown) else ""
    heights = [_thickness(batch) * min(len(batch["rows"]), MOST_ROWS) for batch in shown]
    with drawing(name, alt=alt, height=0.7 + 0.075 * (sum(heights) + GAP * len(shown))) as drawn:
        ax, top, documents, middles = drawn.ax, 0.0, 0, []
        for batch in shown:
            thickness = _thickness(batch)
            middles.append(top + thickness * min(len(batch["rows"]), MOST_ROWS) / 2)
            for lengths in batch["rows"][:MOST_ROWS]:
                box: dict[str, Any] = {"height": 0.86 * thickness, "align": "edge"}
                ax.barh(top, batch["width"], color=COLOURS["padding"], **box)
                left = 0
                for length in lengths:
                    ax.barh(top, length, left=left, color=COLOURS[BLOCKS[documents % len(BLOCKS)]], **box)
                    left, documents = left + length, documents + 1
                top += thickness
            top += GAP
        ax.invert_yaxis()
        ax.set_yticks(middles, [f"{group} {number}" for number in range(1, len(shown) + 1)], fontsize=7)
        ax.tick_params(axis="y", length=0)
        ax.set_xlabel(label, fontsize=8)
        ax.spines["left"].set_visible(False)
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.xaxis.set_major_formatter(FuncFormatter(tick))
        ax.set_title(title + more, fontsize=9)
    return drawn.svg


def _thickness(batch: Mapping[str, Any]) -> float:
    return FLAT_ROW if any(len(lengths) > 1 for lengths in batch["rows"]) else 1.0
