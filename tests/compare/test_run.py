"""The whole way with real processes: run, fail, be killed, continue, report."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from packtrain.compare.comparison import read_comparison
from packtrain.compare.experiment import load_experiment
from packtrain.compare.results import End, RunWriter, run_path
from packtrain.compare.run import run_comparison, what_is_kept
from packtrain.compare.verdict import verdict
from packtrain.errors import PacktrainError
from packtrain.training.output_lock import only_run
from tests.compare.tiny_experiment import write_experiment

NAN = {"name": "nan", "training.learning_rate": 1e30, "training.max_grad_norm": 0}
IMPOSSIBLE = {"name": "impossible", "training.gradient_accumulation_steps": 1, "batching.max_tokens": 512}
KILLED = {"name": "killed", "batching.strategy": "tests.programs.deadly:kill_this_process"}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Runs get one thread each, as tests do."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


@pytest.mark.ci
@pytest.mark.slow
def test_a_comparison_from_recipe_to_report(tmp_path):
    """Two rounds of good variants, and three that fail each in its own way."""
    path = write_experiment(tmp_path, variants=["pad_longest", "balanced", "bfd", NAN, IMPOSSIBLE, KILLED], repeats=2)
    said: list[str] = []
    directory = run_comparison(path, output_dir=tmp_path / "out", say=said.append)
    runs = [line for line in said if line.startswith("run ")]  # what failed is left out of round two
    assert said[0] == "comparing pad_longest, balanced, bfd, nan, impossible, killed: 2 rounds" and said[1:10] == runs
    assert said[10] == "verdict:" and said[11].startswith("  `balanced` ") and said[-1].startswith("report:")
    assert all(" real tokens/s" in line and " left" in line for line in runs[1:2] + runs[6:8])
    order = [line.split()[4] for line in runs]
    assert order == ["pad_longest", "balanced", "bfd", "nan", "impossible", "killed", "pad_longest", "balanced", "bfd"]

    comparison = read_comparison(directory)
    rows = {row.name: row for row in comparison.rows}
    assert rows["balanced"].loss_difference < 1e-4 and rows["balanced"].norm_difference < 1e-4
    assert rows["balanced"].speed.pairs == 2 and rows["bfd"].loss_difference is None
    assert rows["balanced"].padding_share == 0 < rows["pad_longest"].padding_share
    assert rows["balanced"].held_out == pytest.approx(rows["pad_longest"].held_out, rel=1e-4)
    assert rows["balanced"].equal_updates is not None and rows["pad_longest"].memory_of in ("process", "device")
    assert rows["nan"].failure.startswith("NonFiniteError: update 1") and "is not finite" in rows["nan"].failure
    assert rows["impossible"].failure.startswith("PlanError: ")
    assert rows["killed"].failure == "killed by SIGKILL"
    assert sum(sentence.topic == "failure" for sentence in verdict(comparison)) == 3

    manifest = (directory / "manifest.json").read_text()
    assert str(tmp_path) not in manifest and str(Path.home()) not in manifest
    assert json.loads(manifest)["recommendation"]["strategy"] in ("pad_longest", "group_by_length", "balanced")
    text = (directory / "report.html").read_text()
    assert "killed by SIGKILL" in text and str(tmp_path) not in text
    assert {file.suffix for file in (directory / "runs").iterdir()} == {".jsonl", ".log"}  # logs of what failed


@pytest.mark.slow
def test_killed_in_the_middle_it_continues(tmp_path):
    path = write_experiment(tmp_path, variants=["pad_longest", "balanced", "padding_free"])
    out = tmp_path / "out"
    command = [sys.executable, "-m", "packtrain", "compare", str(path), "--out", str(out)]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    first = out / "runs" / "00-pad_longest.jsonl"
    deadline = time.monotonic() + 200
    while not first.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "report.html").exists()
    kept, written = first.read_bytes(), first.stat().st_mtime_ns

    said: list[str] = []
    run_comparison(path, output_dir=out, say=said.append)
    assert first.read_bytes() == kept and first.stat().st_mtime_ns == written
    runs = [line.split()[4] for line in said if line.startswith("run ")]
    assert runs in (["balanced", "padding_free"], ["padding_free"])
    assert said[0].endswith(f"; {3 - len(runs)} of 3 runs {'is' if len(runs) == 2 else 'are'} finished and kept")
    comparison = read_comparison(out)
    assert [row.name for row in comparison.rows if row.updates] == ["pad_longest", "balanced", "padding_free"]
    assert comparison.row("padding_free").loss_difference < 1e-4
    assert not list((out / "runs").glob("*.part"))

    said.clear()
    run_comparison(path, output_dir=out, say=said.append)
    assert said[0] == "verdict:" and not any(line.startswith("run ") for line in said)  # nothing was left to run

    with pytest.raises(PacktrainError, match="(?s)runs of another recipe.*--restart"):
        run_comparison(path, ["training.learning_rate=0.5"], output_dir=out)
    assert first.read_bytes() == kept
    (out / "notes.txt").write_text("mine")
    run_comparison(path, ["variants=[pad_longest]"], output_dir=out, restart=True, say=lambda line: None)
    assert [file.name for file in (out / "runs").iterdir()] == [first.name] and first.read_bytes() != kept
    assert (out / "notes.txt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killed_alone_it_leaves_no_run_behind(tmp_path, how):
    """A run that went on would share the processor, and its file, with those of the next call."""
    path, out = write_experiment(tmp_path), tmp_path / "out"
    options = ["--out", str(out), "--set", "num_train_epochs=1000", "--set", "eval_strategy=no"]
    process = subprocess.Popen(
        [sys.executable, "-m", "packtrain", "compare", str(path), *options],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    try:
        part, deadline = out / "runs" / "00-pad_longest.part", time.monotonic() + 600
        while not (part.exists() and part.read_text().count('"update"') > 2):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(how)  # to the comparison alone, not to the processes that it has started
        assert process.wait() in (-how, 128 + how)
        time.sleep(5)
        size = part.stat().st_size
        time.sleep(2)
        assert part.stat().st_size == size  # control: a run that goes on writes each of its thousands of updates
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["starting", "training"])
def test_interrupted_it_says_so_at_once_and_how_it_goes_on(tmp_path, moment):
    """Ctrl-C was answered by seconds of nothing, and by a traceback of the server that was still importing."""
    path, out = write_experiment(tmp_path), tmp_path / "out"
    options = ["--out", str(out), "--set", "num_train_epochs=1000", "--set", "eval_strategy=no"]
    process = subprocess.Popen(
        [sys.executable, "-m", "packtrain", "compare", str(path), *options],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    lines, part = iter(process.stdout.readline, ""), out / "runs" / "00-pad_longest.part"
    try:
        assert next(lines) == "tiny: loading torch and transformers, reading rows\n"
        assert next(line for line in lines if line.startswith("comparing "))
        deadline = time.monotonic() + 200
        while moment == "training" and not (part.exists() and part.read_text().count('"update"') > 2):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.5)  # for the server to be importing; any moment will do
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
        left = [*lines]
        assert process.wait() == 130 and not any("Traceback" in line or "KeyboardInterrupt" in line for line in left)
        assert [line for line in left if line.startswith("interrupted")] == [
            "interrupted: ending run 1/2  round 1/1  pad_longest\n",
            f"interrupted: 0 of 2 runs are finished and kept in {out}; the same command makes the rest\n",
        ]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_what_an_interrupted_comparison_keeps_is_said(tmp_path):
    experiment = load_experiment(write_experiment(tmp_path, repeats=2))
    writer = RunWriter(run_path(tmp_path, 0, "pad_longest"))
    writer.end(End(status="finished"))
    said = what_is_kept(experiment, tmp_path, restart=True)
    assert said == (
        f"interrupted: 1 of 4 runs is finished and kept in {tmp_path}; "
        "the same command without --restart makes the rest"
    )


def test_two_comparisons_in_one_folder_do_not_mix_their_runs(tmp_path):
    path, out = write_experiment(tmp_path), tmp_path / "out"
    out.mkdir()
    with only_run(out), pytest.raises(PacktrainError, match="--out: is in use by another run"):
        run_comparison(path, output_dir=out, say=lambda line: None)
    assert not (out / "manifest.json").exists()


@pytest.mark.ci
@pytest.mark.slow
def test_peers_see_the_same_examples_in_the_same_updates(tmp_path):
    """TRL and transformers, in their own code, lie on packtrain's curve; packing over the epoch doesn't."""
    pytest.importorskip("trl")
    peers = ["trl:padding", "trl:padding_free", "transformers:flattening", "transformers:batch_rebalance"]
    mixers = ["transformers:group_by_length"]
    packers = ["trl:packing_bfd", "trl:packing_wrapped"]
    path = write_experiment(tmp_path, variants=["pad_longest", *peers, *mixers, *packers])
    run_comparison(path, ["training.num_train_epochs=2"], output_dir=tmp_path / "out", say=lambda line: None)
    comparison = read_comparison(tmp_path / "out")
    assert not [row.failure for row in comparison.rows if row.failure]
    reference = comparison.reference
    for name in peers:
        row = comparison.row(name)
        assert row.loss_difference < 1e-4 and row.norm_difference < 1e-4, name
        assert row.updates == reference.updates
        assert row.examples_per_update == reference.examples_per_update
        assert row.held_out == pytest.approx(reference.held_out, rel=1e-4)
    first = [comparison.row(name).learning_runs[0].updates[0].loss for name in ("pad_longest", *mixers, *packers)]
    assert all(abs(loss / first[0] - 1) > 1e-4 for loss in first[1:])  # the control
    mixed = comparison.row("transformers:group_by_length")
    assert mixed.updates == reference.updates and not mixed.keeps_updates
    assert (
        max(mixed.padding_share, comparison.row("transformers:batch_rebalance").padding_share) < reference.padding_share
    )
    assert comparison.row("trl:packing_wrapped").examples_per_update is None
