"""Limits of what rendering one row may take: a chat template that never ends is ended, and is not left to fill the memory.

A chat template may loop for hours over nothing, or double a text until memory is gone, and hands nothing over before it is
done. It runs as Python code, so a timer's signal reaches it: ten times per second of processor time its handler looks at
what the call has taken. `SIGVTALRM` counts processor time, so that a suspended or slow machine does not count.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

SECONDS = 60.0  # of processor time
BYTES = 4 << 30
_SHARE = 0.5  # of the memory that is free when a batch of rows begins
_TICK = 0.1  # seconds of processor time
_T = TypeVar("_T")


class Endless(BaseException):
    """Says what a call took more of than it may. No `Exception`, so that nothing on the way takes it for a bad row."""


class Limits:
    """Limits calls while it is open; does nothing outside of the main thread, where no signal arrives, or on Windows.

    Args:
        seconds: of processor time, for each call.
        bytes: by which the memory of the process may grow during a call, but never more than half of what is free. What
            one operation takes is seen after it.
    """

    def __init__(self, seconds: float | None = None, bytes: int | None = None):
        self.seconds, self.bytes = seconds or SECONDS, bytes or BYTES
        self._calls, self._running, self._watched = 0, False, 0
        self._handler: Any = None

    def __enter__(self) -> Limits:
        if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
            return self
        if signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0):  # else it is somebody's
            import psutil

            self._process, self._memory = psutil.Process(), psutil.Process().memory_info().rss
            self.bytes = min(self.bytes, int(_SHARE * psutil.virtual_memory().available))
            self._handler = signal.signal(signal.SIGVTALRM, self._look)
            signal.setitimer(signal.ITIMER_VIRTUAL, _TICK, _TICK)
        return self

    def __exit__(self, *failure: object) -> None:
        if self._handler is not None:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, self._handler)

    def call(self, function: Callable[..., _T], *given: Any) -> _T:
        """Calls a function within the limits.

        Raises:
            Endless: it went over one of them.
        """
        self._calls, self._running = self._calls + 1, True
        try:
            return function(*given)
        finally:
            self._running = False

    def _look(self, signum: int, frame: FrameType | None) -> None:
        now, memory, before = time.process_time(), self._process.memory_info().rss, self._memory
        if not self._running or self._watched != self._calls:
            self._watched, self._since, self._memory = self._calls, now, memory
            self._before = before  # of the tick before the call began
        if self._running and now - self._since > self.seconds:
            raise Endless(f"more than {self.seconds:.3g} seconds of processor time")
        if self._running and memory - self._before > self.bytes:
            raise Endless(f"more than {self.bytes / (1 << 30):.1f} GiB of memory")
