"""Two runs in one directory: the second is refused with the name of the first, and a dead one's lock doesn't last."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from packtrain.errors import PacktrainError
from packtrain.training.output_lock import FILE, SILENT, only_run

HOLD = """if True:
    import sys, time
    from pathlib import Path
    from packtrain.training.output_lock import only_run
    with only_run(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(600)
    """


def hold(directory: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(directory)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    while not (directory / f"{FILE}.json").exists():
        time.sleep(0.002)
    return process


def holder(directory: Path, **changed) -> None:
    about = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
    (directory / f"{FILE}.json").write_text(json.dumps(about | changed))


def test_a_second_run_is_refused_and_the_first_named(tmp_path):
    first = hold(tmp_path)
    try:
        with pytest.raises(PacktrainError) as caught, only_run(tmp_path):
            pass
    finally:
        first.kill()
        first.wait()
    assert caught.value.key == "training.output_dir"
    assert f"in use by another run: process {first.pid} on {socket.gethostname()}, since 20" in str(caught.value)


def test_the_lock_of_a_killed_run_is_taken(tmp_path, caplog):
    first = hold(tmp_path)
    first.kill()
    first.wait()
    with only_run(tmp_path):
        assert json.loads((tmp_path / f"{FILE}.json").read_text())["pid"] in (first.pid, os.getpid())
    assert f"locked by a run that ended without notice: process {first.pid}" in caplog.text
    assert not (tmp_path / f"{FILE}.json").exists()


def test_one_after_the_other(tmp_path, caplog):
    """The control: nothing is said, and nothing is left."""
    for _ in range(2):
        with only_run(tmp_path):
            pass
    assert not caplog.text and not (tmp_path / f"{FILE}.json").exists()


def test_a_holder_on_another_host_counts_as_long_as_it_writes(tmp_path, caplog):
    """Where a file system locks nothing between hosts."""
    holder(tmp_path, host="node-17", pid=1)
    with pytest.raises(PacktrainError, match="process 1 on node-17(.|\n)*if that host is gone, wait 5 minutes"):
        with only_run(tmp_path):
            pass
    assert json.loads((tmp_path / f"{FILE}.json").read_text())["host"] == "node-17"
    written_before(tmp_path, SILENT + 1)
    with only_run(tmp_path):
        pass
    assert "ended without notice: process 1 on node-17" in caplog.text


def written_before(directory: Path, seconds: float) -> None:
    record = directory / f"{FILE}.json"
    os.utime(record, (record.stat().st_mtime - seconds,) * 2)


@pytest.mark.parametrize("ahead", [-86400, 86400])
def test_the_clocks_of_two_hosts_may_differ(tmp_path, ahead):
    """Only the file system's own clock says how long ago a holder wrote."""
    holder(tmp_path, host="node-17", pid=1, since=time.time() + ahead, beat=time.time() + ahead)
    with pytest.raises(PacktrainError, match="in use by another run"), only_run(tmp_path):
        pass
    written_before(tmp_path, SILENT + 1)
    with only_run(tmp_path):  # the control: it has stopped to write
        pass


@pytest.mark.parametrize("text", ["", "[]", "null", '{"host": 1}', '{"host": "a", "pid": "x", "since": 0, "beat": 0}'])
def test_a_damaged_record_holds_nothing(text, tmp_path):
    (tmp_path / f"{FILE}.json").write_text(text)
    with only_run(tmp_path):
        pass
