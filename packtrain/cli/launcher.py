"""Accelerate's launcher, as `--launch` starts it: where a rank fails, a sentence stands in the place of its traceback.

    python -m packtrain.cli.launcher --config_file launch/zero2.yaml -m packtrain train RECIPE

The exit code is that of the rank where packtrain has one for it (2, 75, ...), otherwise 1.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Mapping
from typing import TYPE_CHECKING

from packtrain.cli.output import print_error
from packtrain.errors import LaunchError, PacktrainError, Stopped

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

SAID = (PacktrainError.exit_code, Stopped.exit_code, 130, 143)  # exit codes of ranks that have said why themselves
RESUME = "--resume goes on from the newest checkpoint, where there is one"


def main() -> None:
    """Runs `accelerate launch` with the arguments of this process; exits with 0, or with what became of the ranks."""
    from accelerate.commands.launch import main as launch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch()
    except ChildFailedError as error:
        rank, failure = cause(error.failures)
        _leave(f"rank {rank} (process {failure.pid})", failure.exitcode)
    except subprocess.CalledProcessError as error:  # of a launch file for one process
        _leave("the process of the run", error.returncode)
    except SignalException as error:  # ranks have had it, too, and the time to save
        print_error(LaunchError(f"the launcher has got {error.sigval.name} and ended its ranks", fix=RESUME), "stopped")
        raise SystemExit(128 + error.sigval) from None


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
