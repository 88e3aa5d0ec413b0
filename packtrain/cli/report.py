"""`packtrain report`: rebuild the report of stored comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def report(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Directories that `packtrain compare` wrote.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write the page, for example both.html.")
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write every figure as SVG, PNG and PDF there, the table as CSV and LaTeX."),
    ] = None,
) -> None:
    """Rebuild the report of one comparison, or of several side by side, from stored files."""
    from packtrain.errors import require

    require("jinja2", "matplotlib", extra="plots")
    from packtrain.compare.report import write_report

    console = Console()
    say = lambda line: console.print(line, soft_wrap=True, highlight=False, markup=False)  # noqa: E731
    say(f"report: {write_report(directories, out=out, figures=figures, say=say)}")
