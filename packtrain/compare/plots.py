"""The figures of a comparison, each an SVG: those of its report, and the cover for a README.

A figure takes a comparison, and is None where nothing was measured to draw.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogFormatter, MaxNLocator

from packtrain.compare.comparison import PHASES, WAITING, Comparison, Row, window
from packtrain.compare.drawing import COLOURS, LINES, alone, drawing, tick
from packtrain.compare.results import Run
from packtrain.compare.verdict import SAME_CURVE, fastest, headliner, listed, signed

SHORT_NAME, LONGEST_LINE = 16, 40  # characters: of names for which a figure is wide enough, of a line of longer ones
CHARACTER, NAME_LINE = 0.075, 0.3  # inches


def figures(comparison: Comparison) -> list[str]:
    """Draw the figures of the report, in its order."""
    drawn = [
        throughput(comparison),
        *losses(comparison),
        padding(comparison),
        phases(comparison),
        step_times(comparison),
        memory(comparison),
        lengths(comparison),
    ]
    return [svg for svg in drawn if svg]


# Speed, time, memory and lengths


def throughput(comparison: Comparison) -> str | None:
    """Draw real tokens per second as ratios to the reference, with intervals."""
    rows = [row for row in comparison.measured if row.speed is not None]
    if not rows:
        return None
    texts = ["1" if comparison.is_reference(row) else row.speed.text() for row in rows]
    alt = "Real tokens per second relative to " + comparison.reference.name + ": "
    alt += ", ".join(f"{row.name} {row.speed.text()}" for row in rows)
    with drawing("throughput", alt=alt, height=_height(rows)) as drawn:
        ax = drawn.ax
        _bars(ax, rows, [row.speed.estimate for row in rows], [""] * len(rows), comparison)
        ends = drawn_ends(rows)
        for place, row, end, text in zip(_places(rows), rows, ends, texts, strict=True):
            _interval(ax, row, place, end, comparison)
            ax.text(max(ends) * 1.04, place, text, va="center", fontsize=8)
        ax.set_xlim(0, max(ends) * 1.6)
        ax.set_xticks([tick for tick in ax.get_xticks() if tick <= max(ends)])
        ax.axvline(1, color=COLOURS["muted"], linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
        ax.set_title("Speed: real tokens/s")
        arrow = (
            ", arrow: goes on" if any((row.speed.high or 0) > end for row, end in zip(rows, ends, strict=True)) else ""
        )
        ax.set_xlabel(f"times {comparison.reference.name}; line: 95% interval{arrow}")
    return drawn.svg


def _interval(ax: Axes, row: Row, place: int, end: float, comparison: Comparison) -> None:
    """Draw the interval of a speed up to `end`, where there is one; with an arrow where it goes on behind that."""
    if row.speed.low is not None and not comparison.is_reference(row):
        ax.plot([min(row.speed.low, end), end], [place, place], color=COLOURS["muted"], linewidth=1.4)
        if row.speed.high > end:
            ax.plot([end], [place], ">", color=COLOURS["muted"], markersize=4)


def drawn_ends(rows: Sequence[Row]) -> list[float]:
    """Find where the intervals of the speeds end on paper: one without information must not flatten the bars."""
    furthest = 2 * max(row.speed.estimate for row in rows)
    return [min(row.speed.high or row.speed.estimate, furthest) for row in rows]


def padding(comparison: Comparison) -> str | None:
    """Draw the share of the computed tokens that are padding."""
    rows = [row for row in comparison.rows if row.padding_share is not None]
    if not rows:
        return None
    shares = [100 * row.padding_share for row in rows]
    texts = [f"{share:.1f}%" if share >= 0.05 else "0%" for share in shares]
    alt = "Share of computed tokens that are padding: "
    alt += ", ".join(f"{row.name} {text}" for row, text in zip(rows, texts, strict=True))
    with drawing("padding", alt=alt, height=_height(rows)) as drawn:
        ax = drawn.ax
        _bars(ax, rows, shares, texts, comparison)
        ax.set_xlim(0, 125)
        ax.set_xticks([0, 25, 50, 75, 100])
        ax.set_title("Padding: computed for nothing")
        ax.set_xlabel("% of computed tokens")
    return drawn.svg


def phases(comparison: Comparison) -> str | None:
    """Draw where the time of an update goes, in microseconds per real token."""
    rows = [row for row in comparison.measured if row.shares is not None]
    if not rows:
        return None
    waiting = {WAITING: "phase4"} if any(row.waiting is not None for row in rows) else {}
    colours = dict(zip(PHASES, ("phase3", "phase0", "phase1", "phase2"), strict=True)) | waiting | {"other": "phase5"}
    alt = "Microseconds per real token by phase of the update. "
    alt += ", ".join(f"{row.name} {1e6 / row.tokens_per_second:,.1f}" for row in rows)
    with drawing("phases", alt=alt, height=_height(rows) + 0.25) as drawn:
        ax, places = drawn.ax, _places(rows)
        left = np.zeros(len(rows))
        for phase, colour in colours.items():
            parts = [_phase_share(row, phase) * 1e6 / row.tokens_per_second for row in rows]
            ax.barh(places, parts, left=left, color=COLOURS[colour], height=0.62, label=phase)
            left += parts
        _name_rows(ax, rows)
        ax.grid(axis="x")
        ax.set_axisbelow(True)
        ax.set_title("Where the time of an update goes")
        ax.set_xlabel("microseconds per real token")
        drawn.figure.legend(loc="outside lower center", ncols=len(colours), handlelength=1, columnspacing=1)
    return drawn.svg


def _phase_share(row: Row, phase: str) -> float:
    return max(0.0, 1 - sum(row.shares.values())) if phase == "other" else row.shares.get(phase, 0.0)


def step_times(comparison: Comparison) -> str | None:
    """Draw the seconds of single updates: tenth percentile to ninetieth, and the median."""
    rows = [row for row in comparison.measured if row.update_seconds is not None]
    if not rows:
        return None
    alt = "Seconds per update, median and tenth to ninetieth percentile: "
    alt += ", ".join(
        f"{r.name} {r.update_seconds.median:.3g} ({r.update_seconds.p10:.3g}-{r.update_seconds.p90:.3g})" for r in rows
    )
    with drawing("step-times", alt=alt, height=_height(rows)) as drawn:
        ax, places = drawn.ax, _places(rows)
        for place, row in zip(places, rows, strict=True):
            colour, seconds = COLOURS[family(row, comparison)], row.update_seconds
            band: dict[str, Any] = {"linewidth": 5, "alpha": 0.35, "solid_capstyle": "round"}
            ax.plot([seconds.p10, seconds.p90], [place, place], color=colour, **band)
            single = [u.seconds for run in row.timed_runs for u in window(run, comparison.manifest)]
            ax.plot(single, [place] * len(single), "|", color=colour, markersize=5, markeredgewidth=0.8)
            ax.plot([seconds.median], [place], "o", color=colour, markersize=5)
        _name_rows(ax, rows)
        ax.set_ylim(-0.6, len(rows) - 0.4)
        ax.set_xlim(left=0)
        ax.grid(axis="x")
        ax.set_title("Time of single updates")
        ax.set_xlabel("seconds; dot: median, band: p10 to p90")
    return drawn.svg


def memory(comparison: Comparison) -> str | None:
    """Draw peak memory, split into what was there before the first update and what training took."""
    rows = [row for row in comparison.rows if row.memory is not None and row.memory_before is not None]
    if not rows:
        return None
    unit, name = (2**30, "GiB") if max(row.memory for row in rows) >= 4 * 2**30 else (2**20, "MiB")
    peaks, before = [row.memory / unit for row in rows], [row.memory_before / unit for row in rows]
    texts = [f"{peak:,.1f}" if unit == 2**30 else f"{peak:,.0f}" for peak in peaks]
    alt = f"Peak memory in {name}: " + ", ".join(f"{row.name} {text}" for row, text in zip(rows, texts, strict=True))
    with drawing("memory", alt=alt, height=_height(rows)) as drawn:
        ax = drawn.ax
        _bars(ax, rows, peaks, texts, comparison)
        ax.barh(_places(rows), before, color=COLOURS["card"], alpha=0.6, height=0.62)  # the bar's own hue, lighter
        ax.set_title(f"Peak memory of the {rows[0].memory_of}")
        ax.set_xlabel(f"{name}; faint: before the first update")
    return drawn.svg


def lengths(comparison: Comparison) -> str | None:
    """Draw a histogram of the examples' lengths, with the capacity and the longest length allowed."""
    data = comparison.manifest.get("data")
    if not data:
        return None
    edges, counts = np.array(data["edges"]), np.array(data["counts"])
    alt = (
        f"Histogram of {data['examples']:,} example lengths: median {data['median']:,.0f}, "
        f"99th percentile {data['p99']:,.0f}, longest {data['max']:,} tokens; max_length {data['max_length']:,}, "
        f"max_tokens {data['max_tokens']:,}"
    )
    with drawing("lengths", alt=alt, height=3.2) as drawn:
        ax = drawn.ax
        ax.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color=COLOURS["phase2"], edgecolor="none")
        ax.set_xscale("log")
        ax.set_yscale("log")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(FuncFormatter(tick))
            axis.set_minor_formatter(LogFormatter())  # where it spans less than a power of ten: 20, not 2 x 10^1
        for key, dash in {"median": ":", "p99": "--", "max_length": "-.", "max_tokens": "-"}.items():
            ax.axvline(data[key], color=COLOURS["ink"], linewidth=1.3, linestyle=dash, label=f"{key} {data[key]:,.0f}")
        ax.set_title("Lengths of the examples")
        ax.set_xlabel("tokens (log)")
        ax.set_ylabel("examples (log)")
        drawn.figure.legend(loc="outside lower left", ncols=2, handlelength=1.8, columnspacing=1)
    return drawn.svg


def _bars(ax: Axes, rows: list[Row], values: list[float], texts: list[str], comparison: Comparison) -> None:
    """Draw a horizontal bar for each row from the top down, with its text."""
    places, right = _places(rows), max(values)
    ax.barh(places, values, color=[COLOURS[family(row, comparison)] for row in rows], height=0.62)
    _name_rows(ax, rows)
    for place, value, text in zip(places, values, texts, strict=True):
        ax.text(value + right * 0.015, place, text, va="center", fontsize=8)
    ax.set_xlim(0, right * 1.28 or 1.0)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.grid(axis="x")
    ax.set_axisbelow(True)


def _name_rows(ax: Axes, rows: list[Row]) -> None:
    names = [fill(row.name, LONGEST_LINE) for row in rows]
    lines = [line for name in names for line in name.splitlines()]
    width, height = ax.figure.get_size_inches()
    width += max(0, max(map(len, lines)) - SHORT_NAME) * CHARACTER
    ax.figure.set_size_inches(width, height + NAME_LINE * (len(lines) - len(names)))
    ax.set_yticks(_places(rows), names)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)


def _places(rows: list[Row]) -> np.ndarray:
    """Return where each row lies on the vertical axis; the first is on top."""
    return np.arange(len(rows))[::-1]


def _height(rows: list[Row]) -> float:
    return 0.75 + 0.24 * len(rows)


def family(row: Row, comparison: Comparison) -> str:
    """Name the colour of a row's kind: the reference, another trainer, ours with the same updates or packed."""
    if comparison.is_reference(row):
        return "ink"
    if row.is_peer:
        return "peer"
    return "ours" if row.keeps_updates else "packed"


# Losses

SMOOTHING = 5  # updates of the running mean of a training loss, at most
PER_MEAN = 10  # updates of a run for each of these: a mean over all of few updates would hide where a loss ends
AXES = (("update", "updates"), ("tokens", "real tokens seen"), ("seconds", "seconds in updates"))
DASHES: dict[str, tuple[Any, Any]] = {  # of a kind of variants, and of those that have the colour of another one
    "ours": ("-", (0, (9, 1.5))),
    "packed": ((0, (1, 1.2)), (0, (3, 1.2, 1, 1.2))),
    "peer": ((0, (4, 2)), (0, (6, 1.5, 1, 1.5))),
}
LEGEND_ROW = 0.155  # inches
FEW_LINES = 8


def losses(comparison: Comparison) -> Iterator[str]:
    """Draw held-out loss, or the running mean of the training loss where it was hardly evaluated; one figure per axis."""
    learning = [row for row in comparison.rows if row.learning_runs]
    rows = [row for row in learning if row.scores_like_reference]
    if not rows:
        return
    on_held_out = all(len(run.held_out) > 2 for row in rows for run in row.learning_runs)
    shortest = min(len(run.updates) for row in rows for run in row.learning_runs)
    mean_of = None if on_held_out else max(1, min(SMOOTHING, shortest // PER_MEAN))
    smoothed = f", mean of {mean_of} updates" if mean_of and mean_of > 1 else ""
    kind = "held-out loss" if on_held_out else f"training loss{smoothed}"
    seeds = max(len(row.learning_runs) for row in rows)
    kind += f"{' and' if smoothed else ', mean'} of {seeds} seeds" if seeds > 1 else ""
    every_line = told_apart(rows, comparison, in_time=True)  # of which the other figures draw some, in the same colours
    styles = dict(_styles([row for row in rows if row.name in every_line], comparison))
    for axis, label in AXES:
        alt = f"{kind.capitalize()} by {label}, at the end: "
        alt += ", ".join(f"{row.name} {mean_curve(row.learning_runs, axis, mean_of)[1][-1]:.4f}" for row in rows)
        lines = told_apart(rows, comparison, in_time=axis == "seconds")
        with drawing(f"loss-by-{axis}", alt=alt, height=2.9 + LEGEND_ROW * ((len(lines) + 1) // 2)) as drawn:
            ax = drawn.ax
            for name in (name for name in styles if name in lines):
                ax.plot(
                    *mean_curve(comparison.row(name).learning_runs, axis, mean_of), label=lines[name], **styles[name]
                )
            ax.set_title(f"{'Held-out' if on_held_out else 'Training'} loss by {label}")
            left_out = [row.name for row in rows if row.name not in lines] if axis == "seconds" else []
            others = [row.name for row in learning if row not in rows]
            absent = {
                f"with the losses of {comparison.reference.name}": left_out,
                "scored on other predictions": others,
            }
            notes = [f"not drawn, {why}: {listed(names)}" for why, names in absent.items() if names]
            ax.set_xlabel("; ".join([label, *notes]))
            ax.set_ylabel(kind)
            ax.xaxis.set_major_formatter(FuncFormatter(tick))
            ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            ax.grid(axis="y")
            drawn.figure.legend(loc="outside lower left", ncols=2, handlelength=2.2, columnspacing=1)
        yield drawn.svg


def mean_curve(runs: Sequence[Run], axis: str, mean_of: int | None) -> tuple[list[float], list[float]]:
    """Return the points of a variant, each the mean over its seeds, as far as every one of them goes."""
    curves = [curve(run, axis, mean_of) for run in runs]
    count = min(len(x) for x, _ in curves)
    x, y = (np.mean([points[part][:count] for points in curves], axis=0) for part in (0, 1))
    return x.tolist(), y.tolist()


def curve(run: Run, axis: str, mean_of: int | None) -> tuple[list[float], list[float]]:
    """Return the points of one run: the training loss, a running mean of `mean_of` updates; None: held-out evaluations."""
    totals = {
        "update": lambda update: 1,
        "tokens": lambda update: update.real_tokens,
        "seconds": lambda update: update.seconds,
    }
    seen = np.concatenate([[0], np.cumsum([totals[axis](update) for update in run.updates])])  # [updates + 1]
    if mean_of is None:
        return [float(seen[point.update]) for point in run.held_out], [point.loss for point in run.held_out]
    values = np.array([update.loss for update in run.updates])
    means = [float(values[max(0, end - mean_of) : end].mean()) for end in range(1, len(values) + 1)]
    return seen[1:].tolist(), means


def told_apart(rows: Sequence[Row], comparison: Comparison, *, in_time: bool) -> dict[str, str]:
    """Choose the variants whose losses are drawn: of those that have the reference's own losses one line stands for all.

    Args:
        in_time: whether the losses are drawn over seconds, in which the same losses come sooner; then all of a few are
            drawn, and of many the reference, other trainers, and the variants that the verdict speaks of.

    Returns:
        The name of each variant that is drawn -> its label.
    """
    reference, subject = comparison.reference, headliner(comparison)
    same = [row for row in rows if not comparison.is_reference(row) and _has_the_losses(row)]
    if all(not comparison.is_reference(row) for row in rows):  # it has not run: every line for itself
        return {row.name: row.name for row in rows}
    few = len(rows) <= FEW_LINES
    alone = [row for row in same if few or row is subject or row.is_peer or comparison.is_own(row)] if in_time else []
    drawn = [row for row in rows if row not in same or row in alone]
    labels = {row.name: row.name for row in drawn}
    if len(same) == 1 and not in_time:
        labels[reference.name] = f"{reference.name} and {same[0].name}"
    elif same and not in_time:
        labels[reference.name] = f"{reference.name} and {len(same)} with its losses"
    return labels


def _has_the_losses(row: Row) -> bool:
    """Whether every training loss is the reference's."""
    return row.loss_difference is not None and row.loss_difference <= SAME_CURVE


def _styles(rows: Sequence[Row], comparison: Comparison) -> Iterator[tuple[str, dict[str, Any]]]:
    """Style the lines, by name: the reference as a broad band; a dash for each kind, whose first has its own colour."""
    first, others = {"ours": "line0", "packed": "line1", "peer": "line7"}, itertools.cycle(LINES[2:7])
    used: set[tuple[str, str]] = set()
    for row in sorted(rows, key=comparison.is_reference, reverse=True):
        kind = family(row, comparison)
        if comparison.is_reference(row):
            yield row.name, {"color": COLOURS["ink"], "alpha": 0.2, "linewidth": 6, "solid_capstyle": "round"}
            continue
        hue = first.pop(kind, None) or next(others)
        yield row.name, {"color": COLOURS[hue], "linewidth": 1.4, "linestyle": DASHES[kind][(kind, hue) in used]}
        used.add((kind, hue))


# The cover

WIDTH = 7.6  # inches


def cover(comparison: Comparison, style: str) -> str | None:
    """Draw how fast each variant is and what it does to the loss; None where there is no speed to show.

    The SVG stands alone, on its own ground and in light colours:
    results/compare_long_tail/speed.svg

    Args:
        style: the report's stylesheet, which begins with its colours.
    """
    rows = shown_rows(comparison)
    if not rows:
        return None
    reference, subject = comparison.reference.name, headliner(comparison)
    losses = [loss_of(row, comparison) for row in rows]
    alt = f"Real tokens per second relative to {reference}, and the loss: "
    alt += "; ".join(f"{row.name} {row.speed.text()}, {text}" for row, text in zip(rows, losses, strict=True))
    with drawing("cover", alt=alt, height=1.25 + 0.27 * len(rows), width=WIDTH) as drawn:
        ax, places = drawn.ax, _places(rows)
        ends = drawn_ends(rows)
        right = max(ends)
        packed = [row for row in rows if family(row, comparison) == "packed"]
        every = [row for row in comparison.measured if row.speed is not None and family(row, comparison) == "packed"]
        some = f", {'the fastest' if len(packed) == 1 else len(packed)} of {len(every)}"
        epoch = "packed over the whole epoch" + (some if len(every) > len(packed) else "")
        kinds = {
            "ours": comparison.same_updates,
            "packed": epoch if all(map(comparison.packs_epoch, packed)) else "other updates",
            "peer": "other trainers",
        }
        for kind, label in kinds.items():
            if any(family(row, comparison) == kind for row in rows):
                ax.barh([places[0]], [0], color=COLOURS[kind], label=label)  # for the legend
        for row, place, end, loss in zip(rows, places, ends, losses, strict=True):
            weight = "bold" if row is subject else "normal"
            ax.barh(place, row.speed.estimate, color=COLOURS[family(row, comparison)], height=0.66)
            _interval(ax, row, place, end, comparison)
            ax.text(1.04 * right, place, f"{row.speed.estimate:.2f}x", va="center", weight=weight)
            ax.text(1.22 * right, place, loss, va="center", weight=weight, color=_colour(row))
        _name_rows(ax, rows)
        for label, row in zip(ax.get_yticklabels(), rows, strict=True):
            label.set(weight="bold" if row is subject else "normal", color=COLOURS["ink"])
        ax.plot([1, 1], [-0.5, places[0] + 0.5], color=COLOURS["muted"], linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
        ax.set(xlim=(0, 1.78 * right), ylim=(-0.6, len(rows) + 0.1), xticks=[])
        ax.spines["bottom"].set_visible(False)
        for x, heading in ((0, f"real tokens/s, times {reference}"), (1.22 * right, f"loss, next to {reference}")):
            ax.text(x, len(rows) - 0.3, heading, color=COLOURS["muted"], va="center")
        if any(family(row, comparison) != "ink" for row in rows):
            drawn.figure.legend(loc="outside lower left", ncols=3, handlelength=1, columnspacing=1.5)
    return alone(drawn.svg, style)


def shown_rows(comparison: Comparison) -> list[Row]:
    """Choose the rows with a speed; of those packed over the epoch only the fastest and the recipe's own."""
    rows = [row for row in comparison.measured if row.speed is not None]
    packed = [row for row in rows if family(row, comparison) == "packed" and comparison.packs_epoch(row)]
    return [row for row in rows if row not in packed or row is fastest(packed) or comparison.is_own(row)]


def loss_of(row: Row, comparison: Comparison) -> str:
    """Write `the same in all 12 updates`, or how far the held-out loss is away; empty where neither was measured."""
    if comparison.is_reference(row):
        return ""
    if _has_the_losses(row):
        return f"the same in all {len(row.learning_runs[0].updates):,} updates"
    if row.held_out_ratio is None or row.ends_with_reference is None:
        return ""
    after = {"examples": "same examples", "updates": "as many updates"}[row.ends_with_reference]
    return f"{signed(row.held_out_ratio.estimate - 1)} held-out, {after}"


def _colour(row: Row) -> str:
    return COLOURS["accent" if _has_the_losses(row) else "muted"]
