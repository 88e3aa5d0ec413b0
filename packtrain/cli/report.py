"""`packtrain report`: the report of stored comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def report(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Directories of `packtrain compare`.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where the page goes.")] = None,
) -> None:
    """Rebuild the report of one comparison, or lay several side by side, from stored files alone."""
    from packtrain.compare.report import write_report

    Console().print(f"report: {write_report(directories, out=out)}", soft_wrap=True)
