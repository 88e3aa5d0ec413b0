"""One run at a time in an `output_dir`: two would mix their checkpoints, each with a good checksum.

The lock is the operating system's own on `<output_dir>/run.lock`, so it ends with the process that holds it, however that
ends; `run.lock.json` next to it says who that is. Where a file system has no locks between hosts, the age of that file
decides: whoever holds the lock writes it anew every `BEAT` seconds.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from packtrain.errors import PacktrainError

logger = logging.getLogger(__name__)
FILE = "run.lock"
BEAT = 30.0  # seconds
SILENT = 10 * BEAT  # seconds without a beat, after which a holder on another host counts as dead
LINGER = 15.0  # seconds that data-loading workers may outlive a killed run, whose lock they have inherited


@contextlib.contextmanager
def only_run(output_dir: Path, key: str = "training.output_dir") -> Iterator[None]:
    """Holds the lock of a directory while open; called by one rank.

    Args:
        key: by which the user chooses another directory.

    Raises:
        PacktrainError: another run holds it.
    """
    path, holder = output_dir / FILE, output_dir / f"{FILE}.json"
    lock, before = FileLock(path), _read(holder)
    dead = before is not None and _is_here(before) and not _is_alive(before["pid"])
    try:
        lock.acquire(timeout=LINGER if dead else 0)
    except Timeout:
        raise _taken(path, before, key) from None
    except (OSError, NotImplementedError) as error:  # a file system without locks
        logger.warning("%s can't be locked (%s); make sure that no other run writes there", output_dir, error)
        yield
        return
    try:
        if before and not _is_here(before) and _age(holder) < SILENT:
            raise _taken(path, before, key)
        if before:
            logger.warning("%s was locked by a run that ended without notice: %s", output_dir, _named(before))
        stop = threading.Event()
        beats = threading.Thread(target=_beat, args=(holder, stop), daemon=True)
        beats.start()
        try:
            yield
        finally:
            stop.set()
            beats.join()
            holder.unlink(missing_ok=True)
    finally:
        lock.release()


def _beat(path: Path, stop: threading.Event) -> None:
    """Writes who holds the lock, again and again."""
    about = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
    while not stop.is_set():
        with contextlib.suppress(OSError):  # what a full drive does to a run is said elsewhere
            aside = path.with_suffix(".new")
            aside.write_text(json.dumps(about))
            aside.replace(path)
        stop.wait(BEAT)


def _read(path: Path) -> dict[str, Any] | None:
    """Returns what the file says of a holder; None where there is none."""
    try:
        found = json.loads(path.read_text())
        return {"host": str(found["host"]), "pid": int(found["pid"]), "since": float(found["since"])}
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _age(path: Path) -> float:
    """Returns the seconds since a file was written, by the clock of its file system: those of two hosts may differ."""
    try:
        with tempfile.TemporaryFile(dir=path.parent) as now:
            return os.fstat(now.fileno()).st_mtime - path.stat().st_mtime
    except FileNotFoundError:  # its holder has just ended
        return SILENT


def _is_here(holder: dict[str, Any]) -> bool:
    return holder["host"] == socket.gethostname()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


def _named(holder: dict[str, Any]) -> str:
    since = datetime.fromtimestamp(holder["since"]).strftime("%Y-%m-%d %H:%M:%S")
    return f"process {holder['pid']} on {holder['host']}, since {since}"


def _taken(path: Path, holder: dict[str, Any] | None, key: str) -> PacktrainError:
    fix = f"wait until it has ended, stop it, or choose another {key}"
    if holder is not None and not _is_here(holder):
        fix += f"; if that host is gone, wait {SILENT / 60:.0f} minutes, or remove {path}.json"
    what = "is in use by another run" + (f": {_named(holder)}" if holder else "")
    return PacktrainError(what, key=key, value=str(path.parent), fix=fix)
