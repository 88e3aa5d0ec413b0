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
from textwrap import fill
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgba
from matplotlib.figure import Figure
from matplotlib.text import Text

ROLES = ("ink", "muted", "grid", "ours", "best", "packed", "peer", "padding", "accent", "card")
LINES = tuple(f"line{number}" for number in range(8))  # told apart by hue, for curves
PHASES = tuple(f"phase{number}" for number in range(6))  # parts of a whole; no hue of the variants
BLOCKS = tuple(f"block{number}" for number in range(6))  # neighbouring documents
COLOURS = {role: f"#0000{number:02x}" for number, role in enumerate((*ROLES, *LINES, *PHASES, *BLOCKS), start=1)}

POINTS = 72  # of an inch
MARGIN = 10  # points, around a figure that stands alone
SCALE = 1.45  # pixels per point
DPI = 400  # of PNGs, for print
FONTS = "Helvetica, Arial, Liberation Sans, DejaVu Sans, sans-serif"  # of a figure that stands alone
INSIDE = 0.01  # inches beyond its edge that a figure may have
WIDTH = 4.6  # inches: readable on a phone, two next to each other on a screen
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "packtrain",
    "text.hinting": "none",  # the layout measures text as the SVG has it
    "pdf.fonttype": 42,  # whole fonts, which publishers take; Type 3 many don't
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
        figure = Figure(figsize=(width, height), dpi=POINTS, layout="constrained")  # text is as wide as in the SVG
        result = Drawing(figure=figure, ax=figure.subplots())
        yield result
        _fit(figure, result.ax)
        result.svg = _inline(figure, name, alt)
        keep = _keep.get()
        if keep is not None:
            keep(name, result.svg, figure)


def _fit(figure: Figure, ax: Axes) -> None:
    """Wrap a title and label that are longer than there is room, and enlarge the figure until all of it lies within.

    Matplotlib's layout leaves out how wide titles and labels are.
    """
    title = ax.get_title(loc="left")
    lines = [text for text in (ax.xaxis.label, *ax.get_children()) if isinstance(text, Text) and text.get_text()]
    lines = {text: text.get_text() for text in lines if text is ax.xaxis.label or text.get_text() == title}
    figure.draw_without_rendering()
    for _ in range(4):
        whole, before = figure.bbox.width, [text.get_text() for text in lines]
        for text, words in lines.items():
            box = text.get_window_extent()
            centre = (box.x0 + box.x1) / 2
            room = whole - box.x0 if text.get_horizontalalignment() == "left" else 2 * min(centre, whole - centre)
            if box.width > room:
                longest = max(map(len, text.get_text().splitlines()))
                text.set_text(fill(words, max(12, int(longest * room / box.width)), break_on_hyphens=False))
        if before != [text.get_text() for text in lines]:
            figure.draw_without_rendering()
        box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        wide = max(0.0, box.x1 - width) + max(0.0, -box.x0)
        high = max(0.0, box.y1 - height) + max(0.0, -box.y0)
        if wide + high < INSIDE:
            return
        figure.set_size_inches(width + wide, height + high)
        figure.draw_without_rendering()


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


def tick(value: float, _position: object = None) -> str:
    """Write a tick's number: `12k`, `1.5M`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def alone(svg: str, style: str) -> str:
    """Make an inline SVG a file that stands alone, in the light colours of the stylesheet and on their ground.

    Colours and fonts are written out: programs other than browsers know no CSS variables and paint what has one black.
    """
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
    values = {**light_colours(style), "font": FONTS}
    return re.sub(r"var\(--(\w+)\)", lambda found: values[found[1]], f"{svg[:start]}\n{ground}{svg[start:]}\n")


def light_colours(style: str) -> dict[str, str]:
    """Read the light colours of the stylesheet: role -> `#rrggbb`."""
    return dict(re.findall(r"--(\w+): (#[0-9a-fA-F]{6})", style[: style.index("@media")]))


def for_print(figure: Figure, style: str) -> dict[str, bytes]:
    """Render a finished figure as `png` and `pdf`, in the light colours of the stylesheet and on their ground.

    The figure is recoloured in place.
    """
    light = light_colours(style)
    colours = {sentinel: light[role] for role, sentinel in COLOURS.items()}
    for artist in figure.findobj():
        for part in (artist, getattr(artist, "get_bbox_patch", lambda: None)()):
            for name in ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor"):
                getter, setter = getattr(part, f"get_{name}", None), getattr(part, f"set_{name}", None)
                if getter is not None and setter is not None:
                    _recolour(getter(), setter, colours)
    figure.set_facecolor(light["card"])
    unnamed: dict[str, Any] = {"png": {"Software": None}, "pdf": dict.fromkeys(("Creator", "Producer", "CreationDate"))}
    rendered = {}
    for kind, metadata in unnamed.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=DPI, metadata=metadata, bbox_inches="tight", pad_inches=MARGIN / POINTS)
        rendered[kind] = buffer.getvalue()
    return rendered


def _recolour(value: Any, setter: Callable[[Any], None], colours: Mapping[str, str]) -> None:
    """Set a colour that is a sentinel to what it stands for, as opaque as it was."""
    try:
        found = to_hex(value)
    except (TypeError, ValueError):  # none, or one for each of several
        return
    if found in colours:
        setter(to_rgba(colours[found], to_rgba(value)[3]))
