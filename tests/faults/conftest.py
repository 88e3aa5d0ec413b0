"""One unbroken run that every broken and resumed one is compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.runs import log_of, run, write_recipe


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory) -> Path:
    """The directory of a finished run with its checkpoints; copy before you damage it."""
    recipe = write_recipe(tmp_path_factory.mktemp("unbroken"))
    assert run(recipe) == 0, log_of(recipe)
    return recipe.parent / "run"
