"""Compressed files give the rows, the lines and the errors of plain ones; broken archives are named."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from packtrain.data.compressed import CODECS
from packtrain.data.examples import build_examples
from packtrain.data.report import BadRow
from packtrain.data.sources import open_rows
from packtrain.errors import DataError

COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda raw: pa.Codec("zstd").compress(raw, asbytes=True),
    ".lz4": lambda raw: pa.Codec("lz4").compress(raw, asbytes=True),
}
ROWS = [{"text": "one"}, {"text": "zwei ü"}, {"text": "three"}]
LINES = ('{"text": "one"}\n\n{"text": \n' + json.dumps(ROWS[1]) + "\n").encode()


def parquet(rows: list[dict]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


CONTENTS = {
    "rows.jsonl": LINES,
    "rows.ndjson": LINES,
    "rows.json": json.dumps(ROWS, indent=1).encode(),
    "rows.csv": b'text,n\none,1\n"two\nlines",2\n3\n',
    "rows.tsv": b"text\tn\none\t1\n",
    "rows.parquet": parquet(ROWS),
}


def read(path: Path) -> list[tuple[str, object]]:
    rows = open_rows(path)
    found = [str(row) if isinstance(row, BadRow) else row for row in rows.read(0, len(rows))]
    return [(rows.where(i).removeprefix(path.name), row) for i, row in enumerate(found)]


def test_every_codec_is_tried():
    assert COMPRESS.keys() == CODECS.keys()


@pytest.mark.parametrize("suffix", CODECS)
@pytest.mark.parametrize("name", CONTENTS)
def test_rows_places_and_reasons_are_those_of_the_plain_file(name, suffix, tmp_path):
    plain, packed = tmp_path / name, tmp_path / (name + suffix)
    plain.write_bytes(CONTENTS[name])
    packed.write_bytes(COMPRESS[suffix](CONTENTS[name]))
    assert read(packed) == read(plain)
    assert open_rows(packed).fingerprint == open_rows(plain).fingerprint  # nothing is tokenised twice
    assert open_rows(packed).where(0).startswith(packed.name)


def test_archives_end_to_end_are_one_file(tmp_path):
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n') + gzip.compress(b'{"text": "two"}\n'))
    assert [row["text"] for row in open_rows(tmp_path / "rows.jsonl.gz")] == ["one", "two"]


@pytest.mark.parametrize("suffix", CODECS)
@pytest.mark.parametrize("damage", ["cut", "other contents", "something behind it"])
def test_a_broken_archive_is_named(damage, suffix, tmp_path, cache_dir):
    whole = COMPRESS[suffix](LINES * 1000)
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes({"cut": whole[: len(whole) // 2], "other contents": LINES}.get(damage, whole + b"something"))
    with pytest.raises(DataError, match=rf"rows.jsonl{suffix}: cannot be unpacked") as caught:
        open_rows(path)
    assert f"no {suffix} file" in caught.value.fix
    assert list((cache_dir / "unpacked").glob("*")) == []  # nothing that a second try would take for whole
    path.write_bytes(whole)
    assert len(open_rows(path)) == 3000  # control


def test_a_changed_file_is_unpacked_again(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    for text in ("one", "two"):  # of one length: sizes are equal
        path.write_bytes(gzip.compress(json.dumps({"text": text}).encode(), mtime=0))
        os.utime(path, ns=(0, 1))  # as after a copy that keeps times
        assert list(open_rows(path)) == [{"text": text}]


@pytest.mark.parametrize(
    "damage", ["cut between rows", "another row", "emptied", "its note is gone", "its note is no note"]
)
def test_a_file_that_was_damaged_in_the_cache_is_unpacked_again(damage, tmp_path, cache_dir):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    before = list(open_rows(path))
    (note,) = (cache_dir / "unpacked").glob("*.json")
    target = note.with_suffix("")
    whole = target.read_bytes()
    if damage.startswith("its note"):
        note.unlink() if damage.endswith("gone") else note.write_text("{")
        target.write_bytes(whole.replace(b"one", b"six"))
    else:
        cut = whole[: len(whole) // 2]
        target.write_bytes({"cut between rows": cut, "emptied": b""}.get(damage, whole.replace(b"one", b"six")))
    assert list(open_rows(path)) == before and target.read_bytes() == whole


def test_the_streams_of_an_xz_file_are_read_to_the_last(tmp_path):
    """With padding between them, as the format allows; what is behind them and no stream is refused."""
    path, rows = tmp_path / "rows.jsonl.xz", [lzma.compress(json.dumps(row).encode() + b"\n") for row in ROWS]
    path.write_bytes(rows[0] + rows[1] + bytes(8) + rows[2] + bytes(4))
    assert list(open_rows(path)) == ROWS
    damaged = bytearray(rows[1])
    damaged[0] ^= 1
    path.write_bytes(rows[0] + bytes(damaged))
    with pytest.raises(DataError, match="cannot be unpacked"):
        open_rows(path)


def test_an_archive_is_unpacked_once_and_may_be_removed_from_the_cache(tmp_path, cache_dir, tokenizer):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "one two"}\n'))
    open_rows(path)
    (unpacked,) = (path for path in (cache_dir / "unpacked").iterdir() if not path.suffix)
    first = unpacked.stat().st_mtime_ns
    open_rows(path)
    assert unpacked.stat().st_mtime_ns == first
    unpacked.unlink()
    assert len(build_examples(open_rows(path), tokenizer)) == 1


def test_a_cache_that_cannot_be_written_is_not_the_archives_fault(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "one"}\n'))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PACKTRAIN_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="cannot unpack rows.jsonl.gz into the cache") as caught:
        open_rows(path)
    assert "PACKTRAIN_CACHE" in caught.value.fix
