"""What is shown while a comparison runs: tokens/s so far from the run's own file, and the time that is left."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from packtrain.compare.experiment import load_experiment
from packtrain.compare.progress import Progress, seconds_left, speed_of
from packtrain.compare.results import End, RunWriter, run_path, updates_so_far
from tests.compare.synthetic_runs import TOKENS, make_update
from tests.compare.tiny_experiment import write_experiment


def test_a_run_that_is_being_written_has_updates_and_a_speed(tmp_path):
    path = run_path(tmp_path, 0, "balanced")
    assert updates_so_far(path) == [] and speed_of([], 1, 10) is None
    writer = RunWriter(path)
    for number, seconds in ((1, 10.0), (2, 0.5), (3, 1.5)):
        writer.write(make_update(number, seconds=seconds, loss=5.0))
    with path.with_suffix(".part").open("a") as file:
        file.write('{"kind": "update", "upd')  # a line that is not complete
    assert [update.update for update in updates_so_far(path)] == [1, 2, 3]
    assert speed_of(updates_so_far(path), 1, 10) == pytest.approx(TOKENS)  # 2,000 tokens in 2 s
    assert speed_of(updates_so_far(path), 0, 10) == pytest.approx(TOKENS / 4)  # control: the first update counts too
    assert speed_of(updates_so_far(path), 1, 1) == pytest.approx(2 * TOKENS)  # the third is not timed, as in the report
    assert speed_of(updates_so_far(path), 3, 10) is None


def test_runs_take_as_long_as_those_before_of_their_kind():
    measured = {("a", True): [60.0], ("a", False): [8.0, 12.0], ("b", True): [100.0]}
    assert seconds_left({}, [("a", True)]) is None and seconds_left(measured, []) == 0
    assert seconds_left(measured, [("a", False), ("b", False)]) == 10 + 10  # b was never timed alone: as a
    assert seconds_left(measured, [("c", True)]) == 80
    assert seconds_left({("a", True): [60.0]}, [("b", False)]) == 60


@pytest.mark.parametrize("terminal", [True, False])
def test_variant_round_speed_and_time_left_are_shown(tmp_path, terminal):
    experiment = load_experiment(write_experiment(tmp_path, variants=["pad_longest", "balanced"], repeats=3))
    first, second = experiment.variants
    left = [(number, variant) for number in range(3) for variant in (first, second)]
    shown, said = io.StringIO(), []
    console = Console(file=shown, force_terminal=terminal, width=120)
    progress = Progress(experiment, left, said.append, console)

    path = run_path(tmp_path, 0, first.name)
    progress.begin(0, first, path)
    writer = RunWriter(path)
    for number in (1, 2):
        writer.write(make_update(number, seconds=0.25, loss=5.0))
    progress.look()
    writer.end(End(status="finished"))
    progress.end(End(status="finished"))
    progress.begin(0, second, run_path(tmp_path, 0, second.name))
    progress.end(End(status="failed", reason="out of memory"))
    assert re.fullmatch(r"run 1/6  round 1/3  pad_longest  done  4,000 real tokens/s  about \d+ (s|min) left", said[0])
    assert said[1] == "run 2/6  round 1/3  balanced  failed: out of memory"
    assert [variant.name for _, variant in progress.left] == ["pad_longest", "pad_longest"]  # balanced is left out
    assert ("update 2  4,000 real tokens/s" in shown.getvalue()) is terminal
