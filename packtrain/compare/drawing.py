"""A drawing: a matplotlib figure as inline SVG that follows the page's light or dark colours.

Matplotlib draws in sentinel colours, one per role; in the SVG each becomes a CSS variable, so the page's
stylesheet decides what it looks like. Text stays text. Ids are made unique by the drawing's name, as all
drawings share one page. The same figure gives the same bytes every time.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgba
from matplotlib.figure import Figure

ROLES = ("ink", "muted", "grid", "ours", "best", "packed", "peer", "padding", "accent", "card")
LINES = tuple(f"line{number}" for number in range(8))  # told apart by hue, for curves
PHASES = tuple(f"phase{number}" for number in range(6))  # parts of a whole; no hue of the variants
BLOCKS = tuple(f"block{number}" for number in range(6))  # neighbouring documents
COLOURS = {role: f"#0000{number:02x}" for number, role in enumerate((*ROLES, *LINES, *PHASES, *BLOCKS), start=1)}

MARGIN = 10  # points, around a figure that stands alone
SCALE = 1.45  # pixels per point
DPI = 200  # of PNGs
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


Keep = Callable[[str, str, Figure], None]  # takes a figure's name, its inline SVG and itself
_keep: ContextVar[Keep | None] = ContextVar("keep", default=None)


@contextmanager
def kept_by(keep: Keep) -> Iterator[None]:
    """Hand every figure that is drawn while open to `keep`, too."""
    token = _keep.set(keep)
    try:
        yield
    finally:
        _keep.reset(token)


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
        keep = _keep.get()
        if keep is not None:
            keep(name, result.svg, figure)


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


def alone(svg: str, style: str) -> str:
    """Make an inline SVG a file that stands alone, with the page's colours and a ground."""
    colours = style[: style.index("* {")].strip()
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box is not None, "a figure without a size"
    _, _, *size = box[1].split()
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


def png(figure: Figure, style: str) -> bytes:
    """Render a finished figure as PNG, in the light colours of the stylesheet and on their ground."""
    light = dict(re.findall(r"--(\w+): (#[0-9a-fA-F]{6})", style[: style.index("@media")]))
    colours = {sentinel: light[role] for role, sentinel in COLOURS.items()}
    for artist in figure.findobj():
        for part in (artist, getattr(artist, "get_bbox_patch", lambda: None)()):
            for name in ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor"):
                getter, setter = getattr(part, f"get_{name}", None), getattr(part, f"set_{name}", None)
                if getter is not None and setter is not None:
                    _recolour(getter(), setter, colours)
    figure.set_facecolor(light["card"])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def _recolour(value: Any, setter: Callable[[Any], None], colours: Mapping[str, str]) -> None:
    """Set a colour that is a sentinel to what it stands for, as opaque as it was."""
    try:
        found = to_hex(value)
    except (TypeError, ValueError):  # none, or one for each of several
        return
    if found in colours:
        setter(to_rgba(colours[found], to_rgba(value)[3]))
