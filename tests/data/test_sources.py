"""Files, directories, saved datasets: rows come back as they were written, and broken ones are named."""

from __future__ import annotations

import csv
import io
import json
import pickle
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packtrain.data.examples import build_examples
from packtrain.data.report import BadRow
from packtrain.data.sources import CORPUS_ROWS, open_rows, texts
from packtrain.errors import DataError

ROWS = [{"text": "one", "n": 1}, {"text": "zwei ü", "n": 2}, {"text": "three\nlines\r\n", "n": 3}]


def _write_csv(path: Path, rows: list[dict], **options) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], **options)
        writer.writeheader()
        writer.writerows(rows)


WRITERS = {
    "rows.jsonl": lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in ROWS)),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS, ensure_ascii=False, indent=2), encoding="utf-8"),
    "lines.json": lambda path: path.write_text("\n".join(json.dumps(row) for row in ROWS)),
    "rows.csv": lambda path: _write_csv(path, ROWS),
    "rows.tsv": lambda path: _write_csv(path, ROWS, delimiter="\t"),
    "rows.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=2),
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_rows_come_back(name, tmp_path):
    WRITERS[name](tmp_path / name)
    rows = open_rows(tmp_path / name)
    expected = [row | {"n": str(row["n"])} for row in ROWS] if name.endswith("sv") else ROWS  # CSV knows only text
    assert list(rows) == expected
    assert [rows[i] for i in range(len(rows))] == expected
    assert rows.columns == ["text", "n"]
    assert pickle.loads(pickle.dumps(rows)).read(1, 3) == expected[1:]
    assert list(open_rows(tmp_path / name, num_rows=2)) == expected[:2]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rows.jsonl", "rows.jsonl, line 3"),
        ("rows.json", "rows.json, line 10"),  # the line of its brace
        ("rows.csv", "rows.csv, line 4"),
        ("rows.parquet", "rows.parquet, row 2"),
        ("saved", "saved, row 2"),
    ],
)
def test_where(name, expected, tmp_path):
    WRITERS[name](tmp_path / name)
    assert open_rows(tmp_path / name).where(2) == expected


def test_fingerprint_is_of_the_contents(tmp_path):
    first, copy = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for path in (first, copy):
        WRITERS["rows.jsonl"](path)
    assert open_rows(first).fingerprint == open_rows(copy).fingerprint
    assert open_rows(first).fingerprint != open_rows(first, num_rows=2).fingerprint
    copy.write_text(copy.read_text().replace("three", "thre3"))
    assert open_rows(first).fingerprint != open_rows(copy).fingerprint


# --- broken rows -------------------------------------------------------------------------------------------------


def reasons(path: Path) -> dict[str, str]:
    rows = open_rows(path)
    return {rows.where(i): str(row) for i, row in enumerate(rows.read(0, len(rows))) if isinstance(row, BadRow)}


def test_jsonl_keeps_mixed_types_apart_and_names_broken_lines(write_rows):
    path = write_rows(
        {"text": "one"}, {"text": 2}, {"text": None}, "", "{", b'{"text": "\xff"}', "\r", {"other": [1, "a"]}
    )
    rows = open_rows(path)
    assert [row for row in rows.read(0, 99) if not isinstance(row, BadRow)] == [
        {"text": "one"},
        {"text": 2},
        {"text": None},
        {"other": [1, "a"]},
    ]
    assert rows.columns == ["text", "other"]
    assert reasons(path) == {
        "rows.jsonl, line 5": "invalid JSON: Expecting property name enclosed in double quotes at column 2",
        "rows.jsonl, line 6": "invalid UTF-8 at byte 10 of the row",
    }
    assert rows.where(5) == "rows.jsonl, line 8"
    with pytest.raises(DataError, match="rows.jsonl, line 5: invalid JSON"):
        list(rows)
    with pytest.raises(IndexError):
        rows[6]


def test_windows_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}')
    assert list(open_rows(path)) == [{"text": "one"}, {"text": "two"}]
    path = tmp_path / "rows.csv"
    path.write_bytes(b'\xef\xbb\xbftext,n\r\n"a\r\nb",1\r\n')
    assert list(open_rows(path)) == [{"text": "a\r\nb", "n": "1"}]


def test_csv_names_rows_of_another_width_and_invalid_utf8(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b'a,b\n1,2\n"x\ny",2\n1\n\n1,2,3\n\xe9,2\n1,2\n')
    assert reasons(path) == {
        "rows.csv, line 5": "has 1 fields, and the header names 2",
        "rows.csv, line 7": "has 3 fields, and the header names 2",
        "rows.csv, line 8": "invalid UTF-8 at byte 0 of the row",
    }
    assert len(open_rows(path)) == 6


def test_parquet_names_invalid_utf8(tmp_path):
    broken = pa.StringArray.from_buffers(3, pa.py_buffer(np.array([0, 1, 2, 3], np.int32)), pa.py_buffer(b"a\xffb"))
    pq.write_table(pa.table({"text": broken}), tmp_path / "rows.parquet")
    assert reasons(tmp_path / "rows.parquet") == {"rows.parquet, row 1": "invalid UTF-8 at byte 0 of a column"}


def _calls(arguments: dict) -> dict:
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    tool = {"name": "add", "parameters": {"required": sorted(arguments), "properties": arguments}}
    return {"messages": [{"role": "assistant", "tool_calls": [call]}], "tools": [tool]}


CALLS = [_calls({"x": 1}), _calls({"y": [2, 3]}), {"messages": [], "tools": None}]


@pytest.mark.parametrize("name", ["rows.parquet", "saved"])
def test_a_table_gives_back_the_keys_that_each_row_had(name, tmp_path):
    """Arrow has one type for all rows of a column, and nulls where a row lacks what another has."""
    table = pa.Table.from_pylist(CALLS)
    assert table.to_pylist() != CALLS, "control: so it is"
    if name == "saved":
        datasets.Dataset(table).save_to_disk(tmp_path / name)
    else:
        pq.write_table(table, tmp_path / name)
    assert list(open_rows(tmp_path / name)) == CALLS


def test_a_table_keeps_nulls_of_columns_and_of_lists(tmp_path):
    rows = [{"text": None, "n": [1, None], "turns": [{"a": [None, "b"]}, None]}, {"text": "one", "n": [2], "turns": []}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert list(open_rows(tmp_path / "rows.parquet")) == rows


def test_nulls_that_were_written_down_stay(write_rows):
    row = _calls({"x": None})
    assert list(open_rows(write_rows(row))) == [row]


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("rows.json", b'[{"a": 1}, {"a": }]', "rows.json, line 1: invalid JSON array: Expecting value"),
        ("rows.json", b'[{"a": 1},\n {"a": 2}', r"rows.json, line 2: invalid JSON array: expected ',' or '\]'"),
        ("rows.json", b'[{"a": 1}] {}', "unexpected text after its end"),
        ("rows.json", b'[{"a":\n "\xff"}]', "rows.json, line 2: invalid UTF-8 at byte 9"),
        ("rows.json", b'{\n"a": 1\n}', "rows.json, line 1: data.path: is pretty-printed JSON"),
        ("rows.csv", b'a,b\n"1,2\n3,4\n', "rows.csv, line 2: invalid CSV record"),
        ("rows.csv", b"a,,b\n1,2,3\n", "the header has empty or repeated column names"),
        ("rows.csv", b"a,a\n1,2\n", "the header has empty or repeated column names"),
        ("rows.csv", b"a,b\n", "contains no rows"),
        ("rows.csv", b"", "the header has empty or repeated column names"),
        ("rows.jsonl", b"\n\n", "contains no rows"),
        ("rows.jsonl", b"\xff\n\xfe\n", "none of the first 2 rows can be read: invalid UTF-8"),
        ("rows.parquet", b"PAR1 not", "not a readable Parquet file"),
        ("rows.xlsx", b"PK", "is not a supported kind of file"),
    ],
)
def test_file_that_cannot_be_read(name, contents, message, tmp_path):
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(DataError, match=message):
        open_rows(tmp_path / name)


# --- which file, which split -------------------------------------------------------------------------------------


def test_directory_by_split(tmp_path):
    for number, name in enumerate(["data/train-0001.jsonl", "data/train-0000.jsonl", "test/part.jsonl", "val.jsonl"]):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"n": number}) + "\n")
    (tmp_path / "README.md").write_text("not data")
    assert [row["n"] for row in open_rows(tmp_path)] == [1, 0]  # in order of their names
    assert open_rows(tmp_path).where(1) == "data/train-0001.jsonl, line 1"
    assert [row["n"] for row in open_rows(tmp_path, split="test")] == [2]
    assert [row["n"] for row in open_rows(tmp_path, split="validation")] == [3]
    with pytest.raises(DataError, match="no such split.*\n.*test, train, validation"):
        open_rows(tmp_path, split="extra")


def test_directory_without_split_names_is_train(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"text": "one"}\n')
    assert len(open_rows(tmp_path)) == 2
    with pytest.raises(DataError, match="no such split"):
        open_rows(tmp_path, split="test")
    (tmp_path / "c.csv").write_text("text\none\n")
    with pytest.raises(DataError, match="several kinds of files: .csv, .jsonl"):
        open_rows(tmp_path)


def test_saved_dataset_dict(tmp_path):
    parts = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert len(open_rows(tmp_path / "saved")) == 3 and len(open_rows(tmp_path / "saved", split="test")) == 1
    assert open_rows(tmp_path / "saved", split="test").where(0) == "saved/test, row 0"
    with pytest.raises(DataError, match="no such split.*\n.*train, test"):
        open_rows(tmp_path / "saved", split="validation")


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("nowhere/rows.jsonl", {}, "no such file"),
        ("../nowhere", {}, "no such file"),
        ("rows.csv", {}, "no such file"),
        ("no-such-owner-here/no-such-dataset", {}, "cannot be loaded"),
        ("packtrain:arithmetic", {"split": "dev"}, "no such split.*\n.*train, test"),
    ],
)
def test_nothing_of_that_name(path, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        open_rows(path, **options)


def test_a_file_has_only_train(write_rows):
    with pytest.raises(DataError, match="no such split"):
        open_rows(write_rows({"text": "one"}), split="test")


def test_directory_without_data(tmp_path):
    with pytest.raises(DataError, match="no data files"):
        open_rows(tmp_path)


# --- round trips -------------------------------------------------------------------------------------------------

_TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=5,
)
_OBJECTS = st.lists(st.dictionaries(_TEXT, _VALUE, max_size=3), min_size=1, max_size=6)


@settings(max_examples=60)
@given(rows=_OBJECTS, ascii=st.booleans(), indent=st.sampled_from([None, 0, 3]))
def test_json_round_trip(rows, ascii, indent, tmp_path):
    lines, array = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    lines.write_text("".join(json.dumps(row, ensure_ascii=ascii) + "\n" for row in rows), encoding="utf-8", newline="")
    array.write_text(json.dumps(rows, ensure_ascii=ascii, indent=indent), encoding="utf-8", newline="")
    assert list(open_rows(lines)) == rows
    assert list(open_rows(array)) == rows


@settings(max_examples=60)
@given(rows=st.lists(st.tuples(_TEXT, _TEXT), min_size=1, max_size=6), end=st.sampled_from(["\n", "\r\n"]))
def test_csv_round_trip(rows, end, tmp_path):
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=end, quoting=csv.QUOTE_ALL).writerows([["a", "b"], *rows])
    (tmp_path / "rows.csv").write_bytes(text.getvalue().encode())
    assert [(row["a"], row["b"]) for row in open_rows(tmp_path / "rows.csv")] == rows


@settings(max_examples=60)
@given(contents=st.binary(max_size=200), suffix=st.sampled_from(["jsonl", "json", "csv", "tsv", "parquet"]))
def test_any_bytes_give_rows_or_our_error(contents, suffix, tmp_path):
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(contents)
    try:
        rows = open_rows(path)
    except DataError:
        return
    assert all(isinstance(row, dict | BadRow) for row in rows.read(0, len(rows)))


@pytest.fixture
def write_lines(tmp_path):
    def write(*lines: str) -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(line + "\n" for line in lines))
        return path

    return write


def test_lines_of_blanks_are_skipped_and_counted(write_lines, tokenizer):
    path = write_lines('{"text": "one"}', "", "   ", "\t ", '{"text": "two"}', "")
    rows = open_rows(path)
    assert [row["text"] for row in rows] == ["one", "two"] and rows.where(1) == "rows.jsonl, line 5"
    examples = build_examples(rows, tokenizer)
    assert "rows.jsonl: skipped 4 empty lines" in examples.report.notes
    whole = write_lines('{"text": "one"}', '{"text": "two"}')
    assert build_examples(open_rows(whole), tokenizer).report.notes == ()


def test_a_key_that_stands_twice_is_a_bad_row(write_lines):
    path = write_lines(
        '{"text": "one"}', '{"text": "one", "text": "two"}', '{"messages": [{"role": "a", "role": "b"}]}'
    )
    assert [str(row) for row in open_rows(path).read(1, 3)] == [
        "contains the key 'text' twice",
        "contains the key 'role' twice",
    ]


@pytest.mark.parametrize(
    ("lines", "what", "fix"),
    [
        (["{", '  "text": "one"', "}"], "is pretty-printed JSON", "jq -c"),
        (['[{"text": "one"},', '{"text": "two"}]'], "is a JSON array", r"rename the file to \.json"),
    ],
)
def test_json_that_is_not_in_lines_is_called_by_its_name(write_lines, lines, what, fix):
    with pytest.raises(DataError, match=f"(?s)rows.jsonl, line 1: data.path: {what}.*{fix}"):
        open_rows(write_lines(*lines))
    assert len(open_rows(write_lines('{"text": "one"}', '{"text": "two"}'))) == 2


def test_the_index_of_pandas_is_called_by_its_name(tmp_path, tokenizer):
    path = tmp_path / "rows.csv"
    path.write_text(",text\n0,one\n1,two\n")
    with pytest.raises(DataError, match=r"(?s)pandas writes its index so.*index=False"):
        open_rows(path)
    path.write_text("Unnamed: 0,text\n0,one\n1,two\n")
    assert "columns not used: Unnamed: 0 (pandas' index)" in build_examples(open_rows(path), tokenizer).report.notes


def test_a_tokenizer_is_trained_on_the_first_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": str(number)}) + "\n" for number in range(CORPUS_ROWS + 5)))
    found = list(texts(open_rows(path)))
    assert (len(found), found[0], found[-1]) == (CORPUS_ROWS, "0", str(CORPUS_ROWS - 1))
