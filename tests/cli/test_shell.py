"""The command line in a shell: colours only where they are wanted, pipes, completion, exit codes."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from packtrain.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.ci]  # each command is a process
PACKTRAIN = [sys.executable, "-m", "packtrain"]
COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-7]|38|9[0-7])(?:;\d+)*m")  # bold and dim, which NO_COLOR allows, are none
ESCAPE = "\x1b["


def environment(**more: str) -> dict[str, str]:
    """That of a shell with colours, whatever the tests are run in."""
    given = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLORTERM")}
    return given | {"TERM": "xterm-256color", "COLUMNS": "110"} | more


def in_terminal(words: list[str], folder: Path, **more: str) -> str:
    """Runs a command in a pseudo-terminal, and returns what it printed there."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*PACKTRAIN, *words], cwd=folder, env=environment(**more), stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    printed = b""
    try:
        while block := os.read(ours, 1 << 16):
            printed += block
    except OSError:  # Linux: the other end is closed
        pass
    process.wait()
    os.close(ours)
    return printed.decode()


def piped(words: list[str], folder: Path, **more: str) -> subprocess.CompletedProcess:
    return subprocess.run([*PACKTRAIN, *words], cwd=folder, env=environment(**more), capture_output=True, text=True)


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["plan", "--lengths", "lengths.npy", "--all"], id="a table"),
        pytest.param(["plan", "nowhere"], id="an error"),
        pytest.param(["plan", "--help"], id="help"),
    ],
)
def test_colours_are_for_terminals_that_want_them(tmp_path, words):
    """All that colours say stands there in words, too."""
    np.save(tmp_path / "lengths.npy", np.arange(1, 200, dtype=np.int32))
    coloured = in_terminal(words, tmp_path)
    assert COLOUR.search(coloured)  # control
    plain = in_terminal(words, tmp_path, NO_COLOR="1")
    assert not COLOUR.search(plain)
    done = piped(words, tmp_path)
    assert ESCAPE not in done.stdout + done.stderr
    written = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", coloured).split()
    assert set((done.stdout + done.stderr).split()) - set(written) <= {"│", "╭─", "╰─"}


def test_a_pipe_that_is_closed_early_is_no_error(tmp_path):
    script = f"set -o pipefail; {sys.executable} -m packtrain keys | head -1"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.stdout and not done.stderr


@pytest.mark.parametrize(
    ("shell", "asked"),
    [
        ("bash", lambda line: {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}),
        ("zsh", lambda line: {"_TYPER_COMPLETE_ARGS": line}),
        ("fish", lambda line: {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}),
    ],
)
def test_shells_complete_verbs_options_recipes_and_keys(tmp_path, shell, asked):
    (tmp_path / "quite_mine.yaml").write_text("")
    offers = {"packtrain pus": ["push"], "packtrain train --ov": ["--overwrite"]}
    offers["packtrain prepare qui"] = ["quickstart", "quite_mine.yaml"]
    offers["packtrain train quickstart --set batching.s"] = ["batching.strategy=", "batching.schedule="]
    offers["packtrain plan quickstart --set learning_r"] = ["learning_rate="]
    offers["packtrain train quickstart --launch zero"] = ["zero1", "zero3_offload_cpu"]
    offers["packtrain keys lo"] = ["lora"]
    for line, words in offers.items():
        done = piped([], tmp_path, _PACKTRAIN_COMPLETE=f"complete_{shell}", **asked(line))
        assert [word for word in words if word not in re.split(r"[\s\"':]+", done.stdout)] == [], done.stderr


def test_every_help_names_the_exit_codes(capsys):
    for verb in ([], ["train"], ["audit"]):
        with pytest.raises(SystemExit):
            main([*verb, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert "Exit codes: 0 done" in text and "75 stopped" in text and "130 interrupted" in text


def test_libraries_draw_no_bars_in_captured_output():
    """The bar is that of transformers as it loads weights; the control is without our switch."""
    bar = "from transformers.utils import logging; list(logging.tqdm([1, 2], desc='Loading weights'))"

    def captured(code: str) -> str:
        given = {name: value for name, value in environment().items() if "PROGRESS_BARS" not in name}
        return subprocess.run(
            [sys.executable, "-c", code], env=given, capture_output=True, text=True, check=True
        ).stderr

    assert "%|" not in captured(f"from packtrain.cli import quiet_libraries; quiet_libraries(); {bar}")
    assert "Loading weights: 100%|" in captured(bar)
