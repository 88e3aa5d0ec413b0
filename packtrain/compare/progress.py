"""What a person sees of a comparison while it runs: the variant, its round, real tokens/s so far, and the time left.

A line when a run has ended; on a terminal, one more below them that follows the run's own file while it is written.

    run 5/12  round 2/3  balanced  done  12,345 real tokens/s  about 3 min left
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.status import Status

from packtrain.compare.experiment import Experiment, Variant
from packtrain.compare.results import End, Update, updates_so_far

Kind = tuple[str, bool]  # a variant's name, and whether its run trains to the end


def speed_of(updates: Sequence[Update], warmup: int, measured: int) -> float | None:
    """Returns real tokens per second of `measured` updates after the first `warmup`, as the report; None: none yet."""
    counted = [update for update in updates if warmup < update.update <= warmup + measured]
    seconds = sum(update.seconds for update in counted)
    return sum(update.real_tokens for update in counted) / seconds if seconds else None


def seconds_left(measured: Mapping[Kind, Sequence[float]], left: Sequence[Kind]) -> float | None:
    """Estimates the seconds that runs will take: as those of the variant took, else as others of their kind, else as any.

    >>> seconds_left({("a", True): [30.0], ("a", False): [8.0, 12.0]}, [("b", True), ("a", False), ("b", False)])
    50.0
    """
    if not measured:
        return None

    def mean(lists: list[Sequence[float]]) -> float | None:
        values = [value for each in lists for value in each]
        return sum(values) / len(values) if values else None

    def of(kind: Kind) -> float:
        alike = [seconds for (_, learns), seconds in measured.items() if learns == kind[1]]
        return mean([measured.get(kind, ())]) or mean(alike) or mean([*measured.values()]) or 0.0

    return sum(map(of, left))


def in_words(seconds: float) -> str:
    """Writes a time as a person would.

    >>> in_words(42), in_words(170), in_words(4000)
    ('about 42 s', 'about 3 min', 'about 1.1 h')
    """
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 3600 else f"about {seconds / 3600:.1f} h"


class Progress:
    """Tells of one run after the other.

    Args:
        left: the runs that are to be made, in their order.
        say: takes a line for every run that has ended.
        console: a terminal for the line that moves; None, or anything else, for no such line.
    """

    def __init__(
        self,
        experiment: Experiment,
        left: Sequence[tuple[int, Variant]],
        say: Callable[[str], None],
        console: Console | None = None,
    ):
        self.experiment, self.left, self.say = experiment, list(left), say
        self.console = console if console is not None and console.is_terminal else None
        self.measured: dict[Kind, list[float]] = {}
        self._status: Status | None = None

    def begin(self, number: int, variant: Variant, path: Path) -> None:
        """Starts the clock of a run whose file is `path`."""
        rounds, variants = self.experiment.rounds, self.experiment.variants
        position = number * len(variants) + variants.index(variant) + 1
        self._path, self._began = path, time.monotonic()
        self._kind = (variant.name, rounds[number].learns)
        total = len(rounds) * len(variants)
        self._head = f"run {position}/{total}  round {number + 1}/{len(rounds)}  {variant.name}"
        self.left = self.left[1:]
        if self.console is not None:
            self._status = self.console.status(self._head)
            self._status.start()

    def restart_clock(self) -> None:
        """Counts the run from now on: the first one waits for libraries that the others find loaded."""
        self._began = time.monotonic()

    def look(self) -> None:
        """Shows how far the run is, from the updates in its file."""
        if self._status is not None:
            updates = updates_so_far(self._path)
            parts = [self._head, f"update {updates[-1].update}" if updates else "starting"]
            self._status.update("  ".join([*parts, *self._speed(updates), *self._time_left(time.monotonic())]))

    def end(self, end: End) -> None:
        """Says how the run has ended; the later rounds of a variant that failed are left out."""
        self.stop()
        if end.status == "failed":
            self.left = [(number, variant) for number, variant in self.left if variant.name != self._kind[0]]
            self.say(f"{self._head}  failed: {end.reason}")
            return
        self.measured.setdefault(self._kind, []).append(time.monotonic() - self._began)
        self.say("  ".join([self._head, "done", *self._speed(updates_so_far(self._path)), *self._time_left()]))

    def interrupt(self) -> None:
        """Says at once that the present run is ended, as that may take seconds."""
        self.stop()
        self.say(f"interrupted: ending {self._head}")

    def stop(self) -> None:
        """Gives the terminal back."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _speed(self, updates: Sequence[Update]) -> list[str]:
        speed = speed_of(updates, self.experiment.warmup_steps, self.experiment.measure_steps)
        return [] if speed is None else [f"{speed:,.0f} real tokens/s"]

    def _time_left(self, now: float | None = None) -> list[str]:
        """Says how long the runs that are left will take; with `now`, the rest of this one too."""
        rounds = self.experiment.rounds
        left = [(variant.name, rounds[number].learns) for number, variant in self.left]
        seconds = seconds_left(self.measured, [*left, *([self._kind] if now is not None else [])])
        if not seconds:
            return []
        return [f"{in_words(max(seconds - (now - self._began if now is not None else 0), 1))} left"]
