"""A drawing: a matplotlib figure as inline SVG that follows the page's light or dark colours.

Matplotlib draws in sentinel colours, one per role; in the SVG each becomes a CSS variable, so the page's
stylesheet decides what it looks like. Text stays text. Ids are made unique by the drawing's name, as all
drawings share one page. The same figure gives the same bytes every time.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROLES = ("ink", "muted", "grid", "ours", "best", "packed", "peer", "padding", "accent", "card")
LINES = tuple(f"line{number}" for number in range(8))  # told apart by hue, for curves
BLOCKS = tuple(f"block{number}" for number in range(6))  # neighbouring documents
COLOURS = {role: f"#0000{number:02x}" for number, role in enumerate((*ROLES, *LINES, *BLOCKS), start=1)}

WIDTH = 4.6  # inches: readable on a phone, two next to each other on a screen
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "packtrain",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": COLOURS["muted"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.titlecolor": COLOURS["ink"],
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "text.color": COLOURS["ink"],
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "path.simplify": True,
}


@dataclass
class Drawing:
    """A figure on its way to SVG: draw on `ax`, then read `svg`."""

    figure: Figure
    ax: Axes
    svg: str = ""


@contextmanager
def drawing(name: str, *, alt: str, height: float, width: float = WIDTH) -> Iterator[Drawing]:
    """Open a figure of `width` x `height` inches; its SVG is ready afterwards.

    Args:
        name: unique on the page; letters, digits and dashes.
        alt: what the figure shows, for those who don't see it.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        result = Drawing(figure=figure, ax=figure.subplots())
        yield result
        result.svg = _inline(figure, name, alt)


def _inline(figure: Figure, name: str, alt: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'id="', f'id="{name}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{name}-", svg)
    for role, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{role})")
    svg = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", svg)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # the page has one for all
    label = html.escape(alt, quote=True)
    svg = re.sub(r'<svg [^>]*(viewBox="[^"]*")[^>]*>', rf'<svg role="img" aria-label="{label}" \1>', svg, count=1)
    return "\n".join(line.rstrip() for line in svg.splitlines() if line.strip())
