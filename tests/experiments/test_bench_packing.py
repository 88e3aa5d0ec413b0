"""The packing benchmark's rows, on a few examples."""

from __future__ import annotations

import json

import numpy as np
import pytest

from packtrain.experiments.bench_packing import bench_packers, main


@pytest.fixture
def sft_like() -> np.ndarray:
    return np.clip(np.random.default_rng(0).lognormal(4.5, 0.9, 2000), 5, 1024).astype(np.int32)


def test_every_packer_is_complete_and_none_beats_the_bound(sft_like):
    rows = {row["packer"]: row for row in bench_packers("few", sft_like, 1024)}
    assert {"packtrain bfd", "packtrain optimal", "TRL bfd"} <= set(rows)
    assert all(row["gap"] >= 0 and row["seconds"] > 0 for row in rows.values())
    assert rows["packtrain optimal"]["packs"] == min(row["packs"] for row in rows.values())
    assert rows["packtrain bfd"]["packs"] < rows["packtrain next_fit"]["packs"]


def test_files_are_written(tmp_path, sft_like, capsys):
    np.save(tmp_path / "own.npy", sft_like)
    main(["--lengths", str(tmp_path / "own.npy"), "--only", "none", "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out/packing.json").read_text())
    assert {row["data"] for row in found["packers"]} == {"own"} and "cores" in found["machine"]
    page = (tmp_path / "out/README.md").read_text()
    assert "packtrain optimal" in page and str(tmp_path) not in page
