"""What every benchmark's page ends with: where the figures come from; and how page and figures are stored."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from packtrain.training.summary import describe_machine, name_machine, package_versions


def origin(module: str) -> dict[str, Any]:
    """The command as it was given, the machine, the packages and torch's threads; `module` is the benchmark's name."""
    return {
        "command": shlex.join(["python", "-m", f"packtrain.experiments.{module}", *sys.argv[1:]]),
        "machine": describe_machine(),
        "packages": package_versions(),
        "threads": torch.get_num_threads(),
    }


def origin_lines(result: Mapping[str, Any], *packages: str) -> list[str]:
    """The same as the last lines of a page, with the versions of `packages`."""
    versions = ", ".join(f"{name} {result['packages'][name]}" for name in packages)
    machine = name_machine(result["machine"], result["threads"])
    return ["", f"Machine: {machine}; {versions}.", "", f"    {result['command']}", ""]


def store(directory: Path, result: Mapping[str, Any], page: str) -> None:
    """Write `bench.json` and `README.md`, and print the page."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "bench.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (directory / "README.md").write_text(page, encoding="utf-8")
    print(page)
