"""Figures as inline SVG that follow the page's light or dark colours, the same bytes every time.

Matplotlib draws in sentinel colours, one per role; in the SVG each becomes a CSS variable, so the page's
stylesheet decides what it looks like. Text stays text. Ids are made unique by the figure's name, as all
figures share one page.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROLES = ("ink", "muted", "grid", "ours", "best", "packed", "peer", "filler", "accent", "card")
LINES = tuple(f"line{number}" for number in range(8))  # told apart by hue, for curves
BLOCKS = tuple(f"block{number}" for number in range(6))  # neighbouring documents
COLOURS = {role: f"#0000{number:02x}" for number, role in enumerate((*ROLES, *LINES, *BLOCKS), start=1)}

WIDTH = 4.6  # inches: readable on a phone, two beside each other on a screen
STYLE = {
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
    """A figure on its way to SVG: draw on `axes`, then read `svg`."""

    name: str
    alt: str
    figure: Figure
    axes: list[Axes] = field(default_factory=list)
    svg: str = ""


@contextmanager
def drawing(name: str, *, alt: str, height: float, width: float = WIDTH, panels: int = 1) -> Iterator[Drawing]:
    """Open a figure of `width` x `height` inches with `panels` axes below each other; its SVG is ready
    afterwards.

    Args:
        name: unique on the page; letters, digits and dashes.
        alt: what the figure shows, for those who don't see it.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = list(figure.subplots(panels, 1, squeeze=False)[:, 0])
        result = Drawing(name=name, alt=alt, figure=figure, axes=axes)
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
