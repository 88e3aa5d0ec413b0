"""The GPU study runs to its end without a GPU: every part at tiny shapes, and nothing that goes wrong ends the rest."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import typer.testing
import yaml

from packtrain.compare.results import End, Run, Update
from results.gpu import run as study
from results.gpu import schedule
from results.gpu.page import markdown
from results.gpu.parts import IBM, LOGIT_WAYS, PARTS, SHAPES, WAYS, weights_part
from results.gpu.schedule import CUT_OFF, FAILED, FINISHED, SKIPPED, Part
from results.page import RESULTS

ROOT = RESULTS.parent
PAGE = RESULTS / "gpu" / "README.md"
SLOW = [pytest.mark.ci, pytest.mark.slow]
ABOUT = {"device": "a card", "machine": {"cpu": "some", "cores": 2}, "packages": {"torch": "2"}, "threads": 1}


def part(work: str, *, seconds: float = 60, **arguments: Any) -> Part:
    return Part(name=work, work=f"tests.programs.gpu_parts:{work}", seconds=seconds, arguments=arguments)


def conduct(parts: list[Part], directory: Path, *, seconds: float = 300, weights: Any = weights_part) -> dict[str, Any]:
    """Conduct parts in `directory`, and return what the record says of them."""
    record = schedule.conduct(
        parts,
        out=directory / "out",
        scratch=directory / "scratch",
        ends=time.monotonic() + seconds,
        small=True,
        command="python results/gpu/run.py",
        about=ABOUT,
        weights=weights,
        page=markdown,
        say=lambda line: None,
    )
    assert json.loads((directory / "out" / "bench.json").read_text()) == record
    return record["devices"]["a card"]["parts"]


# ---------------------------------------------------------------------------------------------------- the schedule


@pytest.fixture
def checkout(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.mark.ci
@pytest.mark.slow  # the server of processes imports the libraries
def test_what_goes_wrong_is_a_line_and_the_next_part_begins(tmp_path, checkout):
    pids = tmp_path / "pids"
    parts = [
        part("fail"),
        part("hang", seconds=8, pids=str(pids)),
        part("dawdle", seconds=6),
        part("die"),
        part("missing_function"),
        part("finish", answer=42),
    ]
    conduct([part("finish", server="started")], tmp_path / "first")  # a share is no place for its imports
    found = conduct(parts, tmp_path)
    outcomes = {name: (one["status"], one["reason"], one["found"]) for name, one in found.items()}
    assert outcomes["fail"] == (FAILED, "MemoryError: out of memory: tried to allocate 9 GiB", {"before": 1})
    assert outcomes["hang"] == (CUT_OFF, "killed after 8 s", {"before": 2})
    status, reason, before = outcomes["dawdle"]  # on a busy machine it is killed before it can end by itself
    assert (status, before) == (CUT_OFF, {"before": 3}) and reason in ("after 6 s", "killed after 6 s")
    assert outcomes["die"] == (FAILED, "killed by SIGKILL", {})
    assert outcomes["missing_function"][0] == FAILED and "AttributeError" in outcomes["missing_function"][1]
    assert outcomes["finish"] == (FINISHED, None, {"answer": 42})
    assert not any(map(is_running, pids.read_text().split())), "the hanging part has left a process"
    text = (tmp_path / "out" / "README.md").read_text()
    for name, (status, reason, _) in outcomes.items():
        line = next((line for line in text.splitlines() if line.startswith(f"| {name} | {status} |")), None)
        assert (line is None) == (status == FINISHED), "what failed is a line, and nothing else is"
        assert line is None or reason in line

    before = dict(found)
    found = conduct([part("die"), part("dawdle", seconds=6), part("finish", answer=43), part("finish2")], tmp_path)
    assert found["finish"] == before["finish"], "what has finished is not run again"
    assert found["finish2"]["status"] == FAILED and found["fail"] == before["fail"]


def is_running(pid: str) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "zombie" not in status.read_text()


@pytest.mark.ci
@pytest.mark.slow  # as above
def test_weights_that_cannot_be_made_are_tried_once(tmp_path, checkout):
    """Both parts that need them say so; control: one that needs none runs."""
    tried = tmp_path / "tried"
    making = Part(
        name="weights", work="tests.programs.gpu_parts:fail_noted", seconds=60, arguments={"path": str(tried)}
    )
    needy = [Part(name=name, work="nowhere:nothing", seconds=60, weights="Mistral-7B") for name in ("one", "other")]
    found = conduct([*needy, part("finish")], tmp_path, weights=lambda shape: making)
    assert tried.read_text() == "tried " and found["weights"]["status"] == FAILED
    assert {found[name]["reason"] for name in ("one", "other")} == {"there are no weights for it"}
    assert found["finish"]["status"] == FINISHED


def test_parts_that_were_never_run_come_before_those_that_failed():
    parts = [part(name) for name in ("failed", "finished", "skipped", "cut", "new")]
    statuses = dict(failed=FAILED, finished=FINISHED, skipped=SKIPPED, cut=CUT_OFF)
    outcomes = {name: {"status": status} for name, status in statuses.items()}
    assert [each.name for each in schedule.in_order(parts, outcomes)] == ["skipped", "new", "failed", "cut"]


def test_with_too_little_time_left_a_part_is_skipped(tmp_path):
    """No process is started: these parts would raise. Control of what is kept: a failure stays what it was."""
    failed = {"status": FAILED, "reason": "out of memory", "seconds": 3.0, "found": {}}
    device = {**ABOUT, "commands": [], "parts": {"die": failed}}
    out = tmp_path / "out"
    out.mkdir()
    (out / "bench.json").write_text(json.dumps({"devices": {"a card": device}}))
    lacking = Part(name="lacking", work="nowhere:nothing", seconds=1, needs=("no_such_module",))
    heavy = Part(name="heavy", work="nowhere:nothing", seconds=100, weights="Mistral-7B")
    found = conduct([part("die"), part("finish", seconds=100), lacking, heavy], tmp_path, seconds=20)
    assert found["die"] == failed
    assert found["finish"]["reason"].endswith("s were left, it may take 100")
    assert found["lacking"]["reason"] == "needs no_such_module, which is not installed"
    assert {found[name]["status"] for name in ("finish", "lacking", "heavy")} == {SKIPPED}


def test_devices_stand_next_to_each_other(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    other = {**ABOUT, "commands": ["python results/gpu/run.py"], "parts": {}}
    (out / "bench.json").write_text(json.dumps({"devices": {"another card": other}}))
    conduct([part("finish", seconds=100)], tmp_path, seconds=0)
    record = json.loads((out / "bench.json").read_text())
    assert list(record["devices"]) == ["another card", "a card"] and record["devices"]["another card"] == other


# ---------------------------------------------------------------------------------------------------- the rehearsal


@pytest.mark.slow  # all parts, at tiny shapes
@pytest.mark.timeout(900)
def test_every_part_runs_to_its_end_through_a_kill(tmp_path):
    """Killed in the middle, the record is whole and nothing is left running; a second call goes on."""
    pytest.importorskip("trl")
    out = tmp_path / "out"
    command = [
        sys.executable,
        str(ROOT / "results/gpu/run.py"),
        "--cpu-rehearsal",
        "--minutes",
        "14",
        "--out",
        str(out),
    ]
    command += ["--scratch", str(tmp_path / "scratch")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, cwd=tmp_path)
    file, deadline = out / "bench.json", time.monotonic() + 300
    while not file.exists() or len(parts_of(file)) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = parts_of(file)
    assert 2 <= len(kept) < len(PARTS) and all(one["status"] == FINISHED for one in kept.values())
    while left := [pid for pid in Path("/proc").glob("[0-9]*") if str(tmp_path) in command_of(pid)]:
        assert time.monotonic() < deadline, f"{left} are left"
        time.sleep(0.05)

    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = parts_of(file)
    assert {name: one["reason"] for name, one in found.items() if one["status"] != FINISHED} == {}
    assert {each.name for each in PARTS} | {weights_part(shape).name for shape in SHAPES} == set(found)
    assert {name: found[name] for name in kept} == kept

    record = json.loads(file.read_text())
    text = (out / "README.md").read_text()
    assert (
        text == markdown(record)
        and "figures say nothing about speed" in text
        and str(tmp_path) not in text + str(record)
    )
    shape = "Qwen2.5-0.5B"
    losses = {way: found[f"{shape} {way}"]["found"]["losses"] for way in WAYS}
    for way in ("balanced", "balanced, compiled", "batch_rebalance", "trl:padding", "trl:padding_free"):
        assert losses[way] == pytest.approx(losses["pad_longest"], rel=1e-4), way
    for way in ("dense", "trl:packing_bfd"):  # the control: other updates
        assert losses[way] != pytest.approx(losses["pad_longest"], rel=1e-4), way
    rows = {row: found[f"Mistral-7B LoRA {row}"]["found"] for row in IBM}
    assert rows["padding-free"]["losses"] == pytest.approx(rows["padding"]["losses"], rel=1e-4)
    logits = [found[f"128k vocabulary {name}"]["found"]["losses"] for name in LOGIT_WAYS]
    assert logits[0] == pytest.approx(logits[1], rel=1e-3) and logits[0] == pytest.approx(logits[2], rel=1e-3)
    assert found["equivalence in bf16"]["found"]["ways"]["leaking"]["times rounding"] > 3


def parts_of(file: Path) -> dict[str, Any]:
    (device,) = json.loads(file.read_text())["devices"].values()
    return device["parts"]


def command_of(process: Path) -> str:
    try:
        return (process / "cmdline").read_text()
    except OSError:  # it has just ended
        return ""


@pytest.mark.parametrize(
    ("name", "value", "said"), [("AS_GOOD", 0.0, "as far from float32"), ("LEAKS", 1e9, "rounding only")]
)
def test_equivalence_can_fail(name, value, said, tmp_path, monkeypatch):
    """Control: both sides of the comparison are looked at, and what was measured is kept."""
    from results.gpu import equivalence

    monkeypatch.setattr(equivalence, name, value)
    task = schedule.Task(small=True, scratch=tmp_path, file=tmp_path / "found.json")
    with pytest.raises(AssertionError, match=said):
        equivalence.measure(task)
    assert set(json.loads(task.file.read_text())["found"]["ways"]) == {"pad_longest", "unpad", "balanced", "leaking"}


# -------------------------------------------------------------------------------------------- figures and the page


def test_figures_of_a_run_by_hand():
    from results.gpu.speed import figures

    fields = dict(data_seconds=0.0, forward_seconds=0.1, backward_seconds=0.2, optimizer_seconds=0.1, micro_batches=2)
    fields |= dict(supervised_tokens=90, examples=10, grad_norm=1.0)
    updates = [
        Update(update=n, seconds=s, real_tokens=100, computed_tokens=125, flops=1e14, loss=5.0 - n, **fields)
        for n, s in enumerate([9.0, 0.5, 0.5, 1.0], start=1)
    ]
    end = End(status="finished", peak_memory=2**30, attention="sdpa")
    run = Run(variant="balanced", round=0, updates=updates, held_out=[], end=end)
    found = figures(run, {"warmup_steps": 1, "measure_steps": 4}, "NVIDIA H100 80GB HBM3")
    assert (found["real_tokens_per_second"], found["padding"], found["seconds_median"]) == (
        150,
        pytest.approx(0.2),
        0.5,
    )
    assert found["mfu"] == pytest.approx(3e14 / 2 / 989.5e12) and found["losses"] == [4.0, 3.0, 2.0, 1.0]
    assert found["shares"]["backward"] == pytest.approx(0.3) and found["timed_updates"] == 3
    assert figures(run, {"warmup_steps": 4, "measure_steps": 4}, "cpu") == {"updates": 4}


def test_the_stored_page_says_what_there_is():
    """Without figures of a device it says so, and has none; every part has its seconds."""
    record = json.loads((RESULTS / "gpu" / "bench.json").read_text())
    text = PAGE.read_text()
    assert ("**Nothing was measured on a GPU yet.**" in text) == (record["devices"] == {})
    assert ("tokens/s" in text) == bool(record["devices"])
    assert not any(name.startswith("cpu") for name in record["devices"]), "a rehearsal is no result"
    for each in PARTS:
        assert f"| {each.name} | {each.seconds:.0f} |" in text
    assert len({each.name for each in PARTS}) == len(PARTS)


def test_commands_of_the_page_exist():
    """Options, files and engines of the commands for more than one card."""
    from packtrain.recipe.reader import load_recipe

    text = PAGE.read_text()
    engines = re.search(r"for engine in ([a-z0-9 ]+);", text)[1].split()
    assert engines == ["ddp", "zero2", "zero3", "fsdp2"]
    assert all((ROOT / "launch" / f"{engine}.yaml").exists() for engine in engines)
    assert (ROOT / "launch/deepspeed/zero2.json").exists() and "deepspeed=launch/deepspeed/zero2.json" in text
    settings = ["training.output_dir=x"]
    for strategy in re.search(r"for strategy in ([a-z_ ]+);", text)[1].split():
        recipe = load_recipe(RESULTS / "gpu" / "ranks.yaml", [*settings, f"batching.strategy={strategy}"])
        assert recipe.batching.strategy == strategy
    fields = yaml.safe_load((RESULTS / "gpu" / "ranks.yaml").read_text())["model"]["config"]
    for key, value in SHAPES["Qwen2.5-0.5B"].config.items():
        assert key in ("rope_theta", "rms_norm_eps", "max_position_embeddings") or fields[key] == value
    from results.zero.run import app

    help_text = typer.testing.CliRunner().invoke(app, ["losses", "--help"], env={"COLUMNS": "200"}).output
    assert "--ranks" in help_text and "--out" in help_text
    for line in text.splitlines():
        if line.startswith("python results/gpu/run.py"):
            words = shlex.split(line.partition("#")[0])
            assert words[1] == "results/gpu/run.py" and set(re.findall("--[a-z-]+", line)) <= OPTIONS


OPTIONS = {"--minutes", "--only", "--cpu-rehearsal", "--wheels", "--scratch", "--out"}


@pytest.mark.slow  # pip
def test_wheels_bring_what_is_missing(tmp_path):
    """A package that is there stays as it is, a missing one can be imported; without a network."""
    pytest.importorskip("pip")
    wheels, target = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    for name in ("packtrain_carried", "numpy"):
        with zipfile.ZipFile(wheels / f"{name}-9.9-py3-none-any.whl", "w") as file:
            about = f"{name}-9.9.dist-info"
            file.writestr(f"{name}/__init__.py", "carried = True\n")
            file.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n")
            file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            file.writestr(f"{about}/RECORD", "")
    program = (
        "import sys; from pathlib import Path; from results.gpu.run import install; "
        "install(Path(sys.argv[1]), Path(sys.argv[2])); import numpy, packtrain_carried; "
        "assert packtrain_carried.carried and not hasattr(numpy, 'carried')"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, str(wheels), str(target)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in target.iterdir() if path.name.startswith("numpy")] == []


def test_a_name_that_is_no_part_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "--cpu-rehearsal", "--only", "atention"])
    monkeypatch.setattr(study, "prepare_environment", lambda **given: None)  # of this process
    with pytest.raises(SystemExit, match="there is no part 'atention'; there are: attention kernels, "):
        study.main()


@pytest.mark.slow  # a new interpreter imports the libraries
def test_without_a_device_it_says_what_runs_without_one(tmp_path):
    """The part's fork can't start CUDA, so a new interpreter tries; nothing is written."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a device")
    command = [sys.executable, str(ROOT / "results/gpu/run.py"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    assert "the machine can't be used: " in done.stderr and "--cpu-rehearsal runs everything" in done.stderr
    assert "CUDA" in done.stderr.splitlines()[-1]
