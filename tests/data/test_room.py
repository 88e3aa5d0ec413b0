"""A row larger than memory: refused with a reason, and the rows next to it are not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from packtrain.data.encoder import Encoder
from tests.data.helpers import make_tokenizer

BIG = """
import resource, sys
from pathlib import Path
import datasets, psutil
from packtrain.data.examples import build_examples
from packtrain.data.sources import open_rows
from packtrain.errors import DataError
from tests.data.helpers import make_tokenizer

room = psutil.Process().memory_info().vms + (700 << 20)
resource.setrlimit(resource.RLIMIT_AS, (room, room))
given = dict(max_length=16, overflow="truncate", cache_dir=Path(sys.argv[1]).parent / "cache")
rows, tokenizer = open_rows(sys.argv[1]), make_tokenizer()
try:
    build_examples(rows, tokenizer, **given)
except DataError as error:
    print(error)
print("lengths", build_examples(rows, tokenizer, on_bad_row="skip", **given).lengths.tolist())
"""


@pytest.mark.ci
@pytest.mark.slow  # a process that imports everything
def test_a_row_larger_than_memory_is_a_bad_row(tmp_path):
    """Under `ulimit -v`, where the tokenizer would abort the process; control: the rows next to it."""
    rows = ["one two three", "the sum of two numbers " * (1 << 18), "one two three"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    command = [sys.executable, "-c", BIG, str(tmp_path / "rows.jsonl")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    refused, lengths = done.stdout.rsplit("lengths", 1)
    assert "line 2: tokenising its 6,029,312 characters takes about 1.1 GiB of memory, and " in refused, refused
    assert lengths.count(",") == 1


def test_batches_of_long_rows_are_cut_by_size(monkeypatch):
    """And their tokens are those of one call."""
    rows = [{"text": "one two three " * count} for count in (1, 40, 3, 90, 2, 2, 70)]
    encoder = Encoder(make_tokenizer(), "text")
    whole, calls = encoder(rows), []
    monkeypatch.setattr("packtrain.data.encoder._AT_ONCE", 500)
    tokenise = encoder._tokenise
    monkeypatch.setattr(encoder, "_tokenise", lambda drafts: (calls.append(len(drafts)), tokenise(drafts)))
    assert encoder(rows).equals(whole)
    assert len(calls) > 2 and sum(calls) == len(rows)
