"""One picture of an experiment, for a README: how fast each variant is, and what it does to the loss.

    results/compare_long_tail/speed.svg, written by `packtrain compare` and `packtrain report` beside the report

It stands alone, on a ground of its own, in the light or dark colours of the page it is shown on.
"""

from __future__ import annotations

import re

from packtrain.experiments.comparison.plots import BEHIND_TEXT, drawn_ends, family
from packtrain.experiments.comparison.summary import Row, Summary
from packtrain.experiments.comparison.theme import COLOURS, drawing
from packtrain.experiments.comparison.verdict import SAME_CURVE, headliner
from packtrain.experiments.comparison.wording import signed

WIDTH = 7.6  # inches
MARGIN = 10  # points
SCALE = 1.45  # pixels per point
KINDS = (
    ("ours", "the same updates as plain padding"),
    ("packed", "packed over the whole epoch, the fastest"),
    ("peer", "other trainers"),
)


def cover(summary: Summary, style: str) -> str | None:
    """A whole SVG file, or None where there is no speed to show.

    Args:
        summary: of the experiment.
        style: the report's stylesheet, which begins with its colours.
    """
    rows = shown_rows(summary)
    if not rows:
        return None
    reference, subject = summary.reference.name, headliner(summary)
    losses = [loss_of(row, summary) for row in rows]
    alt = f"Real tokens per second relative to {reference}, and the loss: "
    alt += "; ".join(f"{row.name} {row.speed.text()}, {text}" for row, text in zip(rows, losses, strict=True))
    with drawing("cover", alt=alt, height=1.25 + 0.27 * len(rows), width=WIDTH) as figure:
        ax, places = figure.axes[0], list(range(len(rows)))[::-1]
        ends = drawn_ends(rows)
        right = max(ends)
        for kind, label in KINDS:
            if any(family(row, summary) == kind for row in rows):
                ax.barh([places[0]], [0], color=COLOURS[kind], label=label)  # for the legend
        for row, place, end, loss in zip(rows, places, ends, losses, strict=True):
            weight = "bold" if row is subject else "normal"
            ax.barh(place, row.speed.estimate, color=COLOURS[family(row, summary)], height=0.66)
            if row.name != reference and row.speed.low is not None:
                ax.plot([row.speed.low, end], [place, place], color=COLOURS["muted"], linewidth=1.4)
            text = f"{row.speed.estimate:.2f}x"
            ax.text(end + 0.02 * right, place, text, va="center", weight=weight, bbox=BEHIND_TEXT)
            ax.text(1.22 * right, place, loss, va="center", weight=weight, color=_colour(row))
        ax.set_yticks(places, [row.name for row in rows])
        for label, row in zip(ax.get_yticklabels(), rows, strict=True):
            label.set(weight="bold" if row is subject else "normal", color=COLOURS["ink"])
        ax.plot([1, 1], [-0.5, places[0] + 0.5], color=COLOURS["muted"], linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
        ax.set(xlim=(0, 1.78 * right), ylim=(-0.6, len(rows) + 0.1), xticks=[])
        ax.tick_params(axis="y", length=0)
        for side in ("left", "bottom"):
            ax.spines[side].set_visible(False)
        for x, heading in ((0, f"real tokens/s, times {reference}"), (1.22 * right, f"loss, beside {reference}")):
            ax.text(x, len(rows) - 0.3, heading, color=COLOURS["muted"], va="center")
        if any(family(row, summary) != "ink" for row in rows):
            figure.figure.legend(loc="outside lower left", ncols=3, handlelength=1, columnspacing=1.5)
    return _alone(figure.svg, style)


def shown_rows(summary: Summary) -> list[Row]:
    """Those with a speed; of those packed over the epoch only the fastest."""
    rows = [row for row in summary.measured if row.speed is not None]
    packed = [row for row in rows if family(row, summary) == "packed"]
    fastest = max(packed, key=lambda row: row.tokens_per_second or 0, default=None)
    return [row for row in rows if row not in packed or row is fastest]


def loss_of(row: Row, summary: Summary) -> str:
    """`the same in all 12 updates`, or how far the held-out loss is away; empty where neither was measured."""
    if row.name == summary.reference.name:
        return ""
    if row.loss_difference is not None and row.loss_difference <= SAME_CURVE:
        return f"the same in all {len(row.learning_runs[0].updates):,} updates"
    if row.held_out_ratio is None or row.ends_with_reference is None:
        return ""
    return f"{signed(row.held_out_ratio.estimate - 1)} held-out, same {row.ends_with_reference}"


def _colour(row: Row) -> str:
    same = row.loss_difference is not None and row.loss_difference <= SAME_CURVE
    return COLOURS["accent" if same else "muted"]


def _alone(svg: str, style: str) -> str:
    """An inline SVG of the report as a file of its own, with the page's colours and a ground."""
    colours = style[: style.index("* {")].strip()
    _, _, *size = re.search(r'viewBox="([^"]*)"', svg)[1].split()
    width, height = (float(side) + 2 * MARGIN for side in size)
    box = (
        f'viewBox="{-MARGIN} {-MARGIN} {width:g} {height:g}" width="{SCALE * width:.0f}" height="{SCALE * height:.0f}"'
    )
    head = f'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {box}'
    svg = re.sub(r'<svg (.*?)viewBox="[^"]*"', lambda found: f"<svg {found[1]}{head}", svg, count=1)
    start = svg.index(">") + 1
    ground = (
        f'<rect x="{-MARGIN}" y="{-MARGIN}" width="{width:g}" height="{height:g}" rx="8" style="fill: var(--card)"/>'
    )
    return f"{svg[:start]}\n<style>\n{colours}\n</style>\n{ground}{svg[start:]}\n"
