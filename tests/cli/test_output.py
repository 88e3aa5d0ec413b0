"""A run outlives whoever reads its output."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import packtrain
from packtrain.cli.output import print_error
from packtrain.errors import PacktrainError

PRINT = """if True:
    import sys, time
    from rich.console import Console
    from packtrain.cli.output import LastingOutput
    output = LastingOutput(sys.stdout) if sys.argv[1] == "lasting" else sys.stdout
    console = Console(file=output)
    for number in range(2000):
        console.print(f"line {number}", "x" * 200)
    sys.stderr.write("done")
    """


def run(command: str, kind: str) -> tuple[int, str]:
    script = f"set -o pipefail; {sys.executable} -c '{PRINT}' {kind} {command}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    return done.returncode, done.stderr


@pytest.mark.parametrize("command", ["| head -1 > /dev/null", "> /dev/full"])
def test_a_reader_that_goes_costs_the_output_only(command):
    if "/dev/full" in command and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    code, said = run(command, "plain")
    assert code and "done" not in said  # the control
    code, said = run(command, "lasting")
    assert code == 0 and said.endswith("done")
    assert said.count("standard output is gone") == 1 and "Traceback" not in said


def test_output_that_is_read_is_whole():
    done = subprocess.run([sys.executable, "-c", PRINT, "lasting"], capture_output=True, text=True)
    assert [line for line in done.stdout.splitlines() if line.startswith("line")][-1].startswith("line 1999")
    assert done.stderr == "done"


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_name_that_the_terminal_can_not_show_ends_nothing(encoding, tmp_path):
    """A file system's names are bytes: these are no UTF-8, and not ASCII either way."""
    name = os.fsdecode("é".encode() + b"\xff.yaml")
    command = [sys.executable, "-m", "packtrain", "init", name]
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"\\udcff.yaml" in done.stdout and (tmp_path / name).exists()


def test_errors_name_options_where_the_command_line_prints_them_and_arguments_elsewhere(capsys):
    fix = "continue it with resume=True, replace it with overwrite=True, or accept it with allow_changes=True"
    error = PacktrainError("contains a finished run", fix=fix)
    assert str(error).endswith(fix)
    print_error(error)
    said = capsys.readouterr().err
    assert said.endswith("continue it with --resume, replace it with --overwrite, or accept it with --allow-changes\n")


def test_what_python_raises_names_no_option_of_train():
    """Options are named by their argument, which `print_error` turns back, or in a whole command."""
    options = re.compile(r"--(resume|overwrite|allow-changes)\b")
    for path in (Path(packtrain.__file__).parent / "training").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
                text = node.value
                assert not options.search(text) or "packtrain train" in text or text.startswith("--"), (path, text)
