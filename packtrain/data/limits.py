"""Limits of what one row may take: a chat template that never ends is ended, and a text that would fill the memory refused.

A chat template may loop for hours over nothing, or double a text until memory is gone. It is Python code when it runs, and
hands nothing over before it is done. So a thread looks at the processor time and the memory of the process, and interrupts
the main thread as Ctrl-C would.
"""

from __future__ import annotations

import signal
import threading
import time
from _thread import interrupt_main
from collections.abc import Callable
from typing import Any, TypeVar

from packtrain.data.report import BadRow

SECONDS = 60.0  # of processor time, so that a suspended or slow machine does not count
BYTES = 4 << 30
_TICK = 0.1  # seconds
_SMALL = 1 << 28  # bytes, of which nobody takes stock
_T = TypeVar("_T")


class Endless(Exception):
    """A call took more time or memory than it may."""


def check_room(size: int, doing: str) -> None:
    """Refuses a row that needs more memory than there is: a tokenizer that finds none ends the process.

    Args:
        size: bytes.
        doing: what needs them, in words.

    Raises:
        BadRow: neither the machine nor the limit of the process (`ulimit -v`) leaves so much.
    """
    if size < _SMALL:
        return
    import psutil

    free = psutil.virtual_memory().available
    if hasattr(psutil, "RLIMIT_AS"):  # Linux
        limit, _ = psutil.Process().rlimit(psutil.RLIMIT_AS)
        if limit != psutil.RLIM_INFINITY:
            free = min(free, limit - psutil.Process().memory_info().vms)
    if size > free:
        raise BadRow(
            f"{doing} takes about {size / (1 << 30):.1f} GiB of memory, and {free / (1 << 30):.1f} GiB are free"
        )


class Limits:
    """Limits calls while it is open; does nothing outside of the main thread, or where Ctrl-C has a handler of its own.

    Args:
        seconds: of processor time, for each call.
        bytes: by which the memory of the process may grow during a call. What one operation takes is seen after it.
    """

    def __init__(self, seconds: float | None = None, bytes: int | None = None):
        self.seconds, self.bytes = seconds or SECONDS, bytes or BYTES
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._calls, self._running = 0, False
        self._over: str | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Limits:
        if threading.current_thread() is threading.main_thread():
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                self._thread = threading.Thread(target=self._watch, daemon=True)
                self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        if self._thread is not None:
            self._closed.set()
            self._thread.join()

    def call(self, function: Callable[..., _T], *given: Any) -> _T:
        """Calls a function within the limits.

        Raises:
            Endless: it went over one of them; says which.
        """
        if self._thread is None:
            return function(*given)
        try:
            with self._lock:
                self._calls, self._running = self._calls + 1, True
            try:
                return function(*given)
            finally:
                with self._lock:
                    self._running = False
                if self._over is not None:  # the interrupt is on its way, and must not come later
                    time.sleep(1)
        except KeyboardInterrupt:
            if self._over is None:
                raise  # Ctrl-C
            raise Endless(self._over) from None

    def _watch(self) -> None:
        import psutil

        process, watched, since, before = psutil.Process(), 0, 0.0, 0
        while not self._closed.wait(_TICK):
            with self._lock:
                if not self._running:
                    continue
                now, memory = time.process_time(), process.memory_info().rss
                if watched != self._calls:
                    watched, since, before = self._calls, now, memory
                elif now - since > self.seconds:
                    self._over = f"more than {self.seconds:.0f} seconds"
                elif memory - before > self.bytes:
                    self._over = f"more than {self.bytes / (1 << 30):.1f} GiB of memory"
                if self._over is not None:
                    interrupt_main()
                    return
