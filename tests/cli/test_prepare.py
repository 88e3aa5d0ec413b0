"""`packtrain prepare` tokenises once: it says what is stored and where, and every later verb and rank finds it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from packtrain.cli import main

RECIPE = """
model:
  config: {model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}
  tokenizer_vocab_size: 300
data: {path: rows.jsonl, eval_path: held.jsonl, max_length: 64}
batching: {examples_per_step: 4, max_tokens: 256}
training: {output_dir: out, use_cpu: true, max_steps: 1, save_strategy: "no", report_to: none}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PACKTRAIN_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "rows.jsonl", 20)
    write(tmp_path / "held.jsonl", 5)
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    return tmp_path


def write(path: Path, rows: int) -> None:
    path.write_text("".join(json.dumps({"prompt": f"{n}+1? ", "completion": str(n + 1)}) + "\n" for n in range(rows)))


def said(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    printed = capsys.readouterr()
    assert not ended.value.code, printed.err
    return printed.out


def stored(output: str) -> list[tuple[str, int, int, str]]:
    """Returns (what was done, rows, tokens, where) of every store."""
    lines = re.findall(r"^(tokenised.*): ([\d,]+) rows, ([\d,]+) tokens, [\d.]+ \w+, in (.+)$", output, re.MULTILINE)
    return [(done, int(rows), int(tokens.replace(",", "")), where) for done, rows, tokens, where in lines]


@pytest.mark.ci
@pytest.mark.slow
def test_rows_are_tokenised_once_and_training_finds_them(folder, capsys):
    first = stored(said(capsys, "prepare", "tiny.yaml"))
    assert [(done, rows) for done, rows, *_ in first] == [("tokenised", 20), ("tokenised", 5)]
    for _, _, tokens, where in first:
        assert tokens > 0 and Path(where).parent == folder / "cache" / "tokens"
        assert (Path(where) / "tokens.arrow").exists()
    second = stored(said(capsys, "prepare", "tiny.yaml", "--set", "max_length=32", "--set", "max_tokens=64"))
    assert second == [("tokenised before", *rest) for _, *rest in first]
    times = {path: path.stat().st_mtime_ns for path in (folder / "cache" / "tokens").glob("*/*")}
    out = said(capsys, "train", "tiny.yaml")
    assert times == {path: path.stat().st_mtime_ns for path in (folder / "cache" / "tokens").glob("*/*")}
    assert f"{json.loads((folder / 'out/summary.json').read_text())['data']['rows']} rows" in out
    write(folder / "rows.jsonl", 21)  # control: other rows are tokenised anew
    assert stored(said(capsys, "prepare", "tiny.yaml"))[0][:2] == ("tokenised", 21)


def test_each_source_of_a_mixture_is_stored_apart(folder, capsys):
    mixture = "data.mixture=[{path: rows.jsonl, weight: 1}, {path: held.jsonl, weight: 1}]"
    sets = ["--set", "data.path=null", "--set", "eval_path=null", "--set", mixture]
    assert [rows for _, rows, *_ in stored(said(capsys, "prepare", "tiny.yaml", *sets))] == [20, 5]


def test_what_the_objective_cannot_learn_from_is_said(folder, capsys):
    rows = [{"text": "a b c", "label": n % 2} for n in range(8)] + [{"text": "a"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--set", "eval_path=null", "--set", "objective={name: sequence_classification, label_column: label}"]
    with pytest.raises(SystemExit) as ended:
        main(["prepare", "tiny.yaml", *words])
    assert ended.value.code == 2 and "label" in capsys.readouterr().err
