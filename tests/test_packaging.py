"""What an installed packtrain needs next to its modules is in the wheel."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from packtrain.cli import main
from packtrain.cli.audit import _recipe as audit_target
from packtrain.errors import PacktrainError, RecipeError
from packtrain.recipe.reader import load_recipe
from packtrain.recipe.shipped import SHARE, find_recipe, find_shipped

ROOT = Path(__file__).parents[1]


def names_of(folder: Path) -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.mark.ci
@pytest.mark.slow
def test_the_wheel_holds_the_package_recipes_and_launch_files(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    shipped = {f"packtrain/share/{name}" for folder in ("recipes", "launch") for name in names_of(ROOT / folder)}
    assert held == names_of(ROOT / "packtrain") | shipped


def test_recipes_and_launch_files_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_shipped("quickstart", "recipes", kind="recipe") == SHARE / "recipes" / "quickstart.yaml"
    assert find_shipped("zero2", "launch", kind="launch file") == SHARE / "launch" / "zero2.yaml"
    assert find_shipped("long_tail", "recipes", kind="recipe", below="compare").parent.name == "compare"
    (tmp_path / "quickstart.yaml").write_text("mine")
    assert find_shipped("quickstart", "recipes", kind="recipe").read_text() == "mine"  # the current folder wins
    with pytest.raises(PacktrainError, match="did you mean quickstart"):
        find_shipped("quikstart", "recipes", kind="recipe")


def test_a_recipe_goes_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("quickstart").to_dict() == load_recipe(ROOT / "recipes/quickstart.yaml").to_dict()
    assert find_recipe("quickstart", below="compare").parent.name == "compare"
    with pytest.raises(RecipeError, match="did you mean quickstart"):
        load_recipe("quikstart")
    assert audit_target("quickstart", ()).to_dict() == load_recipe("quickstart").to_dict()
    assert audit_target("llama", ()) is audit_target("Qwen/Qwen3-0.6B", ()) is None  # models


@pytest.mark.parametrize("command", [["compare", "quickstart"], ["report", "out"]])
def test_an_extra_that_is_not_installed_is_named_first(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.setattr(sys, "argv", ["packtrain", *command])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "pip install 'packtrain[plots]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_init_writes_a_recipe_that_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["init", "mine"])
    assert not ended.value.code
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    recipe = load_recipe("mine.yaml")
    assert recipe.lora["r"] == 16 and "packtrain train mine.yaml" in (tmp_path / "mine.yaml").read_text()
    with pytest.raises(SystemExit) as ended:
        main(["init", "mine"])
    assert ended.value.code == PacktrainError.exit_code and "already" in capsys.readouterr().err
