"""What the command line prints: sizes, and the output of a run that takes longer than whoever reads it."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from packtrain.errors import PacktrainError

NARROWEST_NAME = 12  # characters of a line of a name in a table, where the terminal is narrow
_ARGUMENTS = re.compile(r"\b(resume|overwrite|allow_changes)=True\b")
logger = logging.getLogger(__name__)


class LastingOutput(io.TextIOBase):
    """Standard output as long as someone reads it.

    A reader that has gone (`| head -1`), a terminal that was closed or a full device costs what would be printed, and not
    the run.
    """

    def __init__(self, output: TextIO):
        self._output = output

    def write(self, text: str) -> int:
        self._attempt(lambda: self._output.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(lambda: self._output.flush())

    def isatty(self) -> bool:
        return self._output.isatty()

    def fileno(self) -> int:
        return self._output.fileno()

    @property
    def encoding(self) -> str:  # ty: ignore[incompatible-property-override] (nobody assigns it)
        return self._output.encoding

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:  # for what is left in its buffer, too
                os.dup2(nowhere.fileno(), self._output.fileno())
            logger.warning("standard output is gone (%s); the run goes on without it", error.strerror)


def print_error(error: PacktrainError, head: str = "error") -> None:
    """Prints an error on stderr: `error: what is wrong`, and below it how to fix it."""
    message = Text.assemble((f"{head}: ", "bold red"), with_options(str(error)))
    message.highlight_regex(r"(?m)^\s+fix: ", "bold green")
    Console(stderr=True).print(message, soft_wrap=True)


def with_options(message: str) -> str:
    """Names options of the command line in the place of the arguments of `packtrain.train`, by which errors name them.

    >>> with_options("continue it with resume=True, replace it with overwrite=True")
    'continue it with --resume, replace it with --overwrite'
    """
    return _ARGUMENTS.sub(lambda found: "--" + found[1].replace("_", "-"), message)


@dataclass(frozen=True)
class Whole:
    """A table whose lines go on behind the edge of a terminal that is too narrow (print it with `crop=False`)."""

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        _, right, _, left = Padding.unpack(self.table.padding)
        columns = self.table.columns
        needed = sum((column.min_width or 1) + left + right for column in columns) + len(columns) - 1
        yield from console.render(self.table, options.update(width=max(options.max_width, needed)))


def keep_whole(table: Table) -> Whole:
    """Keep the cells of columns that don't wrap as wide as they are: a number that is cut is another number.

    The other columns shrink to their `min_width`.
    """
    for column in table.columns:
        if column.no_wrap:
            cells = (Text.from_markup(str(cell)) for cell in (column.header, *column.cells))
            column.min_width = max(cell_len(line) for cell in cells for line in cell.plain.splitlines() or [""])
    return Whole(table)


def size_of(count: int) -> str:
    """Writes a number of bytes.

    >>> size_of(900), size_of(123_456), size_of(5 * 2**30)
    ('900 bytes', '120.6 KiB', '5.0 GiB')
    """
    if count < 1024:
        return f"{count} bytes"
    unit = min((count.bit_length() - 1) // 10, 4)
    return f"{count / 1024**unit:,.1f} {'KMGT'[unit - 1]}iB"
