"""Parts of the GPU study that end badly, each in its own way; called in a process of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from results.gpu.schedule import Task


def finish(task: Task, **found: Any) -> dict[str, Any]:
    return found


def fail(task: Task) -> dict[str, Any]:
    task.keep({"before": 1})
    raise MemoryError("out of memory: tried to allocate 9 GiB")


def fail_noted(task: Task, path: str) -> dict[str, Any]:
    with Path(path).open("a") as file:
        file.write("tried ")
    raise OSError("no space left on device")


def hang(task: Task, pids: str) -> dict[str, Any]:
    """Looks at no signal, and has started another process."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    sleeper = subprocess.Popen(["sleep", "600"])
    Path(pids).write_text(f"{os.getpid()} {sleeper.pid}")
    task.keep({"before": 2})
    time.sleep(600)
    return {}


def dawdle(task: Task) -> dict[str, Any]:
    """Takes long, and ends when it is asked to."""
    task.keep({"before": 3})
    time.sleep(600)
    return {}


def die(task: Task) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}
