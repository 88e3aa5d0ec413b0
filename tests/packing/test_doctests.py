"""The examples in the docstrings of the packing room are true."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import packtrain.packing

MODULES = [f"packtrain.packing.{module.name}" for module in pkgutil.iter_modules(packtrain.packing.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    if name == "packtrain.packing.fast":
        pytest.importorskip("numba", reason="the compiled loop needs numba (packtrain[fast])")
    assert doctest.testmod(importlib.import_module(name)).failed == 0
