"""The walk of recipes/README.md, from rows to an answer: its files are written and its commands run, one after another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from packtrain.cli import main
from tests.docs.markdown import ROOT, blocks, commands
from tests.docs.test_docs import missing_lines


def run(line: str, capsys) -> tuple[str, bool]:
    """Runs a line of a shell, and returns what it prints and whether it fails; packtrain alone, in this process."""
    if line.startswith("packtrain ") and not set("|>") & set(line):
        (words,) = commands(line)
        with pytest.raises(SystemExit) as ended:
            main(words[1:])
        said = capsys.readouterr()
        return said.out + said.err, bool(ended.value.code)
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    ended = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, env=os.environ | {"PATH": path}, timeout=240
    )
    return ended.stdout + ended.stderr, bool(ended.returncode)


@pytest.mark.ci
@pytest.mark.slow
def test_the_walk_leads_from_rows_to_an_answer(tmp_path, monkeypatch, capsys):
    """Every command ends as the page says and prints what it shows; `...` stands for what differs between machines."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "118")
    monkeypatch.setenv("PACKTRAIN_CACHE", str(tmp_path / "cache"))
    page = blocks((ROOT / "recipes/README.md").read_text(encoding="utf-8"))
    printed, verbs = "", []
    for block in (block for block in page if block.mark.startswith("walk")):
        name = block.mark.partition(": ")[2]
        if name:
            Path(name).write_text(block.code, encoding="utf-8")
        elif block.language == "bash":
            printed = ""
            for line in block.code.replace("\\\n", " ").splitlines():
                said, failed = run(line, capsys)
                assert failed == (block.mark == "walk fails"), (line, said)
                printed, verbs = printed + said, [*verbs, line.split()[1]]
        else:
            assert missing_lines(block.code, printed) == [], f"line {block.line}"
    assert " ".join(verbs) == (
        "rows.py show plan prepare train evaluate generate train merge generate push "
        "train train train evaluate train train compare report report train "
        'train told.py attached.py stock.py compare "What generate answers.jsonl -v show train --show-completion'
    )
    assert {path.suffix for path in Path("figures").iterdir()} >= {".svg", ".png", ".csv", ".tex"}
    evaluations = Path("out/watched/samples.jsonl").read_text().splitlines()
    assert 2 < len(evaluations) < 9, "it stopped before the end"
    summary = json.loads(Path("out/opposites/summary.json").read_text())
    assert summary["held_out_loss_after"] < 0.2 * summary["held_out_loss_before"]


@pytest.mark.ci
@pytest.mark.slow
def test_streamed_rows_are_trained_and_counted_as_the_page_shows(tmp_path, monkeypatch, capsys):
    """The command runs over a trillion rows, and prints what it has read of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "118")
    page = {block.mark: block for block in blocks((ROOT / "recipes/README.md").read_text(encoding="utf-8"))}
    (words,) = commands(page["streamed"].code)
    with pytest.raises(SystemExit) as ended:
        main(words[1:])
    said = capsys.readouterr()
    assert not ended.value.code, said.err
    assert missing_lines(page["streamed: output"].code, said.out) == []
    rows = json.loads(Path("out/quickstart/summary.json").read_text())["data"]["rows"]
    assert 96 <= rows < 300  # of 6 updates of 16 examples, and the block that is read with the last one
