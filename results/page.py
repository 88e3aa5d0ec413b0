"""Writes what the pages of all studies share: the command, the machine and the packages that figures come from."""

from __future__ import annotations

import json
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from packtrain.compare.statistics import Difference, Ratio
from packtrain.training.summary import describe_machine, name_machine, package_versions

RESULTS = Path(__file__).resolve().parent


def command_line(study: str) -> str:
    """The command as it was given: `python results/attach/run.py --rounds 1`."""
    return shlex.join(["python", f"results/{study}/run.py", *sys.argv[1:]])


def origin(study: str) -> dict[str, Any]:
    """The command, the machine, the packages and the number of torch's threads."""
    return {
        "command": command_line(study),
        "machine": describe_machine(),
        "packages": package_versions(),
        "threads": torch.get_num_threads(),
    }


def origin_lines(result: Mapping[str, Any], *packages: str) -> list[str]:
    """The same as the last lines of a page, with the versions of `packages`."""
    versions = ", ".join(f"{name} {result['packages'][name]}" for name in packages)
    machine = name_machine(result["machine"], result["threads"])
    return ["", f"Machine: {machine}; {versions}.", "", f"    {result['command']}", ""]


def limits(text: str) -> list[str]:
    """The paragraph of a page about what its figures do not show."""
    return ["", *textwrap.wrap("**What this does not show.** " + text, width=118)]


def percent(ratio: Ratio) -> str:
    """Writes a ratio near 1 as a difference with its interval, bold where that excludes 0: `**+1.2% (+0.4 to +2.0)**`."""
    text = f"{ratio.estimate - 1:+.1%}"
    if ratio.low is not None and ratio.high is not None:
        text += f" ({100 * (ratio.low - 1):+.1f} to {100 * (ratio.high - 1):+.1f})"
    return f"**{text}**" if ratio.above_one or ratio.below_one else text


def signed(difference: Difference, digits: int = 4) -> str:
    """Writes a difference with its interval, bold where that excludes 0: `**+0.012 (+0.004 to +0.020)**`."""
    text = f"{difference.estimate:+.{digits}f}"
    if difference.low is not None and difference.high is not None:
        text += f" ({difference.low:+.{digits}f} to {difference.high:+.{digits}f})"
    return f"**{text}**" if difference.is_clear else text


def store(directory: Path, result: Mapping[str, Any], page: str, *, depth: int | None = None) -> None:
    """Write `bench.json` and `README.md`; with `depth`, what lies deeper than that many mappings is on one line."""
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1) if depth is None else on_lines(result, depth)
    (directory / "bench.json").write_text(text + "\n", encoding="utf-8")
    (directory / "README.md").write_text(page, encoding="utf-8")


class Kept:
    """The figures of a study so far, in `out/`: a run that was stopped measures what is missing, and nothing twice.

    Figures of another command, machine or version of a package are not used; a sitting may have other `--minutes`.
    """

    def __init__(self, study: str):
        self.path, self.origin = RESULTS.parent / "out" / f"{study}.json", origin(study)
        self.found: dict[str, Any] = {}
        if self.path.exists():
            before = json.loads(self.path.read_text(encoding="utf-8"))
            self.found = before["found"] if untimed(before["origin"]) == untimed(self.origin) else {}

    def measure(self, name: str, measure: Callable[[], Any]) -> Any:
        """Returns the figures of that name, measured now or before."""
        if name not in self.found:
            self.found[name] = measure()
            self.path.parent.mkdir(exist_ok=True)
            self.path.write_text(json.dumps({"origin": self.origin, "found": self.found}), encoding="utf-8")
        return self.found[name]

    def finish(self) -> None:
        """Forgets them, once the page is written."""
        self.path.unlink(missing_ok=True)


def untimed(about: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an origin without the `--minutes` of its command, which change no figure.

    >>> untimed({"command": "python results/scores/run.py --seeds 2 --minutes 10"})
    {'command': 'python results/scores/run.py --seeds 2'}
    """
    return dict(about) | {"command": re.sub(r" --minutes[ =]\S+", "", about["command"])}


def on_lines(value: Any, depth: int) -> str:
    """JSON with one entry of the first `depth` mappings to a line."""
    if not depth or not isinstance(value, Mapping):
        return json.dumps(value)
    return (
        "{\n" + ",\n".join(f"{json.dumps(key)}: {on_lines(inner, depth - 1)}" for key, inner in value.items()) + "\n}"
    )
