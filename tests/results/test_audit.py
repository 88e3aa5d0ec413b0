"""The sweep: rows as the audit finds them, and one broken architecture that costs its own row only."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from packtrain.modeling.attention.varlen import NAME
from results.audit import run as audit_sweep
from results.audit.run import FIELDS, audit_one, cell, markdown, row, store, stored, sweep

HEADER = {
    "command": "python results/audit/run.py llama bert",
    "machine": {"cpu": "some", "cores": 2},
    "packages": {"torch": "2", "transformers": "5"},
}


@pytest.fixture(scope="module")
def results() -> dict[str, dict]:
    return {name: json.loads(json.dumps(audit_one(name))) for name in ("llama", "bert", "mamba")}  # as stored


def test_rows(results):
    llama, bert, mamba = (row(name, results[name]) for name in ("llama", "bert", "mamba"))
    assert llama[:7] == ["llama", "decoder", "sdpa", "ok", "ok", "ok", "ok"]
    assert llama[7] == "-"  # nothing is padded inside
    assert llama[8].startswith("**leaks** ") and llama[9].startswith("**leaks** ")  # cache, mask of ones
    assert llama[10:] == ["ok", "ok", "2", "", ""]
    assert bert[1] == "encoder" and bert[3].startswith("**leaks** ") and bert[5:7] == ["ok", "ok"]
    assert bert[8] == "-" and bert[-2] == "tail" and "bidirectional" in bert[-1]
    assert mamba[1] == "decoder, recurrent" and mamba[5].startswith("**leaks** ") and "MambaMixer" in mamba[-1]
    assert mamba[-3] == "0" and mamba[7] == "ok"


def test_findings_are_stored_by_column(results):
    finding = dict(zip(FIELDS, results["llama"]["findings"][0], strict=True))
    assert (finding["implementation"], finding["layout"], finding["mode"]) == ("sdpa", "flat", "eval")
    assert finding["verdict"] == "isolated" and finding["sees"] == []
    assert cell(results["bert"], NAME, "positions", "train") == "ok"
    assert cell(results["bert"], NAME, "flat", "cache") == "-"


def test_the_table_says_who_is_repaired_and_who_failed(results):
    text = markdown(HEADER, results | {"broken": {"error": "no tiny model"}})
    assert "isolated by their own attention, given positions that restart: 1\n" in text
    assert f"repaired by `{NAME}` (1): bert\n" in text
    assert "**3 of 3 train flat**" in text and "isolated padded inside (1): mamba\n" in text
    assert "- broken: no tiny model" in text and HEADER["command"] in text


def test_an_interrupted_sweep_continues_but_not_that_of_another_machine(results, tmp_path):
    assert stored(tmp_path, HEADER) == {}
    store(tmp_path, HEADER, results)
    assert stored(tmp_path, HEADER) == results
    assert stored(tmp_path, HEADER | {"packages": {"torch": "3", "transformers": "6"}}) == {}


def test_the_stored_table_is_what_the_stored_findings_say():
    directory = Path(__file__).parents[2] / "results/audit"
    sweep = json.loads((directory / "sweep.json").read_text())
    assert sum("findings" in result for result in sweep["architectures"].values()) >= 40
    assert (directory / "README.md").read_text() == markdown(sweep["header"], sweep["architectures"])


def as_it_is_called(architecture: str) -> dict:
    """Stand in for an audit that goes as the architecture's name says."""
    while architecture == "hangs":
        pass
    if architecture == "dies":
        os._exit(3)
    return {"findings": []}


@pytest.mark.slow  # starts processes that import everything
def test_what_crashes_or_hangs_costs_its_own_row_only():
    found = dict(sweep(["llama", "lama", "bert"], seconds=60))
    assert "findings" in found["llama"] and "findings" in found["bert"]
    assert found["lama"].keys() == {"error"} and "architecture" in found["lama"]["error"]
    found = dict(sweep(["dies", "well"], 60, as_it_is_called))
    assert found == {"dies": {"error": "the process died (exit code 3)"}, "well": {"findings": []}}
    found = dict(sweep(["hangs", "and the next"], 1, as_it_is_called))
    assert found.keys() == {"hangs", "and the next"}
    assert found["hangs"]["error"] in ("not done in 1 s", "no answer in 10 s")  # the latter if it got no processor


def test_the_memory_limit_leaves_room_for_the_libraries():
    assert audit_sweep.MEMORY_LIMIT >= 4 << 30
