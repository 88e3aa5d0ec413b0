"""Runs parts of a measurement one after the other, each in its own process, within a time that is known beforehand.

    minutes 8   |- kernels -|- equivalence -|- ... -|- 0.5B trl:padding_free -X (cut off) -|- ... -| skipped, skipped
                each has a share; what fails, hangs or is killed is a line of the record, and the next part begins

Processes are forked from a server that has imported the libraries and not touched the device, so that no part waits for
imports and none finds memory of another. Where the server's imports did touch it, CUDA can't be used in a fork: the part
then runs in a new interpreter. A part keeps its figures in a file as it goes; a signal asks it to end a little before its
share is over, so that they are complete, and if it doesn't, its process group is killed.

The record is one JSON file, replaced whole after every part:

    {"devices": {"NVIDIA H100 80GB HBM3": {"machine": ..., "packages": ..., "commands": [...], "parts": {
        "kernels": {"status": "finished", "reason": null, "seconds": 17.2, "found": {...}}, ...}}}}
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packtrain.compare.results import slug, write_atomically

FILE = "bench.json"
FINISHED, FAILED, CUT_OFF, SKIPPED = "finished", "failed", "cut off", "skipped"
LEAST = 0.5  # of its share: with less time left a part is skipped
GRACE = 4.0  # seconds between the signal and the end of a share
Outcome = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One figure or a few that belong together.

    Attributes:
        name: a line of the table.
        work: `module:function`, called as `function(task, **arguments)`; returns what it found, plain data.
        seconds: its share; it is cut off then.
        weights: name of the shape whose random weights it loads from the drive, made before it.
        needs: modules without which it is skipped.
    """

    name: str
    work: str
    seconds: float
    arguments: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a part is given: the device, whether all is to be small, and where files go."""

    small: bool
    scratch: Path
    file: Path

    @property
    def device(self) -> str:
        return "cpu" if self.small else "cuda"

    def keep(self, found: Mapping[str, Any]) -> None:
        """Store what was found so far; it counts even if the part comes to no end."""
        write_atomically(self.file, json.dumps({"found": found}))


class TimeUp(Exception):
    """The share of this part is over."""


# ------------------------------------------------------------------------------------------------ in the process


def perform(part: Part, task: Task, seconds: float) -> None:
    """Do the work of a part in this process; the file of `task` says what came of it."""
    os.setsid()  # what it starts ends with it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    log = os.open(task.file.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    if not task.small and not _device_is_usable():
        given = {"part": asdict(part), "small": task.small, "scratch": str(task.scratch), "file": str(task.file)}
        command = [sys.executable, "-m", "results.gpu.schedule", json.dumps(given | {"seconds": seconds})]
        sys.exit(subprocess.run(command, check=False).returncode)
    _measure(part, task, seconds)


def _measure(part: Part, task: Task, seconds: float) -> None:
    """Call the part's function, and write its end: what it found, or the error."""

    def time_up(*_: object) -> None:
        raise TimeUp(f"after {seconds:.0f} s")

    signal.signal(signal.SIGALRM, time_up)
    signal.setitimer(signal.ITIMER_REAL, max(0.1, seconds - min(GRACE, seconds / 4)))
    try:
        module, _, function = part.work.partition(":")
        end = {"found": getattr(import_module(module), function)(task, **part.arguments), "status": FINISHED}
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)  # into the log
        end = {"found": _read(task.file).get("found", {}), "status": FAILED, "reason": _reason(error)}
        if isinstance(error, TimeUp):
            end |= {"status": CUT_OFF, "reason": str(error)}
    signal.setitimer(signal.ITIMER_REAL, 0)
    write_atomically(task.file, json.dumps(end))


def _device_is_usable() -> bool:
    """Whether CUDA starts in this process; it doesn't in a fork of one that has used it, nor where there is none."""
    import torch

    try:
        torch.cuda.init()
    except Exception:
        return False  # a new interpreter says what is wrong, if anything is
    return True


def _end_with_parent() -> None:
    """Kill this process group once the process that started it is gone, be it killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.killpg(0, signal.SIGKILL)


def _reason(error: BaseException) -> str:
    from packtrain.compare.worker import reason_of

    return reason_of(error)


# ----------------------------------------------------------------------------------------------------- the parent


def run_part(part: Part, task: Task, seconds: float) -> Outcome:
    """Run one part in its own process for at most so many seconds."""
    began = time.monotonic()
    task.file.parent.mkdir(parents=True, exist_ok=True)
    task.file.unlink(missing_ok=True)
    process, late = _context().Process(target=perform, args=(part, task, seconds)), False
    try:
        process.start()  # waits for the server's imports, the first time
        process.join(seconds)
        late = process.is_alive()
    except (OSError, EOFError):  # the server has died; the next part starts another
        pass
    finally:
        _kill(process)
    end = _read(task.file)
    code = process.exitcode or 0
    if "status" not in end:
        said = f"killed by {signal.Signals(-code).name}" if code < 0 else f"its process ended with code {code}"
        said = "its process could not be started" if process.pid is None else said
        end |= {"status": CUT_OFF if late else FAILED, "reason": f"killed after {seconds:.0f} s" if late else said}
    return {
        "status": end["status"],
        "reason": end.get("reason"),
        "seconds": round(time.monotonic() - began, 1),
        "found": end.get("found", {}),
    }


def _kill(process: Any) -> None:
    if process.pid is not None and process.is_alive():
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # it had no group yet
            process.kill()
        process.join()


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["results.gpu.preload"])
    return context


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def conduct(
    parts: Sequence[Part],
    *,
    out: Path,
    scratch: Path,
    ends: float,
    small: bool,
    command: str,
    about: Mapping[str, Any],
    weights: Callable[[str], Part],
    page: Callable[[dict[str, Any]], str],
    say: Say,
) -> dict[str, Any]:
    """Run the parts that this device has no figures of yet, those that failed before last, and write as it goes.

    Args:
        parts: in order of worth.
        out: where the record and its page are, from earlier calls, too.
        scratch: where weights, rows and logs are.
        ends: of `time.monotonic()`: no part runs beyond.
        about: `device`, a name; `machine`, `packages` and `threads`.
        weights: makes the part that makes the random weights of a shape.
        page: turns the record into markdown.
    """
    record = _read(out / FILE) or {"devices": {}}
    device = record["devices"].setdefault(about["device"], {"commands": [], "parts": {}})
    device |= {key: about[key] for key in ("machine", "packages", "threads")}
    device["commands"].append(command)

    def note(name: str, outcome: Outcome) -> None:
        device["parts"][name] = outcome
        store(out, record, page)
        reason = f": {outcome['reason']}" if outcome["reason"] else ""
        say(f"{name:32s} {outcome['status']} in {outcome['seconds']:.0f} s{reason}")

    def attempt(part: Part) -> Outcome:
        left = ends - time.monotonic()
        if missing := [name for name in part.needs if find_spec(name) is None]:
            return _skipped(f"needs {', '.join(missing)}, which is not installed")
        if left < LEAST * part.seconds:
            return _skipped(f"{max(0, left):.0f} s were left, it may take {part.seconds:.0f}")
        task = Task(small=small, scratch=scratch, file=scratch / "parts" / f"{slug(part.name)}.json")
        return run_part(part, task, min(part.seconds, left))

    lost: dict[str, Outcome] = {}  # weights that could not be made are not tried again

    def prepare(shape: str | None) -> Outcome | None:
        """Make the weights that a part needs; returns why it has none."""
        if shape is None or weights_of(scratch, shape).exists():
            return None
        if shape not in lost:
            made = attempt(weights(shape))
            if made["status"] == SKIPPED:
                return made
            note(weights(shape).name, made)
            if made["status"] == FINISHED:
                return None
            lost[shape] = _skipped("there are no weights for it")
        return lost[shape]

    for part in in_order(parts, device["parts"]):
        outcome = prepare(part.weights) or attempt(part)
        if outcome["status"] != SKIPPED or device["parts"].get(part.name, outcome)["status"] == SKIPPED:
            note(part.name, outcome)  # a failure stays rather than become something skipped
    store(out, record, page)
    return record


def in_order(parts: Iterable[Part], outcomes: Mapping[str, Outcome]) -> list[Part]:
    """Order parts that have not finished: those that were never run, then those that failed or were cut off."""

    def tried(part: Part) -> bool:
        return outcomes.get(part.name, {"status": SKIPPED})["status"] != SKIPPED

    todo = [part for part in parts if outcomes.get(part.name, {}).get("status") != FINISHED]
    return sorted(todo, key=tried)


def weights_of(scratch: Path, shape: str) -> Path:
    """Name the directory of a shape's random weights, which is there once they are complete."""
    return scratch / "weights" / slug(shape)


def store(out: Path, record: dict[str, Any], page: Callable[[dict[str, Any]], str]) -> None:
    """Replace the record and its page, each in one piece."""
    from results.page import on_lines  # imports torch, which the page needs, too

    write_atomically(out / FILE, on_lines(record, 4) + "\n")
    write_atomically(out / "README.md", page(record))


def _skipped(reason: str) -> Outcome:
    return {"status": SKIPPED, "reason": reason, "seconds": 0.0, "found": {}}


def measure_given(text: str) -> None:
    """Do the work of a part in a new interpreter: JSON of what `perform` was given."""
    given = json.loads(text)
    fields = given["part"] | {"needs": tuple(given["part"]["needs"])}
    task = Task(small=given["small"], scratch=Path(given["scratch"]), file=Path(given["file"]))
    _measure(Part(**fields), task, given["seconds"])


if __name__ == "__main__":
    from results.gpu import schedule  # as the parts import it

    schedule.measure_given(sys.argv[1])
