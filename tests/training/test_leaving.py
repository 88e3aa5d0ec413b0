"""The end of a run of several processes is not a failure of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from packtrain.training.engines.leaving import PAUSE

ROOT = Path(__file__).parents[2]


def end_with_a_late_thread(seconds: float, pause: float) -> subprocess.CompletedProcess:
    """Two ranks whose threads of gloo drop a tensor `seconds` late, and who leave them `pause` seconds."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [*launcher, "-m", "tests.training.late_thread", str(seconds), str(pause)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_a_late_thread_of_gloo_does_not_abort_the_run():
    done = end_with_a_late_thread(0.05, PAUSE)
    assert done.returncode == 0, done.stderr[-3000:]


def test_it_would_without_the_pause():
    done = end_with_a_late_thread(2.0, 0.0)
    assert done.returncode != 0
    assert "exitcode: -6" in done.stderr
