"""Rows that disappear, change or move between runs, and rows that no plan foresaw: noticed, or told; never trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import csv
from rich.console import Console

from packtrain.data.examples import build_examples
from packtrain.data.sources import open_rows
from packtrain.errors import CheckpointError, DataError
from packtrain.recipe.reader import load_recipe
from packtrain.training.run import train
from tests.data.helpers import CHAT_TEMPLATE, make_tokenizer
from tests.faults.runs import run, same, start, wait_for, weights, write_recipe

ROWS = [{"prompt": f"What is {n} + {n % 7}?", "completion": f" {n + n % 7}"} for n in range(40)]


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def recipe(tmp_path) -> Path:
    """Of eight updates, each saved, on rows in a file."""
    path = write_recipe(tmp_path)
    write(tmp_path / "rows.jsonl", ROWS)
    path.write_text(path.read_text().replace('"packtrain:arithmetic", num_rows: 60', str(tmp_path / "rows.jsonl")))
    return path


CHANGES = {
    "a row is gone": ROWS[:17] + ROWS[18:],
    "the last row is gone": ROWS[:-1],
    "a row is new": [*ROWS, {"prompt": "new", "completion": " row"}],
    "a row stands twice": [*ROWS, ROWS[3]],
    "two rows have changed places": [ROWS[1], ROWS[0], *ROWS[2:]],
    "one character has changed": [ROWS[0], ROWS[1] | {"completion": " 9"}, *ROWS[2:]],
    "a prompt has become part of its completion": [{"prompt": "What", "completion": " is 0 + 0? 0"}, *ROWS[1:]],
}


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_other_rows_are_another_run(recipe, change):
    loaded = load_recipe(recipe)
    train(loaded)
    write(recipe.with_name("rows.jsonl"), CHANGES[change])
    for allow_changes in (False, True):
        with pytest.raises(
            CheckpointError,
            match=r"(?s)with different settings.*the tokenised examples \(by the changes above, or in the files\): ",
        ):
            train(loaded, resume=True, allow_changes=allow_changes)
    write(recipe.with_name("rows.jsonl"), ROWS)
    console = Console(record=True, width=200)
    train(loaded, resume=True, console=console)  # control
    assert "resuming after step 8" in console.export_text()


@pytest.mark.ci
@pytest.mark.slow
def test_rows_that_change_during_a_run_do_not_reach_it(recipe, tmp_path):
    """It trains on what it has read; whoever resumes it is told."""
    assert run(recipe) == 0
    expected = weights(tmp_path / "run")
    again = write_recipe(tmp_path / "again")
    again.write_text(recipe.read_text().replace(str(tmp_path / "run"), str(tmp_path / "again/run")))
    process = start(again)
    wait_for(process, (tmp_path / "again/run/checkpoint-1/packtrain_manifest.json").exists)
    write(tmp_path / "rows.jsonl", ROWS[:5])
    process.join()
    assert process.exitcode == 0 and same(weights(tmp_path / "again/run"), expected)
    with pytest.raises(CheckpointError, match="with different settings"):
        train(load_recipe(again), resume=True)


MEANWHILE = {
    "other words": lambda text: text.replace("What", "When"),
    "a row is new": lambda text: text + json.dumps(ROWS[0]) + "\n",
    "it is cut": lambda text: text[: len(text) // 2],
}


@pytest.mark.parametrize("change", MEANWHILE)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_a_file_that_changes_while_it_is_tokenised_is_not_stored_as_what_it_was(tmp_path, name, change):
    """Or its tokens would be found under the old contents, by whoever has these again."""
    path, options = tmp_path / name, {"max_length": 64, "cache_dir": tmp_path / "cache"}
    table = pa.Table.from_pylist(ROWS)
    whole = {
        "rows.jsonl": lambda: write(path, ROWS),
        "rows.json": lambda: path.write_text(json.dumps(ROWS)),
        "rows.csv": lambda: csv.write_csv(table, path),
        "rows.parquet": lambda: pq.write_table(table, path, compression="none", use_dictionary=False, row_group_size=9),
    }[name]
    whole()
    rows = open_rows(path)
    path.write_bytes(MEANWHILE[change](path.read_bytes().decode("latin-1")).encode("latin-1"))
    with pytest.raises(DataError, match="changed while its rows were tokenised|damaged Parquet"):
        build_examples(rows, TOKENIZER, **options)
    whole()
    examples = build_examples(open_rows(path), TOKENIZER, **options)  # the control: what is there now
    assert len(examples) == len(ROWS)
    other = build_examples(open_rows(path), TOKENIZER, max_length=64, cache_dir=tmp_path / "another")
    assert examples.fingerprint == other.fingerprint


# ------------------------------------------------------------------------------------------------------ nonsense

TOKENIZER = make_tokenizer(chat_template=CHAT_TEMPLATE)
_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
_keys = st.text(max_size=5) | st.sampled_from(
    [
        "text",
        "prompt",
        "completion",
        "messages",
        "conversations",
        "instruction",
        "input",
        "output",
        "question",
        "answer",
    ]
    + ["input_ids", "labels", "attention_mask", "completion_mask", "tools", "role", "content", "from", "value"]
)
_values = st.recursive(
    _scalars | st.sampled_from(["user", "assistant", "system", "human", "gpt"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_keys, inner, max_size=3),
    max_leaves=8,
)
_rows = st.lists(st.dictionaries(_keys, _values, max_size=4) | _values, min_size=1, max_size=4)


def never_more_than_a_data_error(directory: Path, lines: list[str], on_bad_row: str) -> None:
    path = directory / "nonsense.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    try:
        examples = build_examples(
            open_rows(path), TOKENIZER, max_length=16, overflow="truncate", on_bad_row=on_bad_row, cache_dir=directory
        )
    except DataError as error:
        str(error).encode(errors="surrogatepass")
        return
    assert all(len(examples[i]["input_ids"]) == examples.lengths[i] for i in range(len(examples)))


@pytest.mark.ci
@pytest.mark.slow
@settings(max_examples=60)
@given(rows=_rows, on_bad_row=st.sampled_from(["error", "skip"]))
def test_nonsense_rows(tmp_path, rows, on_bad_row):
    never_more_than_a_data_error(tmp_path, [json.dumps(row) for row in rows], on_bad_row)


@pytest.mark.slow
@pytest.mark.timeout(900)
@settings(max_examples=1500)
@given(
    rows=_rows | st.lists(st.text(max_size=40)), on_bad_row=st.sampled_from(["error", "skip"]), cut=st.integers(0, 60)
)
def test_nonsense_rows_many_of_them_cut(tmp_path, rows, on_bad_row, cut):
    lines = [json.dumps(row, ensure_ascii=cut % 2 == 0) for row in rows]
    never_more_than_a_data_error(tmp_path, [*lines, *(line[:cut] for line in lines)], on_bad_row)
