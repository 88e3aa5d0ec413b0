"""Accelerate's launcher, as `--launch` starts it: where a rank fails, a sentence stands in the place of its traceback.

    python -m packtrain.cli.launcher --config_file launch/zero2.yaml -m packtrain train RECIPE

The exit code is that of the rank where packtrain has one for it (2, 75, ...), otherwise 1.

A signal that stops a run is sent on to the ranks, which have as long as they need to save. torch's own launcher kills them
after 30 seconds, whatever their exit codes say, and dies of SIGUSR1; accelerate's, of one process, dies of every signal.
A rank whose launcher has died trains on, on its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import psutil

from packtrain.cli.output import print_error
from packtrain.errors import LaunchError, PacktrainError, Stopped
from packtrain.training.guards.signals import PAUSE, heeded

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

SAID = (PacktrainError.exit_code, Stopped.exit_code, 130, 143)  # exit codes of ranks that have said why themselves
RESUME = "--resume goes on from the newest checkpoint, where there is one"
GRACE = 30.0  # seconds, torch's own, for ranks that are to end because another has


def main() -> None:
    """Runs `accelerate launch` with the arguments of this process; exits with 0, or with what became of the ranks."""
    from accelerate.commands.launch import main as launch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    stops = Stops()
    with stops.listening():
        try:
            launch()
        except ChildFailedError as error:
            rank, failure = cause(error.failures)
            _leave(f"rank {rank} (process {failure.pid})", failure.exitcode)
        except subprocess.CalledProcessError as error:  # of a launch file for one process
            _leave("the process of the run", error.returncode)
        except SignalException as error:
            stops.end_ranks()
            stops.leave(error.sigval)


class Stops:
    """Sends signals on to the ranks and waits until these have ended; a second signal ends them at once.

    Attributes:
        codes: of the ranks that have ended after a signal, `{process: exit code}`.
    """

    def __init__(self) -> None:
        self.codes: dict[int, int] = {}
        self._heard_at = 0.0  # `time.monotonic`
        self._ending = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Installs the handlers while open, and keeps torch's launcher from replacing them."""
        before = {number: signal.signal(number, self._hear) for number in heeded()}
        os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"
        try:
            yield
        finally:
            del os.environ["PET_SIGNALS_TO_HANDLE"]
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: object) -> None:
        from torch.distributed.elastic.multiprocessing.api import SignalException

        ranks = psutil.Process().children()
        for rank in ranks:
            with suppress(psutil.Error):
                rank.send_signal(number)
        if self._ending or (self._heard_at and time.monotonic() - self._heard_at <= PAUSE):
            return  # as the ranks do: the terminal and the scheduler may both have sent it
        if not self._heard_at:
            self._heard_at = time.monotonic()
            self._wait(ranks)
        self._ending = True
        raise SignalException(f"got {signal.Signals(number).name}", signal.Signals(number))

    def _wait(self, ranks: list[psutil.Process]) -> None:
        """Waits until a rank has ended, however long it saves, and then `GRACE` for the others, which may wait for it."""
        left = ranks
        while left and len(left) == len(ranks):
            _, left = psutil.wait_procs(left, timeout=1.0, callback=self._note)
        psutil.wait_procs(left, timeout=GRACE, callback=self._note)

    def _note(self, rank: psutil.Process) -> None:
        code = getattr(rank, "returncode", None)  # None where another has waited for it
        if code is not None:
            self.codes[rank.pid] = int(code)

    def end_ranks(self) -> None:
        """Ends what is left of the ranks: nothing, where torch's launcher has started them."""
        _, left = psutil.wait_procs(psutil.Process().children(), timeout=GRACE, callback=self._note)
        for rank in left:
            with suppress(psutil.Error):
                rank.kill()

    def leave(self, number: signal.Signals) -> None:
        """Exits as the ranks have ended, with the exit code of a saved run where one has saved."""
        codes = set(self.codes.values())
        if codes == {0}:  # it was the last update
            raise SystemExit(0)
        said = [code for code in (Stopped.exit_code, *SAID) if code in codes]
        if said:
            raise SystemExit(said[0])
        for process, code in self.codes.items():
            if code not in (0, -number):
                _leave(f"process {process}", code)
        print_error(LaunchError(f"the launcher has got {number.name} and ended its ranks", fix=RESUME), "stopped")
        raise SystemExit(128 + number)


def cause(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """Returns `(rank, failure)` of what began it: a rank that was killed, of which others then fail, or else the first.

    Last come ranks that SIGTERM has ended, as the launcher ends the others by it.
    """
    ended = -signal.SIGTERM
    return min(failures.items(), key=lambda item: (item[1].exitcode == ended, item[1].exitcode >= 0, item[1].timestamp))


def _leave(who: str, code: int) -> None:
    """Says how a rank ended, unless it has said so itself, and exits."""
    if code not in SAID:
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            what, fix = f"{who} was killed by {name}, and the launcher has ended the others", RESUME
            if -code == signal.SIGKILL:
                fix = f"see whether the machine ran out of memory (`dmesg` names what the kernel kills); {RESUME}"
        else:
            what, fix = f"{who} failed with exit code {code}", f"its traceback is above; {RESUME}"
        print_error(LaunchError(what, fix=fix))
    raise SystemExit(code if code in SAID else 1) from None


if __name__ == "__main__":
    main()
