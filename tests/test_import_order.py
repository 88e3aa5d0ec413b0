"""The rooms of the package: imports point one way and never in circles, light modules stay light, names stay at home."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from packtrain.objectives import OBJECTIVES
from packtrain.packing.strategies import STRATEGIES
from packtrain.recipe.sections import BatchingSection

PACKAGE = Path(__file__).parents[1] / "packtrain"
FILES = {  # module -> its source; a package is called `packtrain.data.__init__`
    ".".join(["packtrain", *path.relative_to(PACKAGE).with_suffix("").parts]): path.read_text(encoding="utf-8")
    for path in sorted(PACKAGE.rglob("*.py"))
}
# From below to above. What stands here with its own name lies elsewhere than the room whose folder it is in.
ROOMS = (
    ("errors", "imports"),
    ("recipe.yaml_source", "recipe.fields", "recipe.sections", "recipe.adapters"),  # every room takes its own section
    ("data",),
    ("packing",),
    ("modeling",),
    ("objectives",),
    ("recipe",),  # the keys of all objectives and the rules of all strategies
    ("objectives.task", "objectives.masked_diffusion.answers", "generation"),  # take a whole recipe
    ("training",),
    ("plugin",),
    ("compare",),
    ("cli", "__main__"),
)
PLACES = {f"packtrain.{name}": place for place, names in enumerate(ROOMS) for name in names}

HEAVY = {"torch", "transformers", "datasets", "peft", "accelerate", "trl"}
TORCH = {"packtrain.cli.batch_view"}  # makes batches; `show` imports it when it has some to show
LIGHT = (
    "packtrain",
    "packtrain.errors",
    "packtrain.recipe.reader",
    *(name for name in FILES if name.startswith("packtrain.data.")),
    "packtrain.packing.strategies",
    "packtrain.packing.plan",
    "packtrain.packing.report",
    "packtrain.packing.recommend",
    "packtrain.objectives",
    "packtrain.objectives.task",
    *(name for name in FILES if name.startswith("packtrain.cli.") and name not in TORCH),
)


# ------------------------------------------------------------------------------------------------- one way


def imports_of(source: str, module: str, files: Sequence[str] = tuple(FILES)) -> set[str]:
    """Returns the files of the package that a source imports, for types only and inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            names |= {".".join([*base, *([node.module] if node.module else []), alias.name]) for alias in node.names}
    return {file for name in names if (file := file_of(name, files)) not in (None, module)}


def file_of(name: str, files: Sequence[str]) -> str | None:
    """Returns the file that holds a name: of `packtrain.data.store.find_store` it is `packtrain.data.store`."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        for file in (".".join(parts[:length]), ".".join([*parts[:length], "__init__"])):
            if file in files:
                return file
    return None


def place_of(module: str) -> int | None:
    """Returns the place of a file in the order; None for the package itself, which is above all."""
    if module == "packtrain.__init__":
        return None
    homes = [name for name in PLACES if module == name or module.startswith(f"{name}.")]
    assert homes, f"{module} is in no room"
    return PLACES[max(homes, key=len)]


def wrong_way(source: str, module: str, files: Sequence[str] = tuple(FILES)) -> list[str]:
    """Returns what a file imports from further up."""
    here = place_of(module)
    above = {name: place_of(name) for name in imports_of(source, module, files)}
    return sorted(name for name, place in above.items() if None not in (here, place) and place > here)


@pytest.mark.parametrize("module", FILES)
def test_imports_point_one_way(module):
    assert wrong_way(FILES[module], module) == []


def test_every_place_has_files():
    taken = {place_of(module) for module in FILES}
    assert taken - {None} == set(range(len(ROOMS)))


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from packtrain.packing.plan import Plan", "packtrain.data.examples"),
        ("import packtrain.training.run", "packtrain.modeling.loading"),
        ("from packtrain import cli", "packtrain.training.run"),
        ("def f():\n    from ..training import run", "packtrain.recipe.reader"),
        ("from ..cli import main", "packtrain.compare.report"),
        ("from . import recipe", "packtrain.recipe.fields"),
        ("if TYPE_CHECKING:\n    from packtrain.recipe.recipe import Recipe", "packtrain.packing.plan"),
        ("from packtrain.recipe import reader", "packtrain.objectives.__init__"),
        ("from .task import load_task", "packtrain.objectives.__init__"),
    ],
)
def test_a_wrong_way_is_found(source, module):
    assert len(wrong_way(source, module)) == 1


# -------------------------------------------------------------------------------------------------- no circles


def circle(files: Mapping[str, str]) -> list[str]:
    """Returns the files of a circle of imports, each importing the next; [] where there is none."""
    graph = {module: imports_of(source, module, tuple(files)) for module, source in files.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1][::-1]
    return []


def test_no_files_import_in_a_circle():
    assert circle(FILES) == []


@pytest.mark.parametrize(
    "back",
    [
        "from packtrain.data.readers import read",
        "import packtrain.data.readers",
        "from . import readers",
        "def f():\n    from packtrain.data.readers import read",
        "if TYPE_CHECKING:\n    from packtrain.data.readers import Reader",
    ],
)
def test_a_circle_is_found(back):
    files = {
        "packtrain.data.__init__": "",
        "packtrain.data.readers": "from packtrain.data.sources import Rows",
        "packtrain.data.sources": "from .formats import FORMATS",
        "packtrain.data.formats": back,
    }
    found = circle(files)
    assert set(found) == set(files) - {"packtrain.data.__init__"} and found[0] == found[-1]
    for module, imported in zip(found, found[1:], strict=False):
        assert imported in imports_of(files[module], module, tuple(files))
    assert circle(files | {"packtrain.data.formats": "import packtrain.data"}) == []


# ------------------------------------------------------------------------------------------------------- light


def first_heavy(heavy: set[str]) -> str:
    """Imports LIGHT one by one in another process; returns the first that brings in one of `heavy`, or nothing."""
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
    assert first_heavy({"pydantic"}) == "packtrain.recipe.reader"


# ------------------------------------------------------------------------------------------------------- names


def names_asked(source: str) -> int:
    """Returns how often a source asks for `<something>.objective.name`, or compares with an objective's name."""
    asked = 0
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr == "name":
            owner = node.value
            asked += getattr(owner, "attr", getattr(owner, "id", None)) == "objective"
        elif isinstance(node, ast.Compare):
            asked += any(getattr(side, "value", None) in OBJECTIVES for side in (node.left, *node.comparators))
    return asked


def outside(*rooms: str) -> list[str]:
    return [module for module in FILES if module.split(".")[1] not in rooms]


@pytest.mark.parametrize("module", outside("objectives", "recipe"))
def test_nobody_outside_asks_for_the_name_of_an_objective(module):
    assert names_asked(FILES[module]) == 0


@pytest.mark.parametrize("source", ["recipe.objective.name", "objective.name", "x == 'block_diffusion'"])
def test_a_question_for_the_name_is_found(source):
    assert names_asked(source) == 1


def strategies_named(source: str) -> Iterator[str]:
    """Yields the strategies whose names are literals of a source, or are set in backticks or behind a colon in one."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            words = re.findall(r"(?:^|`|: )(\w+)(?=$|`)", node.value)
            yield from (word for word in words if word in STRATEGIES)


def test_recipes_know_no_strategy_but_the_default():
    named = [name for module in FILES if module not in outside("recipe") for name in strategies_named(FILES[module])]
    named.remove("random")  # of `data.keep.by`, by which examples are kept
    assert named == [BatchingSection().strategy]


@pytest.mark.parametrize("source", ["'bfd'", "f'use `bfd` for {x}'", "f'{x}: use `batching.strategy: bfd`'"])
def test_a_name_of_a_strategy_is_found(source):
    assert list(strategies_named(source)) == ["bfd"]
