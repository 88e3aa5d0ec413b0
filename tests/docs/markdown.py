"""Reads Markdown files: their code blocks, the commands in them, and their links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^( *)```(\w*)\s*$")
_MARK = re.compile(r"^<!-- (.+) -->$")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_ASSIGNMENT = re.compile(r"[A-Z_]+=")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block: its language, the comment in the line above it (`<!-- row: text -->`), and its first line."""

    language: str
    code: str
    mark: str
    line: int


def blocks(text: str) -> list[Block]:
    """Returns the fenced blocks of a page."""
    found, lines = [], text.splitlines()
    number = 0
    while number < len(lines):
        opened = _FENCE.match(lines[number])
        if opened is None:
            number += 1
            continue
        above = _MARK.match(lines[number - 1]) if number else None
        end = next(n for n in range(number + 1, len(lines)) if lines[n].strip() == "```")
        code = "\n".join(line.removeprefix(opened[1]) for line in lines[number + 1 : end]) + "\n"
        found.append(Block(language=opened[2], code=code, mark=above[1] if above else "", line=number + 2))
        number = end + 1
    return found


def commands(code: str) -> Iterator[list[str]]:
    """Yields the words of each command of a shell block; comments, `VARIABLE=value` and a path before it are left out.

    >>> list(commands("cd x && A=1 .venv/bin/packtrain plan r.yaml \\\\\\n  --all   # every strategy"))
    [['cd', 'x'], ['packtrain', 'plan', 'r.yaml', '--all']]
    """
    for line in code.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word == "&&":
                if words:
                    yield [words[0].rpartition("/")[2], *words[1:]]
                words = []
            elif words or not _ASSIGNMENT.match(word):
                words.append(word)


def spans(text: str) -> Iterator[str]:
    """Yields the code in a page's running text, from single backticks."""
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    for found in re.finditer(r"`([^`]+)`", prose):
        yield " ".join(found[1].split())


def broken_links(page: Path, text: str) -> list[str]:
    """Returns the relative links and images of a page that lead nowhere: files that are not there, unknown headings."""
    broken = []
    for target in _LINK.findall(re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, heading = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (heading and heading not in _headings(file.read_text(encoding="utf-8"))):
            broken.append(target)
    return broken


def _headings(text: str) -> set[str]:
    found = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}
