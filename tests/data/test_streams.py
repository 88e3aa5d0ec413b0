"""Sources read in order: the rows, names and errors of the same files read at once, from any row on, and no further."""

from __future__ import annotations

import gzip
import json
from itertools import islice
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from packtrain.data.report import BadRow
from packtrain.data.sources import open_rows
from packtrain.data.streams import Raw, Source, Tables, _tables_of, open_stream
from packtrain.errors import DataError

ROWS = [{"text": f"row {number}", "more": {"n": number} if number % 2 else {"m": [number]}} for number in range(700)]
LINES = b"".join(b"%s\n%s" % (json.dumps(row).encode(), b"\n \n" if n % 50 == 0 else b"") for n, row in enumerate(ROWS))
TABLE = 'text,more\n"a\nb",1\nc,"2"\n\nd\n' + "".join(f"row {number},{number}\n" for number in range(300))


def write(folder: Path) -> dict[str, str | list[str]]:
    """Writes a source of every kind; returns their paths by name."""
    (folder / "plain.jsonl").write_bytes(LINES)
    (folder / "broken.jsonl").write_bytes(b"\xef\xbb\xbf" + LINES[:-1] + b'\n{"text": \n[1]\n\xff\xfe\xfd')
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(LINES))
    (folder / "lines.json").write_bytes(LINES)
    (folder / "one.jsonl").write_bytes(b'{"text": "alone"}')
    (folder / "table.csv").write_text(TABLE)
    (folder / "table.tsv.gz").write_bytes(gzip.compress(TABLE.replace(",", "\t").replace("\n", "\r\n").encode()))
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet", row_group_size=300)
    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder / "saved"))
    (folder / "shards").mkdir()
    for number in range(3):
        (folder / f"shards/part-{number}.jsonl").write_bytes(LINES[: len(LINES) // (number + 1)])
    names = ("plain.jsonl", "broken.jsonl", "packed.jsonl.gz", "lines.json", "one.jsonl", "table.csv", "table.tsv.gz")
    paths = {name: str(folder / name) for name in (*names, "rows.parquet", "saved", "shards")}
    return paths | {"list": [paths["plain.jsonl"], paths["saved"], paths["table.csv"]], "made": "packtrain:arithmetic"}


def plain(rows) -> list:
    return [str(row) if isinstance(row, BadRow) else row for row in rows]


def without_parser(raw: Raw) -> tuple:
    return raw.where, raw.value, raw.digest


def test_every_source_has_the_rows_and_names_of_one_that_is_counted(tmp_path):
    """From any row on, with the same digests; control: a changed row changes the digests from there on."""
    for name, path in write(tmp_path).items():
        options = {"num_rows": 900} if name in ("made", "list") else {}
        rows, source = open_rows(path, **options), open_stream(path, **options)
        raws = [*source.read()]
        assert plain(raw.row() for raw in raws) == plain(rows.read(0, len(rows))), name
        assert [raw.where for raw in raws] == [rows.where(number) for number in range(len(rows))], name
        for start in (1, 299, 701, len(rows) - 1, len(rows), len(rows) + 5):
            assert [*map(without_parser, source.read(start))] == [*map(without_parser, raws[start:])], (name, start)
    changed = tmp_path / "plain.jsonl"
    before = [raw.digest for raw in open_stream(str(changed)).read()]
    changed.write_bytes(LINES.replace(b"row 500", b"row 5oo"))
    after = [raw.digest for raw in open_stream(str(changed)).read()]
    assert [n for n in range(700) if before[n] != after[n]] == [*range(500, 700)]


def test_a_dataset_of_the_hub_is_read_table_by_table(tmp_path):
    """As `load_dataset(..., streaming=True)` gives it, of files here; a failure on the way is explained."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": str(n)}) + "\n" for n in range(600)))
    loaded = datasets.load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train", streaming=True)
    assert isinstance(loaded, datasets.IterableDataset)
    raws = [*Source([Tables(lambda: _tables_of(loaded), "org/name/train")]).read(400)]
    assert [raw.row() for raw in raws] == [{"text": str(n)} for n in range(400, 600)]
    assert raws[0].where == "org/name/train, row 400"

    def breaks():
        yield pa.table({"text": ["a", "b"]})
        raise ConnectionError("the network is down\nfor good")

    with pytest.raises(
        DataError, match="from row 2 on: cannot be read any further: ConnectionError: the network is down\n"
    ):
        list(Source([Tables(breaks, "org/name/train")]).read())


def bytes_read() -> int:
    """Counts the bytes that this process has read so far, files in the page cache included."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.jsonl.gz"])
def test_no_more_is_read_than_is_asked_for(tmp_path, name):
    """Control: `open_rows` reads the file to its end."""
    if not Path("/proc/self/io").exists():
        pytest.skip("this system does not count the bytes that a process reads")
    line = "text\n" if name == "rows.csv" else ""
    text = (line + "".join(f'{{"text": "{n}"}}\n' if not line else f"{n}\n" for n in range(1_500_000))).encode()
    (tmp_path / name).write_bytes(gzip.compress(text, 1) if name.endswith("gz") else text)
    size = (tmp_path / name).stat().st_size
    before = bytes_read()
    rows = [raw.row() for raw in islice(open_stream(str(tmp_path / name)).read(10), 20)]
    assert rows == [{"text": str(n)} for n in range(10, 30)]
    assert bytes_read() - before < size // 2
    before = bytes_read()
    open_rows(tmp_path / name)
    assert bytes_read() - before >= size


@pytest.mark.parametrize(
    ("name", "contents", "said"),
    [
        ("a.json", b'[{"text": "a"}]', r"a.json: data.streaming: is a JSON array, .* \(got True\)\n    fix: .*jq -c"),
        ("a.jsonl", b'[{"text": "a"},\n{"text": "b"}]', "line 1: data.path: is a JSON array, and every line"),
        ("a.jsonl", b'{\n"text": "a"\n}', "is pretty-printed JSON"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), "UTF-16"),
        ("a.csv", b"a,,b\n1,2,3", "the header has empty or repeated"),
        ("a.csv", b'a,b\n1,2\n3,"4', "line 3: invalid CSV record"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9, mtime=0)[:-9], "cannot be unpacked"),
        ("a.parquet", b"PAR1", "is not a readable Parquet file"),
    ],
)
def test_what_cannot_be_read_in_order_is_an_error(tmp_path, name, contents, said):
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(DataError, match=said):
        list(open_stream(str(tmp_path / name)).read())
