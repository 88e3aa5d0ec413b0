"""Packing pictures: the micro-batches of an update as they went through the model, documents as coloured blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.ticker import FuncFormatter, MaxNLocator

from packtrain.experiments.comparison.plots import short
from packtrain.experiments.comparison.results import PICTURED_RANKS
from packtrain.experiments.comparison.summary import Summary
from packtrain.experiments.comparison.theme import BLOCKS, COLOURS, drawing

MOST_ROWS = 48  # of one micro-batch
MOST_MICRO_BATCHES = 4
FLAT_ROW = 2.4  # height of a row with several documents; that of one with a single document is 1
GAP = 1.2  # between micro-batches

Layout = Sequence[Mapping[str, Any]]


def packing_pictures(summary: Summary) -> Iterator[str]:
    """One SVG for every variant whose first update is known."""
    for number, row in enumerate(summary.rows):
        layout = next((run.end.layout for run in (*row.learning_runs, *row.timed_runs) if run.end.layout), None)
        if layout:
            real, computed = _tokens(layout)
            alt = (
                f"{row.name}, first update: {len(layout)} micro-batches, {real:,} real of {computed:,} computed tokens"
            )
            yield picture(layout, title=row.name, name=f"layout-{number}", alt=alt)


def rank_pictures(summary: Summary) -> Iterator[str]:
    """One SVG for every variant whose first update was planned over several ranks."""
    for number, row in enumerate(summary.rows):
        layout = next((run.end.over_ranks for run in row.learning_runs if run.end.over_ranks), None)
        if layout:
            real, awaited = _tokens(layout)
            waiting = f"{1 - real / awaited:.0%}"
            alt = f"{row.name}, first update on {PICTURED_RANKS} ranks: {len(layout)} micro-steps, "
            alt += f"{waiting} of the tokens' time spent waiting"
            yield picture(layout, title=f"{row.name}: {waiting} waiting", name=f"ranks-{number}", alt=alt)


def _tokens(layout: Layout) -> tuple[int, int]:
    """Tokens of documents, and of the boxes they lie in."""
    real = sum(sum(map(sum, batch["rows"])) for batch in layout)
    return real, sum(batch["width"] * len(batch["rows"]) for batch in layout)


def picture(layout: Layout, *, title: str, name: str, alt: str) -> str:
    """The first micro-batches of an update.

    Args:
        layout: for each micro-batch `width` (tokens of a row) and `rows` (lengths of the documents of each).
        title, name, alt: of the figure.
    """
    shown = layout[:MOST_MICRO_BATCHES]
    more = f" (first {len(shown)} of {len(layout)} micro-batches)" if len(layout) > len(shown) else ""
    heights = [_thickness(batch) * min(len(batch["rows"]), MOST_ROWS) for batch in shown]
    with drawing(name, alt=alt, height=0.7 + 0.075 * (sum(heights) + GAP * len(shown))) as figure:
        ax, top, documents = figure.axes[0], 0.0, 0
        for batch in shown:
            thickness = _thickness(batch)
            for lengths in batch["rows"][:MOST_ROWS]:
                box = {"height": 0.86 * thickness, "align": "edge"}
                ax.barh(top, batch["width"], color=COLOURS["filler"], **box)
                left = 0
                for length in lengths:
                    ax.barh(top, length, left=left, color=COLOURS[BLOCKS[documents % len(BLOCKS)]], **box)
                    left, documents = left + length, documents + 1
                top += thickness
            top += GAP
        ax.invert_yaxis()
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.xaxis.set_major_formatter(FuncFormatter(short))
        ax.set_title(title + more, fontsize=9)
    return figure.svg


def _thickness(batch: Mapping[str, Any]) -> float:
    return FLAT_ROW if any(len(lengths) > 1 for lengths in batch["rows"]) else 1.0
