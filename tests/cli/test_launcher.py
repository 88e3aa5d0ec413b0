"""The launcher of `--launch`: how a rank has ended is one sentence, and its exit code is passed on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
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


# Ranks that need a second after a signal, the later the lower their number, and another signal after five to end at once.
SAVES = """
import os, pathlib, signal, sys, time
rank, first = int(os.environ.get("RANK", 0)), []
def hear(number, frame):
    if first and time.monotonic() - first[0] > 5:
        os._exit(128 + number)
    first.append(time.monotonic())
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, hear)
pathlib.Path(sys.argv[1], f"started-{rank}").write_text(str(os.getpid()))
while not first:
    time.sleep(0.05)
time.sleep(2 - rank if sys.argv[2] == "saves" else 600)
pathlib.Path(sys.argv[1], f"saved-{rank}").touch()
sys.exit(75)
"""
ENDS = """
import os, pathlib, sys, time
pathlib.Path(sys.argv[1], f"started-{os.environ.get('RANK', 0)}").write_text(str(os.getpid()))
time.sleep(600)
"""


def is_running(process: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="asks /proc which processes run")
@pytest.mark.parametrize(
    ("file", "ranks", "number", "program", "how", "code"),
    [
        ("cpu", 2, signal.SIGTERM, SAVES, "saves", 75),
        ("cpu", 2, signal.SIGUSR1, SAVES, "saves", 75),  # torch's launcher dies of it, and its ranks would go on
        ("cpu", 2, signal.SIGTERM, ENDS, "", 143),
        ("cpu", 2, signal.SIGINT, SAVES, "goes on", 130),  # until it comes again
        ("single_gpu", 1, signal.SIGTERM, SAVES, "saves", 75),  # accelerate's launcher dies of it
        ("single_gpu", 1, signal.SIGHUP, ENDS, "", 129),
    ],
)
def test_a_signal_to_the_launcher_leaves_no_rank_behind(file, ranks, number, program, how, code, tmp_path):
    """Every rank has saved before any is ended, and the launcher exits as they do."""
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, "-m", "packtrain.cli.launcher", "--config_file", str(ROOT / f"launch/{file}.yaml")]
    command += [str(tmp_path / "program.py"), str(tmp_path), how]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as launcher:
        until = time.monotonic() + 240
        while len(started := [file for file in tmp_path.glob("started-*") if file.read_text()]) < ranks:
            assert launcher.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        processes = [int(file.read_text()) for file in started]
        launcher.send_signal(number)
        if how == "goes on":
            time.sleep(5.5)
            assert all(map(is_running, processes))
            launcher.send_signal(number)
        said = launcher.communicate(timeout=120)[1]
    assert launcher.returncode == code, said
    assert not any(map(is_running, processes))
    assert len(list(tmp_path.glob("saved-*"))) == (ranks if how == "saves" else 0)
    assert ("the launcher has got" in said) == (how != "saves") and "Traceback" not in said
