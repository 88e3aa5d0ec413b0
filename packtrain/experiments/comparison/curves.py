"""Loss curves of a report: by update, by tokens seen, and by seconds, as inline SVG."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator

from packtrain.experiments.comparison.plots import family, short
from packtrain.experiments.comparison.results import Run
from packtrain.experiments.comparison.summary import Row, Summary
from packtrain.experiments.comparison.theme import COLOURS, LINES, drawing

SMOOTHING = 5  # updates of the running mean of a training loss
AXES = (("update", "updates"), ("tokens", "real tokens seen"), ("seconds", "seconds in updates"))
DASHES: dict[str, Any] = {"ours": "-", "packed": (0, (1, 1.2)), "peer": (0, (4, 2)), "ink": "-"}
LEGEND_ROW = 0.155  # inches


def losses(summary: Summary) -> Iterator[str]:
    """Held-out loss, or the running mean of the training loss where it was hardly evaluated; one figure per axis."""
    rows = [row for row in summary.rows if row.learning_runs]
    if not rows:
        return
    on_held_out = all(len(row.learning_runs[0].held_out) > 2 for row in rows)
    kind = "held-out loss" if on_held_out else f"training loss, mean of {SMOOTHING} updates"
    for axis, label in AXES:
        alt = f"{kind.capitalize()} by {label}, at the end: "
        alt += ", ".join(f"{row.name} {curve(row.learning_runs[0], axis, on_held_out)[1][-1]:.4f}" for row in rows)
        with drawing(f"loss-by-{axis}", alt=alt, height=2.9 + LEGEND_ROW * ((len(rows) + 1) // 2)) as figure:
            ax = figure.axes[0]
            for row, style in _styles(rows, summary):
                ax.plot(*curve(row.learning_runs[0], axis, on_held_out), label=row.name, **style)
            ax.set_title(f"{'Held-out' if on_held_out else 'Training'} loss by {label}")
            ax.set_xlabel(label)
            ax.set_ylabel(kind)
            ax.xaxis.set_major_formatter(FuncFormatter(short))
            ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            ax.grid(axis="y")
            figure.figure.legend(loc="outside lower left", ncols=2, handlelength=2.2, columnspacing=1)
        yield figure.svg


def curve(run: Run, axis: str, on_held_out: bool) -> tuple[list[float], list[float]]:
    """Points of one run; held-out evaluations, or the running mean of the training loss."""
    totals = {
        "update": lambda update: 1,
        "tokens": lambda update: update.real_tokens,
        "seconds": lambda update: update.seconds,
    }
    seen = np.concatenate([[0], np.cumsum([totals[axis](update) for update in run.updates])])  # [updates + 1]
    if on_held_out:
        return [float(seen[point.update]) for point in run.held_out], [point.loss for point in run.held_out]
    values = np.array([update.loss for update in run.updates])
    means = [float(values[max(0, end - SMOOTHING) : end].mean()) for end in range(1, len(values) + 1)]
    return seen[1:].tolist(), means


def _styles(rows: list[Row], summary: Summary) -> Iterator[tuple[Row, dict[str, Any]]]:
    """The reference as a broad band below; a dash for each kind of variant, and hues that differ within a kind."""
    reference = summary.manifest["reference"]
    used = dict.fromkeys(DASHES, 0)
    for row in sorted(rows, key=lambda row: row.name != reference):
        if row.name == reference:
            yield row, {"color": COLOURS["filler"], "linewidth": 6, "solid_capstyle": "round"}
            continue
        kind = family(row, summary)
        hue = LINES[used[kind] % len(LINES)]
        used[kind] += 1
        yield row, {"color": COLOURS[hue], "linewidth": 1.4, "linestyle": DASHES[kind]}
