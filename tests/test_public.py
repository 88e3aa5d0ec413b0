"""The names of packtrain: all of them there, none beside them, and none that loads torch before it is used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import packtrain


def test_dir_lists_the_public_names_and_nothing_else():
    assert sorted(dir(packtrain)) == sorted(packtrain.__all__)
    assert {"attach", "audit", "train", "load_recipe", "make_plan", "register_attention"} <= set(dir(packtrain))


@pytest.mark.parametrize("name", packtrain.__all__)
def test_every_public_name_is_there(name):
    assert getattr(packtrain, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'unpack'"):
        packtrain.unpack  # noqa: B018


def test_importing_packtrain_loads_nothing_heavy():
    program = "import sys, packtrain; print({'torch', 'numpy', 'pydantic'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "set()"


def test_its_types_are_seen_by_type_checkers():
    assert (Path(packtrain.__file__).parent / "py.typed").is_file()
