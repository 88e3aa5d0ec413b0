"""The signals that stop a run, and what counts as the second of them: the same for ranks and for their launcher."""

from __future__ import annotations

import signal

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
PAUSE = 5.0  # seconds; a launcher forwards a signal within one, and whoever means it a second time waits that long


def heeded() -> list[signal.Signals]:
    """Returns the signals to listen to: all of `SIGNALS`, without SIGHUP under `nohup`, which has it ignored."""
    nohup = hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in SIGNALS if not (nohup and number == signal.SIGHUP)]
