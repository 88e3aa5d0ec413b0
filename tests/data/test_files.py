"""Which files a path stands for: none is lost in silence, and what is read is said."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as BUILDERS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from packtrain.data.examples import build_examples
from packtrain.data.files import find_places
from packtrain.data.sources import open_rows
from packtrain.errors import DataError


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(*names: str) -> None:
    """Writes one row into each file, its name; what is no data file gets it as text."""
    for name in names:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        row = json.dumps({"text": name}).encode() + b"\n"
        path.write_bytes(gzip.compress(row) if name.endswith(".gz") else row)


def read(path, **options) -> list[str]:
    return [row["text"] for row in open_rows(path, **options)]


# --- directories -------------------------------------------------------------------------------------------------


def test_compressed_files_of_a_directory_are_read(folder):
    write("d/a.jsonl", "d/b.jsonl.gz", "d/c/d.JSONL.gz")
    assert read("d") == ["d/a.jsonl", "d/b.jsonl.gz", "d/c/d.JSONL.gz"]


def test_every_file_is_read_or_named(folder):
    write("d/train-0.jsonl", "d/part.jsonl", "d/val.jsonl", "d/test/a.jsonl", "d/notes.txt", "d/old.zip")
    write("d/README.md", "d/LICENSE", "d/.hidden.jsonl", "d/.git/a.jsonl", "elsewhere/a.jsonl")
    os.symlink("nowhere", "d/broken.jsonl")
    os.symlink("../elsewhere", "d/linked")
    (place,) = find_places("d")
    assert place.labels == ["train-0.jsonl"]
    assert dict(place.not_read) == {
        "part.jsonl": "its name says no split, and those of others do",
        "val.jsonl": "split validation",
        "test/a.jsonl": "split test",
        "notes.txt": "not a supported kind of file",
        "old.zip": "not a supported kind of file",
        "broken.jsonl": "a broken link",
        "linked": "a link to a directory, which is not followed",
        "README.md": "hidden or documentation",
        "LICENSE": "hidden or documentation",
        ".hidden.jsonl": "hidden or documentation",
        ".git/a.jsonl": "hidden or documentation",
    }


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.sets(
        st.tuples(
            st.sampled_from(["", "x/", "test/", ".h/"]),
            st.sampled_from(["a", "b", "train-1", "val", "dev_2", "README", ".c"]),
            st.sampled_from([".jsonl", ".jsonl.gz", ".txt", ".md", ""]),
        ).map("".join),
        min_size=1,
    ),
    split=st.sampled_from(["train", "validation", "test"]),
)
def test_no_file_is_lost(names, split, tmp_path_factory):
    folder = tmp_path_factory.mktemp("d")
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    try:
        (place,) = find_places(folder, split)
    except DataError as error:
        assert any(words in str(error) for words in ("no such split", "no data files", "same file twice"))
        return
    named = [*place.labels, *(name for name, _ in place.not_read)]
    assert sorted(named) == sorted(names)


def test_unnamed_files_are_train_where_no_name_says_train(folder):
    write("d/part0.jsonl", "d/part1.jsonl", "d/val.jsonl")
    (place,) = find_places("d")
    assert place.labels == ["part0.jsonl", "part1.jsonl"] and place.not_read == [("val.jsonl", "split validation")]
    assert "part0.jsonl" in place.notes[0] and "read as train" in place.notes[0]
    assert read("d", split="validation") == ["d/val.jsonl"]
    write("d/train.jsonl")
    (place,) = find_places("d")
    assert place.labels == ["train.jsonl"] and not place.notes
    assert ("part0.jsonl", "its name says no split, and those of others do") in place.not_read


def test_the_same_file_plain_and_compressed_is_refused(folder):
    write("d/a.jsonl", "d/a.jsonl.gz")
    with pytest.raises(DataError, match="the same file twice: a.jsonl and a.jsonl.gz"):
        open_rows("d")
    assert read(["d/a.jsonl"]) == ["d/a.jsonl"]  # the fix


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("path", ["d", "d/*.jsonl"])
def test_a_file_that_has_two_names_is_refused(link, path, folder):
    """Its rows would be trained twice, which a list of files refuses, too."""
    write("d/a.jsonl", "d/c.jsonl")
    link(Path("d/a.jsonl").absolute(), "d/b.jsonl")
    with pytest.raises(DataError, match="the same file twice, by a link: (d/)?a.jsonl and (d/)?b.jsonl"):
        open_rows(path)
    Path("d/b.jsonl").unlink()
    assert len(open_rows(path)) == 2  # the control, and the fix


# --- patterns and lists ------------------------------------------------------------------------------------------


def test_a_pattern_reads_what_matches(folder):
    write("d/a.jsonl", "d/b.jsonl.gz", "d/c.csv", "d/e/f.jsonl", "d/notes.txt", "d/val.jsonl", "d/README.md")
    assert read("d/*.jsonl*") == ["d/a.jsonl", "d/b.jsonl.gz", "d/val.jsonl"]
    assert read(f"{folder}/d/**/*.jsonl") == ["d/a.jsonl", "d/e/f.jsonl", "d/val.jsonl"]
    assert open_rows("d/?.jsonl").where(0) == "d/a.jsonl, line 1"
    (place,) = find_places("d/[aenR]*")
    assert place.labels == ["d/a.jsonl"]
    assert {name for name, _ in place.not_read} == {"d/e", "d/notes.txt", "d/README.md"}
    (place,) = find_places("d/*.jsonl")
    assert "d/val.jsonl" in place.notes[0] and "d/a.jsonl" not in place.notes[0]


def test_a_file_that_looks_like_a_pattern_is_a_file(folder):
    write("a[1].jsonl", "a1.jsonl")
    assert read("a[1].jsonl") == ["a[1].jsonl"]


def test_a_list_is_read_in_its_order(folder):
    write("x/a.jsonl", "y/a.jsonl", "z/b.jsonl", "z/a.jsonl", "z/notes.txt")
    rows = open_rows(["y/a.jsonl", "x/*.jsonl", "z/", "packtrain:arithmetic"], num_rows=5)
    assert [rows.where(i) for i in range(5)] == [
        "y/a.jsonl, line 1",
        "x/a.jsonl, line 1",
        "z/a.jsonl, line 1",
        "z/b.jsonl, line 1",
        "packtrain:arithmetic, row 0",
    ]
    assert rows.counts == [(name, 1) for name in ("y/a.jsonl", "x/a.jsonl", "z/a.jsonl", "z/b.jsonl")] + [
        ("packtrain:arithmetic", 1)
    ]
    assert rows.not_read == [("z/notes.txt", "not a supported kind of file")]
    assert len(rows.files) == 4


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("d/*.csv", r"data.path: matches no data file \(got 'd/\*.csv'\)"),
        (["d/a.jsonl", "d/*.csv"], r"matches no data file \(got 'd/\*.csv'\)"),
        (["d/a.jsonl", "d/absent.jsonl"], r"no such file or directory \(got 'd/absent.jsonl'\)"),
        (["d/a.jsonl", "d/a.jsonl"], "names a.jsonl twice"),
        (["d/a.jsonl", "./d/../d/a.jsonl"], "names a.jsonl twice"),
        (["d/*.jsonl", "d/a.jsonl"], r"names a.jsonl twice.*\n.*'d/\*.jsonl' and 'd/a.jsonl'"),
        (["packtrain:arithmetic", "packtrain:arithmetic"], "names packtrain:arithmetic twice"),
        (["org/name", "org/name"], "names org/name twice"),
        ([], "data.path: names no rows"),
        (None, "data.path: names no rows"),
        ("d/*.txt", "matches no data file"),
    ],
)
def test_what_is_not_there_or_there_twice_is_named(path, message, folder):
    write("d/a.jsonl", "d/b.jsonl", "d/notes.txt")
    with pytest.raises(DataError, match=message):
        open_rows(path)


def test_a_pattern_and_a_listed_file_have_only_train(folder):
    write("d/a.jsonl")
    for path in ("d/*.jsonl", ["d/a.jsonl"]):
        with pytest.raises(DataError, match="no such split"):
            open_rows(path, split="test")


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_a_loader_of_datasets_is_no_data(name, folder):
    write("train.json", "train.jsonl")
    with pytest.raises(DataError, match="the name of a loader") as caught:
        open_rows(name)
    assert caught.value.key == "data.path" and "data/train.jsonl" in caught.value.fix
    with pytest.raises(DataError, match="the name of a loader"):
        open_rows(["train.jsonl", name])


def test_a_folder_that_is_called_like_a_loader_is_read(folder):
    write("json/a.jsonl")
    assert read("json") == ["json/a.jsonl"]


# --- what is said ------------------------------------------------------------------------------------------------


def test_the_report_says_what_was_read_and_what_was_not(folder, tokenizer):
    write("d/a.jsonl", "d/b.jsonl", "d/val.jsonl", "d/README.md", "d/notes.txt")
    Path("d/b.jsonl").write_text('{"text": "one"}\n' * 3)
    report = build_examples(open_rows("d", num_rows=3), tokenizer).report
    assert report.lines()[:4] == [
        "read: a.jsonl (1 row), b.jsonl (2 rows)",  # of its three, as num_rows is 3
        "not read (hidden or documentation): 1",
        "not read (not a supported kind of file): notes.txt",
        "not read (split validation): val.jsonl",
    ]
    assert "read as train" in report.lines()[-1]
    assert report.to_dict()["files"] == (("a.jsonl", 1), ("b.jsonl", 2))


def test_many_files_are_summed_up_in_a_line_and_stored_one_by_one(folder, tokenizer):
    write(*(f"d/part-{i}.jsonl" for i in range(9)))
    report = build_examples(open_rows("d"), tokenizer).report
    assert report.lines()[0] == (
        "read 9 files: part-0.jsonl (1 row), part-1.jsonl (1 row), part-2.jsonl (1 row), part-3.jsonl (1 row) and 5 more"
    )
    assert len(report.files) == 9
