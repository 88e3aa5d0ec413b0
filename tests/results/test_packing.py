"""The packing benchmark's rows, on a few examples."""

from __future__ import annotations

import json

import numpy as np
import pytest

from results.packing import run as packing
from results.packing.run import bench_balance, bench_packers, bench_scale, main


@pytest.fixture
def sft_like() -> np.ndarray:
    return np.clip(np.random.default_rng(0).lognormal(4.5, 0.9, 2000), 5, 1024).astype(np.int32)


def test_every_packer_is_complete_and_none_beats_the_bound(sft_like):
    rows = {row["packer"]: row for row in bench_packers("few", sft_like, 1024)}
    assert {"packtrain bfd", "packtrain optimal", "TRL bfd"} <= set(rows)
    assert all(row["gap"] >= 0 and row["seconds"] > 0 for row in rows.values())
    assert rows["packtrain optimal"]["packs"] == min(row["packs"] for row in rows.values())
    assert rows["packtrain bfd"]["packs"] < rows["packtrain next_fit"]["packs"]


def test_balance_rows(sft_like):
    rows = {(row["strategy"], row["ranks"]): row for row in bench_balance("few", sft_like, 1024)}
    assert {ranks for _, ranks in rows} == {8, 64}
    assert all(0 < row[key] <= 1 for row in rows.values() for key in ("tokens", "attention", "possible"))
    assert all(row["efficiency"] <= row["possible"] + 1e-9 for row in rows.values())
    assert rows["balanced", 8]["efficiency"] > rows["padding_free", 8]["efficiency"]
    assert rows["balanced", 8]["examples_per_update"] == rows["padding_free", 8]["examples_per_update"]


def test_scale_in_small():
    found = bench_scale(20_000, world_size=4)
    assert found["gap"] >= 0 and found["updates"] == -(-found["packs"] // 16)
    assert found["seconds"].keys() == found["peak_gib"].keys() and max(found["peak_gib"].values()) > 0


def test_files_are_written(tmp_path, sft_like, capsys):
    np.save(tmp_path / "own.npy", sft_like)
    main(["--lengths", str(tmp_path / "own.npy"), "--only", "none", "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out/bench.json").read_text())
    assert list(found["packers"]) == ["own"] and found["packers"]["own"]["machine"]["cores"]
    page = (tmp_path / "out/README.md").read_text()
    assert "packtrain optimal" in page and str(tmp_path) not in page
    main(["--only", "none", "--out", str(tmp_path / "out")])  # what was there is kept
    assert json.loads((tmp_path / "out/bench.json").read_text()) == found


def test_a_peer_that_is_not_installed_is_named_and_its_stored_rows_stay(tmp_path, sft_like, capsys, monkeypatch):
    monkeypatch.setitem(packing.PEERS, "another packer", "no_such_packer")
    np.save(tmp_path / "own.npy", sft_like)
    words = ["--lengths", str(tmp_path / "own.npy"), "--only", "none", "--out", str(tmp_path / "out")]
    main(words)
    assert "left out, as not installed:" in capsys.readouterr().out
    page = (tmp_path / "out/README.md").read_text()
    assert "- own: measured without " in page and "another packer" in page
    stored = json.loads((tmp_path / "out/bench.json").read_text())
    stored["packers"]["own"]["rows"].append(stored["packers"]["own"]["rows"][0] | {"packer": "another packer"})
    stored["packers"]["other"] = stored["packers"]["own"]
    (tmp_path / "out/bench.json").write_text(json.dumps(stored))
    with pytest.raises(SystemExit):
        main(words)
    assert "would be lost (own: another packer)" in capsys.readouterr().err
    assert json.loads((tmp_path / "out/bench.json").read_text()) == stored
