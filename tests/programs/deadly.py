"""Strategies that end their process, or one of several ranks, the way an out-of-memory killer does."""

from __future__ import annotations

import os
import signal


def kill_this_process(lengths, capacity, key):
    os.kill(os.getpid(), signal.SIGKILL)


def kill_rank_one(lengths, capacity, key):
    """Kill rank 1 of a launched run; the others plan as they should."""
    if os.environ.get("RANK") == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return [[index] for index in range(len(lengths))]
