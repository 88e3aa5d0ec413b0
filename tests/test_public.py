"""The names of packtrain: all of them there, none beside them, and none that loads torch before it is used."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import packtrain
from packtrain.errors import PacktrainError


def test_dir_lists_the_public_names_and_nothing_else():
    assert sorted(dir(packtrain)) == sorted(packtrain.__all__)
    assert {"attach", "unpad", "audit", "train", "load_recipe", "make_plan", "register_attention"} <= set(
        dir(packtrain)
    )


@pytest.mark.parametrize("name", packtrain.__all__)
def test_every_public_name_is_there(name):
    assert getattr(packtrain, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'unpack'"):
        packtrain.unpack  # noqa: B018


def test_importing_packtrain_loads_nothing_heavy():
    program = "import sys, packtrain; print({'torch', 'numpy', 'pydantic'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("train('quickstart')", "recipe: must be a checked recipe .got 'quickstart'.(.|\n)*packtrain.load_recipe"),
        ("train({'model': {}})", "recipe: must be a checked recipe .got 'dict'"),
        ("load_examples('quickstart')", "recipe: must be a checked recipe"),
        ("load_recipe({'model': {}})", "path: must be a path or a name .got 'dict'.(.|\n)*YAML file"),
        ("load_recipe('quickstart', 'max_steps=2')", "overrides: must be a list(.|\n)*give .'max_steps=2'."),
        ("unpad('gpt2')", "model: must be a torch.nn.Module .got 'str'"),
        ("audit('gpt2')", "model: must be a transformers model .got 'str'"),
    ],
)
def test_other_kinds_of_arguments_are_refused_with_what_to_give(call, message):
    with pytest.raises(PacktrainError, match=message):
        eval(f"packtrain.{call}", {"packtrain": packtrain})


MISTAKES = (
    "packtrain.load_recip('quickstart')",
    "packtrain.load_recipe(3)",
    "packtrain.load_recipe('quickstart').batching.max_token",
    "packtrain.load_examples('quickstart')",
    "packtrain.make_plan([3, 5], max_tokens='512')",
    "packtrain.make_plan([3, 5], max_token=512)",
    "packtrain.PackCollator(layout='flatt')",
    "packtrain.register_attention() + 1",
    "packtrain.attach('trainer')",
    "packtrain.train(packtrain.load_recipe('quickstart')).updates.upper()",
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """An environment with the wheel, next to what this one has."""
    wheels, place = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("environment")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "-q",
        "-w",
        str(wheels),
        str(Path(__file__).parents[1]),
    ]
    subprocess.run(command, check=True)
    venv.create(place, with_pip=False)
    (site,) = place.glob("lib/python*/site-packages")
    (wheel,) = wheels.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    assert (site / "packtrain/py.typed").is_file()
    (site / "others.pth").write_text(
        "\n".join(path for path in sys.path if path.endswith("-packages")), encoding="utf-8"
    )
    return place


@pytest.mark.ci
@pytest.mark.slow
def test_type_checkers_know_what_the_public_names_give(installed, tmp_path):
    """Control: every mistake in their use is found."""
    pytest.importorskip("ty", reason="the type checker is not installed")
    program = Path(__file__).parent / "programs/typed.py"
    used = {name for name in packtrain.__all__ if f"packtrain.{name}(" in program.read_text(encoding="utf-8")}
    assert used == set(packtrain.__all__) - {"__version__"}

    def complaints(text: str) -> list[str]:
        (tmp_path / "program.py").write_text(text, encoding="utf-8")
        command = [sys.executable, "-m", "ty", "check", "--python", str(installed), "--output-format", "concise"]
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # the wheel, not the checkout
        done = subprocess.run([*command, "program.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode in (0, 1), done.stderr
        return [line for line in done.stdout.splitlines() if line.startswith("program.py:")]

    assert complaints(program.read_text(encoding="utf-8")) == []
    found = complaints("\n".join(["import packtrain", *MISTAKES]))
    assert {int(line.split(":")[1]) for line in found} == set(range(2, len(MISTAKES) + 2)), found
