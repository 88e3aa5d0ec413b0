"""The figures of a report. Each takes a summary and gives an inline SVG, or None where nothing was measured to draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from packtrain.experiments.comparison.summary import PHASES, Row, Summary, window
from packtrain.experiments.comparison.theme import COLOURS, drawing

BEHIND_TEXT = {"facecolor": COLOURS["card"], "edgecolor": "none", "pad": 0.8}


def family(row: Row, summary: Summary) -> str:
    """Colour role by kind: ours with the same updates, ours packed over the epoch, another trainer, the reference."""
    if row.name == summary.manifest["reference"]:
        return "ink"
    if row.is_peer:
        return "peer"
    return "ours" if row.keeps_updates else "packed"


def _bars(ax: Axes, names: list[str], values: list[float], colours: list[str], texts: list[str]) -> None:
    """Horizontal bars from the top down, each with its number."""
    places = np.arange(len(names))[::-1]
    ax.barh(places, values, color=[COLOURS[colour] for colour in colours], height=0.62)
    ax.set_yticks(places, names)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    right = max(values) if values else 1.0
    for place, value, text in zip(places, values, texts, strict=True):
        ax.text(value + right * 0.015, place, text, va="center", fontsize=8)
    ax.set_xlim(0, right * 1.28 or 1.0)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.grid(axis="x")
    ax.set_axisbelow(True)


def _height(rows: int) -> float:
    return 0.75 + 0.24 * rows


def throughput(summary: Summary) -> str | None:
    """Real tokens per second, as a ratio to the reference where there is one, with intervals."""
    rows = [row for row in summary.measured if row.speed is not None]
    if not rows:
        return None
    texts = [f"{row.speed.estimate:.2f}x" for row in rows]
    alt = "Real tokens per second relative to " + summary.reference.name + ": "
    alt += ", ".join(f"{row.name} {row.speed.text()}" for row in rows)
    with drawing("throughput", alt=alt, height=_height(len(rows))) as figure:
        ax = figure.axes[0]
        _bars(
            ax,
            [row.name for row in rows],
            [row.speed.estimate for row in rows],
            [family(row, summary) for row in rows],
            [""] * len(rows),
        )
        ends = drawn_ends(rows)
        for place, row, end, text in zip(range(len(rows))[::-1], rows, ends, texts, strict=True):
            if row.speed.low is not None and row.speed.high is not None and row.name != summary.reference.name:
                ax.plot([row.speed.low, end], [place, place], color=COLOURS["muted"], linewidth=1.4)
            ax.text(end + max(ends) * 0.015, place, text, va="center", fontsize=8, bbox=BEHIND_TEXT)
        ax.set_xlim(0, max(ends) * 1.2)
        ax.axvline(1, color=COLOURS["muted"], linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
        ax.set_title("Speed: real tokens/s")
        ax.set_xlabel(f"times {summary.reference.name}; line: 95% interval")
    return figure.svg


def drawn_ends(rows: Sequence[Row]) -> list[float]:
    """Where the intervals of the speeds end on paper: an interval that tells nothing must not flatten the bars."""
    furthest = 2 * max(row.speed.estimate for row in rows)
    return [min(row.speed.high or row.speed.estimate, furthest) for row in rows]


def filler(summary: Summary) -> str | None:
    """Share of the computed tokens that are filler."""
    rows = [row for row in summary.rows if row.filler_share is not None]
    if not rows:
        return None
    shares = [100 * row.filler_share for row in rows]
    texts = [f"{share:.1f}%" if share >= 0.05 else "0%" for share in shares]
    alt = "Share of computed tokens that are filler: " + ", ".join(
        f"{r.name} {t}" for r, t in zip(rows, texts, strict=True)
    )
    with drawing("filler", alt=alt, height=_height(len(rows))) as figure:
        _bars(figure.axes[0], [row.name for row in rows], shares, [family(row, summary) for row in rows], texts)
        figure.axes[0].set_xlim(0, 125)
        figure.axes[0].set_xticks([0, 25, 50, 75, 100])
        figure.axes[0].set_title("Filler: computed for nothing")
        figure.axes[0].set_xlabel("% of computed tokens")
    return figure.svg


def memory(summary: Summary) -> str | None:
    """Peak memory, split into what was there before the first update and what training took."""
    rows = [row for row in summary.rows if row.memory is not None and row.memory_before is not None]
    if not rows:
        return None
    unit, name = (2**30, "GiB") if max(row.memory for row in rows) >= 4 * 2**30 else (2**20, "MiB")
    peaks, before = [row.memory / unit for row in rows], [row.memory_before / unit for row in rows]
    texts = [f"{peak:,.1f}" if unit == 2**30 else f"{peak:,.0f}" for peak in peaks]
    alt = f"Peak memory in {name}: " + ", ".join(f"{row.name} {text}" for row, text in zip(rows, texts, strict=True))
    with drawing("memory", alt=alt, height=_height(len(rows))) as figure:
        ax = figure.axes[0]
        _bars(ax, [row.name for row in rows], peaks, [family(row, summary) for row in rows], texts)
        ax.barh(np.arange(len(rows))[::-1], before, color=COLOURS["filler"], height=0.62)
        ax.set_title(f"Peak memory of the {rows[0].memory_of}")
        ax.set_xlabel(f"{name}; light: before the first update")
    return figure.svg


def phases(summary: Summary) -> str | None:
    """Where the seconds of an update go, as shares of the reference's seconds per real token."""
    rows = [row for row in summary.measured if row.shares is not None]
    if not rows:
        return None
    colours = dict(zip((*PHASES, "other"), ("line3", "line0", "line1", "line2", "filler"), strict=True))
    alt = "Microseconds per real token by phase of the update. "
    alt += ", ".join(f"{row.name} {1e6 / row.tokens_per_second:,.1f}" for row in rows)
    with drawing("phases", alt=alt, height=_height(len(rows)) + 0.25) as figure:
        ax, places = figure.axes[0], np.arange(len(rows))[::-1]
        left = np.zeros(len(rows))
        for phase, colour in colours.items():
            parts = [_phase_share(row, phase) * 1e6 / row.tokens_per_second for row in rows]
            ax.barh(places, parts, left=left, color=COLOURS[colour], height=0.62, label=phase)
            left += parts
        ax.set_yticks(places, [row.name for row in rows])
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.grid(axis="x")
        ax.set_axisbelow(True)
        ax.set_title("Where the time of an update goes")
        ax.set_xlabel("microseconds per real token")
        figure.figure.legend(loc="outside lower center", ncols=5, handlelength=1, columnspacing=1)
    return figure.svg


def _phase_share(row: Row, phase: str) -> float:
    return row.shares[phase] if phase in row.shares else max(0.0, 1 - sum(row.shares.values()))


def step_times(summary: Summary) -> str | None:
    """Distribution of the seconds of single updates: tenth percentile to ninetieth, and the median."""
    rows = [row for row in summary.measured if row.update_seconds is not None]
    if not rows:
        return None
    alt = "Seconds per update, median and tenth to ninetieth percentile: "
    alt += ", ".join(
        f"{r.name} {r.update_seconds.median:.3g} ({r.update_seconds.p10:.3g}-{r.update_seconds.p90:.3g})" for r in rows
    )
    with drawing("step-times", alt=alt, height=_height(len(rows))) as figure:
        ax, places = figure.axes[0], np.arange(len(rows))[::-1]
        for place, row in zip(places, rows, strict=True):
            colour, seconds = COLOURS[family(row, summary)], row.update_seconds
            ax.plot(
                [seconds.p10, seconds.p90],
                [place, place],
                color=colour,
                linewidth=5,
                alpha=0.35,
                solid_capstyle="round",
            )
            single = [u.seconds for run in row.timed_runs for u in window(run, summary.manifest)]
            ax.plot(single, [place] * len(single), "|", color=colour, markersize=5, markeredgewidth=0.8)
            ax.plot([seconds.median], [place], "o", color=colour, markersize=5)
        ax.set_yticks(places, [row.name for row in rows])
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.set_ylim(-0.6, len(rows) - 0.4)
        ax.set_xlim(left=0)
        ax.grid(axis="x")
        ax.set_title("Time of single updates")
        ax.set_xlabel("seconds; dot: median, band: p10 to p90")
    return figure.svg


def lengths(summary: Summary) -> str | None:
    """Histogram of the examples' lengths, with the capacity and the longest length allowed."""
    data = summary.manifest.get("data")
    if not data:
        return None
    edges, counts = np.array(data["edges"]), np.array(data["counts"])
    alt = (
        f"Histogram of {data['examples']:,} example lengths: median {data['median']:,.0f}, "
        f"99th percentile {data['p99']:,.0f}, longest {data['max']:,} tokens; max_length {data['max_length']:,}, "
        f"max_tokens {data['max_tokens']:,}"
    )
    with drawing("lengths", alt=alt, height=3.2) as figure:
        ax = figure.axes[0]
        ax.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color=COLOURS["ours"], edgecolor="none")
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.xaxis.set_major_formatter(FuncFormatter(short))
        ax.yaxis.set_major_formatter(FuncFormatter(short))
        marks = (
            ("median", "ink", ":"),
            ("p99", "ink", "--"),
            ("max_length", "packed", "-"),
            ("max_tokens", "accent", "-"),
        )
        for key, colour, dash in marks:
            label = f"{key} {data[key]:,.0f}"
            ax.axvline(data[key], color=COLOURS[colour], linewidth=1.3, linestyle=dash, label=label)
        ax.set_title("Lengths of the examples")
        ax.set_xlabel("tokens (log)")
        ax.set_ylabel("examples (log)")
        figure.figure.legend(loc="outside lower left", ncols=2, handlelength=1.8, columnspacing=1)
    return figure.svg


def short(value: float, _position: object = None) -> str:
    """`12k`, `1.5M`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


FIGURES: tuple[Callable[[Summary], str | None], ...] = (
    throughput,
    filler,
    phases,
    step_times,
    memory,
    lengths,
)
