"""A strategy that ends its process the way an out-of-memory killer does."""

from __future__ import annotations

import os
import signal


def kill_this_process(lengths, capacity, key):
    os.kill(os.getpid(), signal.SIGKILL)
