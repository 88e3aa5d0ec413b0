"""The launcher of a run on several ranks: torchrun in a process of its own, as users start it, and why a rank failed.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m packtrain.compare.worker JOB

The threads that one process would compute with are divided among the ranks. The first rank that fails ends all of them
(torchrun's own doing); one that hangs does after `training.ddp_timeout` seconds. What each printed is in
`runs/ROUND-VARIANT.rankN.log`, what torchrun printed in `runs/ROUND-VARIANT.log`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from packtrain.compare.results import End, add_end, log_path
from packtrain.recipe.recipe import Recipe

WORKER = "packtrain.compare.worker"
LOOKS = 1.0  # seconds between looks at the parent
CLOSING = 15  # seconds, less than torchrun leaves a rank to end


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the processes of a run do.

    Attributes:
        trainer: `packtrain` or a key of `TRAINERS`.
        recipe: what to train, with the round's seed.
        path: the run file.
        updates: stop after that many; None trains to the end and evaluates on the held-out examples.
        eval_every: updates between evaluations; None for the beginning and the end only.
        ranks: processes that train together.
    """

    trainer: str
    recipe: Recipe
    path: Path
    updates: int | None
    eval_every: int | None
    ranks: int = 1

    def save(self, file: Path) -> None:
        """Write the job as JSON, for `load`."""
        fields = vars(self) | {"recipe": self.recipe.to_dict(), "path": str(self.path.resolve())}
        file.write_text(json.dumps(fields), encoding="utf-8")

    @classmethod
    def load(cls, file: Path) -> Job:
        fields = json.loads(file.read_text(encoding="utf-8"))
        recipe, path = Recipe.model_validate(fields.pop("recipe")), Path(fields.pop("path"))
        return cls(recipe=recipe, path=path, **fields)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What a rank says of its own failure: when (seconds since the epoch) and why."""

    at: float
    reason: str


def launch(job: Job, worker: str = WORKER) -> None:
    """Run a job on its ranks to the end; where they fail before there is a run file, write one that says why.

    Args:
        worker: the module that each rank runs, with the job's file as its argument.
    """
    end_with_parent()
    talk_to(log_path(job.path))
    os.environ["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // job.ranks))
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "job.json"
        job.save(file)
        options = ["--standalone", "--nproc-per-node", str(job.ranks), "--log-dir", directory]
        try:
            torchrun.main([*options, "-m", worker, str(file)])
            reason = "the ranks ended without a result"
        except ChildFailedError as error:
            reason = reason_of_ranks(first_codes(error.failures), read_failures(file.parent))
        except SignalException:  # the comparison was interrupted: there is no run
            raise
        except Exception as error:
            sys.excepthook(type(error), error, error.__traceback__)  # into the log
            reason = reason_of(error)
    if not job.path.exists():
        add_end(job.path, End(status="failed", reason=reason))


def first_codes(failures: Mapping[int, ProcessFailure]) -> dict[int, int]:
    """Return the exit codes of the ranks that ended by themselves, not of those that torchrun ended when it saw that.

    It sends them SIGTERM, and SIGKILL 30 seconds later.
    """
    first = min(failure.timestamp for failure in failures.values())
    by_themselves = {
        rank: failure.exitcode
        for rank, failure in failures.items()
        if failure.exitcode != -signal.SIGTERM and failure.timestamp < first + CLOSING
    }
    return by_themselves or {rank: failure.exitcode for rank, failure in failures.items()}


def reason_of_ranks(codes: Mapping[int, int], told: Mapping[int, Failure]) -> str:
    """Say which rank failed first, and of what.

    A rank that ended without a word is the cause: what the others say then is that they have lost it. An abort alone is not,
    as libraries abort a process that has lost another one.

    Args:
        codes: the exit codes of the ranks that ended by themselves; -9 is SIGKILL.
        told: what ranks have said of their own failures.
    """
    silent = [rank for rank in sorted(codes) if rank not in told and not (told and codes[rank] == -signal.SIGABRT)]
    if silent:
        return f"rank {silent[0]}: {reason_of_code(codes[silent[0]])}"
    rank = min(told, key=lambda each: told[each].at)
    return f"rank {rank}: {told[rank].reason}"


def reason_of_code(code: int) -> str:
    """Describe the end of a process that has written nothing, by its exit code."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"the process ended with code {code}"


def reason_of(error: BaseException) -> str:
    """Describe an error in one line."""
    text = " ".join(str(error).split()).replace(f"{Path.cwd()}/", "").replace(f"{tempfile.gettempdir()}/", "")
    return f"{type(error).__name__}: {text}"[:300]


def write_failure(directory: Path, rank: int, reason: str) -> None:
    """Write why a rank fails where the launcher looks: next to the job's file."""
    failure = Failure(at=time.time(), reason=reason)
    (directory / f"rank{rank}.failed").write_text(json.dumps(asdict(failure)), encoding="utf-8")


def read_failures(directory: Path) -> dict[int, Failure]:
    """Read what ranks have said of their failures."""
    files = {int(file.stem.removeprefix("rank")): file for file in directory.glob("rank*.failed")}
    return {rank: Failure(**json.loads(file.read_text(encoding="utf-8"))) for rank, file in files.items()}


def end_with_parent() -> None:
    """End this process when the one that started it is gone: the comparison, or torchrun, killed, ends nobody else.

    A process that comes from a fork server learns it by the pipe that `multiprocessing` gives it: the server lives on.
    """
    comparison, parent = multiprocessing.parent_process(), os.getppid()

    def look() -> None:
        while comparison.is_alive() if comparison else os.getppid() == parent:
            time.sleep(LOOKS)
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()


def talk_to(log: Path) -> None:
    """Send whatever this process prints from now on to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
