"""One direction: errors, recipe <- data <- packing <- modeling <- objectives <- training <- experiments <- cli."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "packtrain"
ROOMS = ("errors", "recipe", "data", "packing", "modeling", "objectives", "training", "experiments", "cli")
HEAVY = {"torch", "transformers", "datasets", "peft", "accelerate", "trl"}
LIGHT = (
    "packtrain",
    "packtrain.errors",
    "packtrain.recipe",
    "packtrain.data.sources",
    "packtrain.data.examples",
    "packtrain.packing.strategies",
    "packtrain.packing.plan",
    "packtrain.packing.efficiency",
    "packtrain.training.inputs",
    "packtrain.training.cached",
    "packtrain.cli",
    "packtrain.cli.show_plan",
)


def room_of(module: str) -> int | None:
    """Place of a module in the order; None for the package itself."""
    parts = module.split(".")
    if len(parts) == 1 or parts[1] == "__init__":
        return None
    name = "cli" if parts[1] == "__main__" else parts[1]
    return ROOMS.index(name)


def imports_of(tree: ast.AST, module: str) -> Iterator[str]:
    """Every module that `tree` imports, inside functions too; `from a import b` counts as `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def wrong_way(source: str, module: str) -> list[str]:
    """Imports of `module` that lead to a room further on."""
    here = room_of(module)
    targets = {name for name in imports_of(ast.parse(source), module) if name.split(".")[0] == "packtrain"}
    found = []
    for target in sorted(targets):
        name = target.split(".")[1]
        if here is not None and name in ROOMS and room_of(target) > here:
            found.append(target)
    return found


MODULES = {
    ".".join(["packtrain", *path.relative_to(PACKAGE).with_suffix("").parts]): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    assert wrong_way(MODULES[module].read_text(encoding="utf-8"), module) == []


def test_every_file_is_in_a_room():
    for module in MODULES:
        room_of(module)


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from packtrain.packing.plan import Plan", "packtrain.data.examples"),
        ("import packtrain.training.run", "packtrain.modeling.loading"),
        ("from packtrain import cli", "packtrain.training.inputs"),
        ("def f():\n    from ..training import run", "packtrain.recipe.reader"),
        ("from ...cli import main", "packtrain.experiments.comparison.report"),
    ],
)
def test_a_wrong_way_is_found(source, module):
    assert len(wrong_way(source, module)) == 1


def first_heavy(heavy: set[str]) -> str:
    """Imports LIGHT one by one in a process of their own; the first that brings in one of `heavy`, or nothing."""
    program = (
        "import importlib, sys\n"
        f"for name in {LIGHT!r}:\n"
        "    importlib.import_module(name)\n"
        f"    if {heavy!r} & set(sys.modules):\n"
        "        sys.exit(name)\n"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stderr.strip()


def test_light_modules_import_nothing_heavy():
    assert first_heavy(HEAVY) == ""


def test_something_heavy_would_be_found():
    assert first_heavy({"pydantic"}) == "packtrain.recipe"
