"""The command line in this process, and a recipe that takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from packtrain.cli import main

QUICKSTART = Path(__file__).parents[2] / "recipes/quickstart.yaml"
SMALL = ["data.num_rows=120", "data.eval_size=20", "examples_per_step=16"]


def run(*args: str) -> int:
    """The exit code of `packtrain ARGS`, in this process."""
    with pytest.raises(SystemExit) as caught:
        main(list(args))
    return caught.value.code or 0


def sets(overrides: list[str]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]
