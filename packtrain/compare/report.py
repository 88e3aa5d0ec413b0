"""The report of comparisons: one self-contained HTML page, rebuilt from stored files alone.

    packtrain report DIR [DIR...]

The same files give the same bytes: no dates, no random ids, numbers only from the stores. Several comparisons
are laid side by side in one page, with a table of their ratios first. Next to the page stand its tables as
`summary.csv` and `summary.md`, and its cover for a README as `speed.svg`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from packtrain.compare import pictures, plots
from packtrain.compare.comparison import Comparison, Row, read_comparison
from packtrain.compare.drawing import alone, for_print, kept_by
from packtrain.compare.results import PICTURED_RANKS, write_atomically
from packtrain.compare.setting import facts, method
from packtrain.compare.tables import (
    DETAILS,
    Column,
    columns,
    render_csv,
    render_latex,
    render_markdown,
    render_shown_csv,
)
from packtrain.compare.verdict import note, verdict
from packtrain.errors import PacktrainError

REPORT, COVER = "report.html", "speed.svg"
TEMPLATES = files("packtrain.compare") / "templates"


def write_report(
    directories: Sequence[str | Path],
    *,
    out: str | Path | None = None,
    figures: str | Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write the tables, page and cover of each comparison into its directory, and return the report's path.

    Args:
        directories: written by `packtrain compare`.
        out: where the page of several comparisons goes; `report.html` next to their directories by default.
        figures: a directory for every figure as SVG, PNG and PDF, and the table as CSV and LaTeX; of several
            comparisons one below it for each.
        say: takes lines for people: where the figures are, and what each shows.

    Raises:
        PacktrainError: a directory holds no experiment, or a damaged run; or `out` is no page.
    """
    if out is not None and Path(out).suffix.lower() not in (".html", ".htm"):
        fix = "name a page (--out report.html); --figures DIR writes the figures as SVG, PNG and PDF"
        raise PacktrainError("is not the name of a page, and a report is one", key="--out", value=str(out), fix=fix)
    paths = [Path(directory) for directory in directories]
    comparisons = [read_comparison(path) for path in paths]
    chapters = [chapter(comparison) for comparison in comparisons]
    for path, comparison, own in zip(paths, comparisons, chapters, strict=True):
        write_atomically(path / "summary.csv", render_csv(comparison))
        write_atomically(path / "summary.md", render_markdown(comparison))
        write_atomically(path / REPORT, render_page([own]))
        cover = plots.cover(comparison, stylesheet())
        if cover:
            write_atomically(path / COVER, cover)
    if figures is not None:
        for comparison in comparisons:
            directory = Path(figures) / (comparison.name if len(comparisons) > 1 else "")
            shown = write_figures(comparison, directory)
            say(f"figures: {directory}, each as .svg, .png and .pdf; the table as table.csv and table.tex")
            for name, title in shown.items():
                say(f"  {name}: {title}")
    if len(paths) == 1 and out is None:
        return paths[0] / REPORT
    target = Path(out) if out else paths[0].parent / REPORT
    overview = side_by_side(comparisons) if len(comparisons) > 1 else ()
    write_atomically(target, render_page(chapters, overview))
    return target


def write_figures(comparison: Comparison, directory: Path) -> dict[str, str]:
    """Write every figure as SVG, PNG and PDF, the table that people read as CSV and LaTeX; return names and titles."""
    style, shown = stylesheet(), {}

    def keep(name: str, svg: str, figure: Figure) -> None:
        title = figure.axes[0].get_title(loc="left") or "speed, and what it does to the loss"  # the cover has none
        shown[name] = " ".join(title.split())
        write_atomically(directory / f"{name}.svg", alone(svg, style))
        for kind, data in for_print(figure, style).items():
            (directory / f"{name}.{kind}").write_bytes(data)

    write_atomically(directory / "table.csv", render_shown_csv(comparison))
    write_atomically(directory / "table.tex", render_latex(comparison))
    with kept_by(keep):
        plots.figures(comparison)
        plots.cover(comparison, style)
        for drawn in (pictures.packing_pictures(comparison), pictures.rank_pictures(comparison)):
            list(drawn)
    return shown


def render_page(chapters: Sequence[Mapping[str, Any]], side_by_side: Sequence[Sequence[str]] = ()) -> str:
    """Render one HTML page of one or more chapters, and of the table that lays them side by side."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["code"] = _mark_code
    template = environment.from_string((TEMPLATES / "report.html.j2").read_text(encoding="utf-8"))
    text = template.render(
        style=stylesheet(),
        title=" and ".join(own["name"] for own in chapters),
        experiments=[_numbered(own, number) for number, own in enumerate(chapters)],
        side_by_side=side_by_side,
    )
    return text + "\n"


def stylesheet() -> str:
    """Read the stylesheet of the page, which begins with its colours."""
    return (TEMPLATES / "report.css").read_text(encoding="utf-8")


def chapter(comparison: Comparison) -> dict[str, Any]:
    """Collect what the template shows of one comparison."""
    shown = columns(comparison)
    main, detail = [c for c in shown if c[0] not in DETAILS], [c for c in shown if c[0] in DETAILS]
    return {
        "name": comparison.name,
        "facts": facts(comparison),
        "sentences": verdict(comparison),
        "note": note(comparison),
        "tables": [_table(part, comparison) for part in (main, detail) if part],
        "figures": plots.figures(comparison) if comparison.rows else [],
        "pictures": list(pictures.packing_pictures(comparison)),
        "rank_pictures": list(pictures.rank_pictures(comparison)),
        "world_size": PICTURED_RANKS,
        "method": method(comparison),
        "reasons": (comparison.manifest.get("recommendation") or {}).get("reasons", []),
        "command": comparison.manifest["command"],
        "setting": _yaml({key: comparison.manifest[key] for key in ("machine", "versions", "git")}),
        "recipes": [(variant["name"], _yaml(variant["recipe"])) for variant in comparison.manifest["variants"]],
    }


def _table(shown: Sequence[Column], comparison: Comparison) -> dict[str, Any]:
    """Collect headings and lines of a table with some of the columns."""
    others = [row for row in comparison.rows if not row.keeps_updates and not row.is_peer]
    by_packing = all(map(comparison.packs_epoch, others))
    groups = {
        comparison.same_updates: [row for row in comparison.rows if row.keeps_updates and not row.is_peer],
        f"{'packed over the whole epoch: ' if by_packing else ''}other updates": others,
        "other trainers": [row for row in comparison.rows if row.is_peer],
    }
    return {
        "headings": [heading for heading, _ in shown],
        "groups": [(title, [_line(row, shown, comparison) for row in rows]) for title, rows in groups.items()],
    }


def _yaml(data: object) -> str:
    return yaml.safe_dump(data, sort_keys=False, width=100)


def _numbered(own: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Give a chapter and its figures ids that no other chapter has."""
    prefix = f"e{number}"

    def distinct(svg: str) -> str:
        for reference in ('id="', 'href="#', "url(#"):
            svg = svg.replace(reference, f"{reference}{prefix}-")
        return svg

    drawn = {part: [distinct(svg) for svg in own[part]] for part in ("figures", "pictures", "rank_pictures")}
    return {**own, **drawn, "id": prefix}


def _line(row: Row, shown: Sequence[Column], comparison: Comparison) -> dict[str, Any]:
    return {
        "name": row.name,
        "role": plots.family(row, comparison),
        "is_reference": comparison.is_reference(row),
        "failure": row.failure if row.tokens_per_second is None else None,
        "cells": [cell(row) for _, cell in shown],
    }


def side_by_side(comparisons: Sequence[Comparison]) -> list[list[str]]:
    """Make the table of speed ratios over several comparisons: its heading, and a line per variant."""
    names = list(dict.fromkeys(row.name for comparison in comparisons for row in comparison.rows))
    head = ["variant", *(f"{each.name}, vs {each.manifest['reference']}" for each in comparisons)]

    def cell(comparison: Comparison, name: str) -> str:
        row = next((row for row in comparison.rows if row.name == name), None)
        if row is None:
            return ""
        if comparison.is_reference(row) and row.speed:
            return "1"
        return "failed" if row.failure and row.speed is None else row.speed.text() if row.speed else ""

    return [head, *([name, *(cell(comparison, name) for comparison in comparisons)] for name in names)]


def _mark_code(text: str) -> Markup:
    """Escape a text, and make `words` between backticks code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))
