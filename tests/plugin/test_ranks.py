"""`attach` on two ranks over gloo: the losses of one stock process, and every example once per epoch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.launch.helpers import launcher, needs_deepspeed
from tests.programs.two_ranks_attach import EXAMPLES

ROOT = Path(__file__).parents[2]
ENV = os.environ | {"OMP_NUM_THREADS": "1"}
CAUSES = (  # why rank 1 refuses, in the order of `one_rank_refuses.HOW`
    "OutOfMemoryError: CUDA out of memory",
    "(its loss raised )?KeyError: 'image'",
    "its loss of a batch is .* with padding and .* without",
    "its own batch raised KeyError: 'image'",
)


def sharded(output_dir: Path, config: str, *words: str) -> list[dict]:
    """Trains on two ranks with a file of launch/, and returns what each wrote."""
    done = subprocess.run(
        [*launcher(config, 2), "-m", "tests.programs.unpadded_shards", str(output_dir), *words],
        cwd=ROOT,
        env=ENV,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((output_dir / f"rank{rank}.json").read_text()) for rank in range(2)]


def run(output_dir: Path, *, ranks: int, what: str) -> list[dict]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "tests.programs.two_ranks_attach", str(output_dir), what],
        cwd=ROOT,
        env=ENV,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((output_dir / f"rank{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.ci
@pytest.mark.slow  # three processes, each of which imports everything
def test_two_attached_ranks_take_the_steps_of_one_stock_trainer(tmp_path):
    (stock,) = run(tmp_path / "stock", ranks=1, what="stock")
    both = run(tmp_path / "attached", ranks=2, what="attached")
    assert len(stock["losses"]) > 0
    np.testing.assert_allclose(both[0]["losses"], stock["losses"], rtol=1e-4)
    every = sorted(list(range(EXAMPLES)) * 2)  # two epochs
    assert sorted(stock["read"]) == every
    assert sorted(both[0]["read"] + both[1]["read"]) == every
    assert both[0]["read"] and both[1]["read"]


@pytest.mark.slow
def test_ranks_of_a_stream_look_for_a_batch_with_padding(tmp_path):
    """Rank 0 deals the batches of a stream out, so all ranks read on together; the first two have no padding."""
    for rank in run(tmp_path, ranks=2, what="streamed"):
        assert rank["padded"] and len(rank["losses"]) == 4


@pytest.mark.slow
def test_two_ranks_without_padding_take_the_steps_of_two_with_it(tmp_path):
    """A classifier, which keeps its own batches."""
    padded, unpadded = (run(tmp_path / what, ranks=2, what=what) for what in ("padded", "unpadded"))
    assert len(padded[0]["losses"]) == 4
    for ours, theirs in zip(unpadded, padded, strict=True):
        for name in ("losses", "norms", "weights"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5)
    assert unpadded[0]["weights"] == unpadded[1]["weights"]


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.timeout(900)  # the first one compiles an extension of DeepSpeed
@pytest.mark.parametrize(
    ("config", "made", "trained"),
    [
        ("zero2", "before", "full"),
        ("zero2", "before", "lora"),
        ("zero3", "before", "full"),
        ("zero3", "before", "lora"),
        ("zero3", "after", "full"),
        ("zero3", "after", "lora"),
    ],
)
def test_shards_without_padding_take_the_steps_of_those_with_it(tmp_path, config, made, trained):
    """Also where ZeRO-3 makes the model in shards, which no rank can run before its engine does."""
    padded, unpadded = (sharded(tmp_path / how, config, how, trained, made) for how in ("padded", "unpadded"))
    assert len(padded[0]["losses"]) == 4
    for ours, theirs in zip(unpadded, padded, strict=True):
        for name in ("losses", "norms"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4)
    assert padded[0]["losses"][0] != padded[0]["losses"][-1]


@pytest.mark.slow
def test_where_one_rank_refuses_the_other_one_does_too(tmp_path):
    """Rank 1 alone cannot collate, runs out of memory, fails or reads padding; control: nothing is wrong."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launcher, "-m", "tests.programs.one_rank_refuses", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    for layout in ("auto", "unpad"):
        hears, refuses = ((tmp_path / f"{layout}{rank}.txt").read_text().split("\n") for rank in range(2))
        assert hears[0] == refuses[0] == "nobody: attached"
        for cause, heard, own in zip(CAUSES, hears[1:], refuses[1:], strict=True):
            assert re.search(f"PacktrainError.*cannot run without padding.*rank 1 has stopped: {cause}", heard)
            assert re.search(cause, own) and "rank 1 has stopped" not in own


DIFFERENT = {  # what is wrong with rank 1 -> what both are told
    "learning_rate": r"learning_rate: 0\.02 on rank 1, 0\.01 on rank 0",
    "save_steps": r"save_steps: 3 on rank 1, 4 on rank 0",
    "max_steps": r"max_steps: 3 on rank 1, 4 on rank 0",
    "rows": r"rows of train_dataset: 28 on rank 1, 29 on rank 0",
    "tokens": r"column 'input_ids' of train_dataset: ",
    "reference": r"weights of ref_model: ",
    "frozen": r"weights by name: ",
    "strategy": r"strategy: padding_free on rank 1, balanced on rank 0",
}


@pytest.mark.ci
@pytest.mark.slow
def test_ranks_that_differ_are_not_attached(tmp_path):
    """Each is told what differs, and its trainer is left as it was; controls: what hosts may have apart."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launcher, "-m", "tests.programs.ranks_that_differ", str(tmp_path)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    both = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for layout in ("auto", "unpad"):
        for told in both:
            assert told[f"{layout} nothing"].startswith("attached") and "other" not in told[f"{layout} nothing"]
            assert told[f"{layout} weights"].startswith("attached")
            for case, said in DIFFERENT.items():
                told_so = told[f"{layout} {case}"]
                assert "the 2 ranks differ" in told_so and re.search(said, told_so), told_so
                assert told_so.count("\n") == 2 or case in ("rows", "tokens"), told_so  # and nothing else
        assert "the ranks have other weights of the model: " in both[0][f"{layout} weights"]
    for told in both:
        assert told["auto nothing"].startswith("attached and trained")
        assert re.search(r"^the 2 ranks differ.*\s+the order of examples, by torch's seed: ", told["auto seed"])
        assert re.search(r"^attached the 2 ranks differ.*\s+the order of examples", told["auto later seed"])
        assert told["unpad seed"].startswith("attached")  # its order is its own
