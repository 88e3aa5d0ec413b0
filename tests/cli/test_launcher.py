"""The launcher of `--launch`: how a rank has ended is one sentence, and its exit code is passed on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from packtrain.cli.launcher import main

ROOT = Path(__file__).parents[2]


def ended(monkeypatch, error: Exception) -> object:
    """The exit code after accelerate's launcher has raised `error`."""

    def launch() -> None:
        raise error

    monkeypatch.setattr("accelerate.commands.launch.main", launch)
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code


def failed(*codes: int) -> ChildFailedError:
    failures = {rank: ProcessFailure(rank, 100 + rank, code, "") for rank, code in enumerate(codes)}
    return ChildFailedError("packtrain", failures)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (failed(1, -9), 1, "error: rank 1 (process 101) was killed by SIGKILL, and the launcher has ended the others"),
        (failed(-11), 1, "error: rank 0 (process 100) was killed by SIGSEGV"),
        (failed(1), 1, "error: rank 0 (process 100) failed with exit code 1"),
        (failed(2, 2), 2, ""),
        (failed(-15, 2), 2, ""),  # rank 1 has said why, and the launcher has ended rank 0
        (failed(75), 75, ""),
        (subprocess.CalledProcessError(-9, ["python"]), 1, "error: the process of the run was killed by SIGKILL"),
        (subprocess.CalledProcessError(75, ["python"]), 75, ""),
        (SignalException("got 15", signal.SIGTERM), 143, "stopped: the launcher has got SIGTERM"),
    ],
)
def test_the_end_of_a_rank_is_a_sentence_or_its_own_words(error, code, said, monkeypatch, capsys):
    assert ended(monkeypatch, error) == code
    printed = capsys.readouterr().err
    assert printed.startswith(said) and bool(printed) == bool(said)
    assert not said or "fix: " in printed


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.parametrize(
    ("lines", "code"), [("os.kill(os.getpid(), 9) if rank else time.sleep(60)", 1), ("exit(2)", 2)]
)
def test_no_traceback_of_the_launcher(lines, code, tmp_path):
    """Control: accelerate's own ends in one."""
    program = tmp_path / "program.py"
    program.write_text(f"import os, time\nrank = int(os.environ['RANK'])\n{lines}\n")
    for module, traceback in (("packtrain.cli.launcher", False), ("accelerate.commands.launch", True)):
        words = ["--config_file", str(ROOT / "launch/cpu.yaml"), str(program)]
        command = [sys.executable, "-m", module, *words]
        done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300)
        assert ("Traceback" in done.stderr) == traceback, done.stderr
        if not traceback:
            assert done.returncode == code
            assert ("was killed by SIGKILL" in done.stderr) == (code == 1)
