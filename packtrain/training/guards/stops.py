"""A run that is told to stop finishes its update, saves once, and exits with 75 (EX_TEMPFAIL: try again).

SIGTERM (a preempted job, `#SBATCH --signal=TERM@120`), SIGINT (Ctrl-C), SIGHUP (a terminal that closes, unless `nohup`
has it ignored) and SIGUSR1 all mean the same, and it is enough that one rank hears it. A second signal exits at once, with
128 + its number: 130 for Ctrl-C. It counts as a second one after `PAUSE` seconds: Ctrl-C and schedulers signal a whole
process group, and the launcher in it forwards its own to the ranks, which have it already. Outside of training the signals
do what they always do, but for the five seconds after a stop.

The launcher of `--launch` sends all four on to its ranks, waits for them and passes their 75 on. torchrun and accelerate
by hand turn it into a 1. Signalled themselves, they give their ranks 30 seconds and then kill them, so update and save
have to be done by then (`TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300` allows five minutes where torch knows it, 2.13 does).
SIGUSR1 is for a rank itself: they don't forward it but die of it.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from packtrain.errors import Stopped
from packtrain.training.guards.signals import PAUSE, heeded


class StopOnSignal(TrainerCallback):
    """Ends training after the update in which any rank heard a signal, with a checkpoint; see the module's docstring.

    Attributes:
        agreed: the signal that ended the run, the same on all ranks.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.heard: int = 0
        self._heard_at: float = 0.0  # `time.monotonic`
        self.agreed: int = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Installs the handlers while open; does nothing in a thread, where Python allows no handlers."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._hear) for number in heeded()}
        try:
            yield
        finally:
            self._heard_at, stopped = time.monotonic(), bool(self.heard or self.agreed)
            for number, handler in before.items():
                spared = stopped and handler is not signal.SIG_IGN
                signal.signal(number, partial(self._spare, handler) if spared else handler)
            if stopped:
                atexit.register(_ignore)  # Python's end puts the system's own handlers back

    def _spare(self, before: Any, number: int, frame: object) -> None:
        """Handles what comes after a stop: nothing for `PAUSE`, which would end a rank that has saved without its 75."""
        if time.monotonic() - self._heard_at > PAUSE:
            signal.signal(number, before)
            os.kill(os.getpid(), number)

    def _hear(self, number: int, frame: object) -> None:
        if self.heard:
            if time.monotonic() - self._heard_at > PAUSE:
                os._exit(128 + number)
            return
        self.heard, self._heard_at = number, time.monotonic()
        name = signal.Signals(number).name
        once_more = f"another signal after {PAUSE:.0f} seconds stops it at once"
        with suppress(OSError):  # the terminal may be gone
            os.write(2, f"{name}: the run stops after this update, with a checkpoint; {once_more}\n".encode())

    def on_step_end(self, args, state, control, **kwargs):
        heard = torch.tensor([self.heard], device=args.device)
        self.agreed = int(self.trainer.accelerator.gather(heard).max()) if args.world_size > 1 else self.heard
        if self.agreed and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.agreed:  # saved at the end of the update
            control.should_save = control.should_evaluate = False

    def early(self) -> Stopped | None:
        """Returns what to raise, after training, if a signal has ended it before its last update."""
        state = self.trainer.state
        if not self.agreed or state.global_step >= state.max_steps:
            return None
        checkpoint = Path(str(self.trainer.args.output_dir), f"checkpoint-{state.global_step}")
        what = f"stopped by {signal.Signals(self.agreed).name} after step {state.global_step} of {state.max_steps}"
        return Stopped(what, where=str(checkpoint), fix="continue with resume=True")


def _ignore() -> None:
    for number in heeded():
        signal.signal(number, signal.SIG_IGN)
