"""Two ranks over gloo: the same steps as one, every example read once, the same losses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


def run(output_dir: Path, strategy: str, ranks: int) -> list[dict]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "tests.programs.two_ranks", str(output_dir), strategy],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((output_dir / f"rank{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["balanced", "pad_longest"])
def test_two_ranks_do_what_one_does(tmp_path, strategy):
    (alone,) = run(tmp_path / "one", strategy, ranks=1)
    both = run(tmp_path / "two", strategy, ranks=2)
    np.testing.assert_allclose(both[0]["losses"], alone["losses"], rtol=1e-5)
    np.testing.assert_allclose(both[0]["norms"], alone["norms"], rtol=1e-4)
    assert both[0]["epoch"] == alone["epoch"] == 2.0
    for step, ids in enumerate(alone["read"]):
        dealt = both[0]["read"][step] + both[1]["read"][step]
        assert sorted(dealt) == sorted(ids) and len(set(dealt)) == len(dealt)
    first_epoch = [i for ids in alone["read"][: len(alone["read"]) // 2] for i in ids]
    assert sorted(first_epoch) == list(range(60))
