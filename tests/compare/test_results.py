"""The store: what is written comes back, a run is there or it is not."""

from __future__ import annotations

import pytest

from packtrain.compare.results import (
    MANIFEST,
    End,
    RunWriter,
    add_end,
    log_path,
    read_manifest,
    read_run,
    read_runs,
    remove_logs,
    remove_runs,
    run_path,
    slug,
    updates_so_far,
    write_atomically,
)
from packtrain.errors import PacktrainError
from tests.compare.synthetic_runs import make_manifest, make_run, make_update, store


def test_runs_come_back_as_they_were_stored(tmp_path):
    manifest = make_manifest([("pad_longest", "packtrain", True), ("trl:padding", "trl:padding", True)], rounds=2)
    runs = [make_run(name, number, rate=500.0) for number in range(2) for name in ("pad_longest", "trl:padding")]
    store(tmp_path, manifest, runs)
    assert read_manifest(tmp_path) == manifest
    assert read_runs(tmp_path, manifest) == runs
    assert (tmp_path / "runs/01-trl-padding.jsonl").exists()


def test_a_run_is_there_only_when_it_has_ended(tmp_path):
    path = run_path(tmp_path, 0, "balanced")
    writer = RunWriter(path)
    writer.write(make_update(1, seconds=1.0, loss=5.0))
    assert not path.exists()
    writer.end(End(status="finished"))
    assert [update.update for update in read_run(path, round=0, variant="balanced").updates] == [1]


def test_logs_are_removed_with_those_of_the_ranks_and_no_others(tmp_path):
    path, other = (run_path(tmp_path, 0, name) for name in ("balanced", "balanced 4k"))
    path.parent.mkdir(parents=True)
    for log in (log_path(path), log_path(path, 0), log_path(path, 11), log_path(other), log_path(other, 0)):
        log.write_text("said")
    remove_logs(path)
    left = sorted(file.name for file in path.parent.iterdir())
    assert left == ["00-balanced-4k.log", "00-balanced-4k.rank0.log"]
    remove_runs(tmp_path)
    assert not list(path.parent.iterdir())


def test_a_run_whose_process_died_keeps_its_updates(tmp_path):
    path = run_path(tmp_path, 0, "balanced")
    writer = RunWriter(path)
    writer.write(make_update(1, seconds=1.0, loss=5.0))
    with path.with_suffix(".part").open("a") as file:
        file.write('{"kind": "update", "upd')  # the line it died in
    add_end(path, End(status="failed", reason="killed by SIGKILL"))
    run = read_run(path, round=0, variant="balanced")
    assert run.failed and run.end.reason == "killed by SIGKILL"
    assert [update.update for update in run.updates] == [1]


@pytest.mark.parametrize("text", ["not json\n", '{"kind": "other"}\n', '{"kind": "update", "update": 1}\n', ""])
def test_damaged_runs_are_named(tmp_path, text):
    path = run_path(tmp_path, 0, "balanced")
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(PacktrainError, match="00-balanced.jsonl"):
        read_run(path, round=0, variant="balanced")


def test_a_run_edited_by_hand_is_named_with_its_line(tmp_path):
    path = run_path(tmp_path, 0, "balanced")
    writer = RunWriter(path)
    writer.write(make_update(1, seconds=1.0, loss=5.0))
    writer.end(End(status="finished"))
    whole = path.read_text()
    assert read_run(path, round=0, variant="balanced").updates  # control
    for now, message in (('"fast"', "`seconds` is no number: 'fast'"), ("null", "`seconds` is no number")):
        path.write_text(whole.replace('"seconds":1.0', f'"seconds":{now}'))
        with pytest.raises(PacktrainError, match=rf"00-balanced.jsonl:1: .*{message}"):
            read_run(path, round=0, variant="balanced")
    path.write_bytes(whole.encode() + b"\xff\xfe\n")
    with pytest.raises(PacktrainError, match="00-balanced.jsonl:3"):
        read_run(path, round=0, variant="balanced")
    path.unlink()
    path.with_suffix(".part").write_bytes(whole.encode().splitlines()[0] + b'\n{"kind": "of tomorrow"}\n')
    assert len(updates_so_far(path)) == 1


@pytest.mark.parametrize("text", ["{}", "[]", "3", '{"hash": "a"}'])
def test_a_manifest_of_something_else_is_refused(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(PacktrainError, match="contains no comparison"):
        read_manifest(tmp_path)


def test_a_directory_without_an_experiment_is_refused(tmp_path):
    with pytest.raises(PacktrainError, match="packtrain compare"):
        read_manifest(tmp_path)


def test_slugs_are_file_names():
    assert [slug(name) for name in ("trl:padding", "balanced 8k", "my.mod:fn/../x")] == [
        "trl-padding",
        "balanced-8k",
        "my.mod-fn-..-x",
    ]


def test_a_report_that_cannot_be_written_is_our_error(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "report.html", tmp_path):  # below a file, and in the place of a directory
        with pytest.raises(PacktrainError, match="cannot be written"):
            write_atomically(path, "text")
