"""Run under torchrun by compare/test_launcher.py: two ranks that end as the job's `trainer` says, and train nothing."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

PATIENCE = 120  # seconds that a rank lives which torchrun is to end


def end(how: str, rank: int, directory: Path) -> None:
    if how == "without a result":
        return
    if how == "killed" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exits" and rank == 1:
        os._exit(7)
    if how == "stopped" and rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)  # as in a debugger, or on a drive that hangs
    if (how == "fails" and rank == 1) or (how == "stopped" and rank == 0):
        failure = {"at": time.time(), "reason": f"ValueError: rank {rank} has said why"}
        (directory / f"rank{rank}.failed").write_text(json.dumps(failure))
        sys.exit(1)
    time.sleep(PATIENCE)


if __name__ == "__main__":
    file = Path(sys.argv[1])
    end(json.loads(file.read_text())["trainer"], int(os.environ["RANK"]), file.parent)
