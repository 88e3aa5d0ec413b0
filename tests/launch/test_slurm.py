"""launch/slurm.sh with stand-ins for SLURM's commands and the launcher, which say what they were given."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from packtrain.training.sealing import begin, seal
from tests.launch.helpers import RECIPE, ROOT

STAND_INS = {
    "python": f'[ "$2" = packtrain.cli.launcher ] || exec "{sys.executable}" "$@"; echo "launched by $$"; echo "$*"',
    "scontrol": "echo host0",
    "srun": 'while [ "${1#-}" != "$1" ]; do shift; done; echo "the task is $$"; exec "$@"',
}


@pytest.fixture
def submitted(tmp_path):
    """Runs the script as SLURM would; what the launcher was given."""
    (tmp_path / "bin").mkdir()
    for name, text in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("unset", str(tmp_path / "unused")))
    slurm = {"SLURM_JOB_NODELIST": "host0", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_NODEID": "0"}

    def submit(restarts: int) -> str:
        done = subprocess.run(
            ["bash", str(ROOT / "launch/slurm.sh"), str(recipe), "--set", f"training.output_dir={tmp_path / 'a run'}"],
            cwd=ROOT,
            env=os.environ | slurm | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
            | ({"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}),
            capture_output=True,
            text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    return submit


def checkpoint(directory: Path, *, sealed: bool) -> None:
    begin(directory)
    (directory / "weights").write_text("dear")
    if sealed:
        seal(directory, {"step": 1, "sealed_at": 0})


def test_a_requeued_job_resumes_once_there_is_a_checkpoint(tmp_path, submitted):
    run = tmp_path / "a run"
    first = submitted(0)
    assert "--num_machines 2 --num_processes 16 --machine_rank 0 --main_process_ip host0" in first
    assert f"-m packtrain train {tmp_path / 'recipe.yaml'} --set training.output_dir={run}\n" in first
    assert "--resume" not in submitted(1)  # requeued before its first checkpoint
    checkpoint(run / "checkpoint-1", sealed=False)
    assert "--resume" not in submitted(1)
    checkpoint(run / "checkpoint-1", sealed=True)
    assert submitted(1).rstrip().endswith(f"--set training.output_dir={run} --resume")
    assert "--resume" not in submitted(0)  # a new job begins anew


def test_its_launcher_is_what_slurm_signals(submitted):
    """SLURM signals the task that srun starts and none of its children; packtrain's launcher sends it on."""
    said = submitted(0)
    assert re.search(r"the task is (\d+)", said)[1] == re.search(r"launched by (\d+)", said)[1]
    assert "#SBATCH --signal=TERM@120\n" in (ROOT / "launch/slurm.sh").read_text()
