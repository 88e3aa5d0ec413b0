"""A chat template without end, and a row larger than memory: refused with a reason, and the row is named."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from packtrain.data import limits
from packtrain.data.encoder import Encoder
from packtrain.data.examples import build_examples
from packtrain.data.limits import Endless, Limits
from packtrain.data.sources import open_rows
from packtrain.errors import DataError
from tests.data.helpers import CHAT_TEMPLATE, make_tokenizer

ROW = {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}
IF_LONG = "{% if messages[0].content | length > 5 %}"
ENDLESS = {
    "loops over nothing": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "prints": "{% for i in range(99999) %}{% for j in range(99999) %}{{ j }}{% endfor %}{% endfor %}",
    "doubles": "{% set all = namespace(x='ab') %}{% for i in range(60) %}{% set all.x = all.x ~ all.x %}{% endfor %}",
}


@pytest.mark.parametrize("template", ENDLESS)
def test_a_template_without_end_names_itself_and_the_row(template, tmp_path, monkeypatch):
    """In the second row only, so that the first is the control."""
    monkeypatch.setattr(limits, "SECONDS", 60 if template == "doubles" else 0.4)
    monkeypatch.setattr(limits, "BYTES", 1 << 28)
    long = {"messages": [{"role": "user", "content": "one two three"}, ROW["messages"][1]]}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (ROW, long)))
    tokenizer = make_tokenizer(chat_template=IF_LONG + ENDLESS[template] + "{% endif %}" + CHAT_TEMPLATE)
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: .*the chat template takes more than") as refused:
        build_examples(open_rows(tmp_path / "rows.jsonl"), tokenizer, cache_dir=tmp_path / "cache")
    assert "messages[0].content | length" in str(refused.value)
    assert ("GiB" in str(refused.value)) == (template == "doubles")
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    assert len(build_examples(open_rows(tmp_path / "rows.jsonl"), tokenizer, cache_dir=tmp_path / "cache")) == 1


def test_ctrl_c_stays_ctrl_c():
    def interrupted():
        raise KeyboardInterrupt

    with Limits() as limited, pytest.raises(KeyboardInterrupt):
        limited.call(interrupted)


def test_limits_are_of_each_call():
    """Calls that take longer together than one may; control: one that does so by itself. No thread is left."""

    def busy(seconds: float) -> str:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass
        return "done"

    before = threading.active_count()
    with Limits(seconds=0.5) as limited:
        assert [limited.call(busy, 0.2) for _ in range(4)] == ["done"] * 4
        with pytest.raises(Endless, match="seconds"):
            limited.call(busy, 5)
    assert threading.active_count() == before


def test_outside_of_the_main_thread_nothing_is_limited():
    said: list[int] = []

    def encode():
        said.append(len(Encoder(make_tokenizer(chat_template=CHAT_TEMPLATE), "messages")([ROW])))

    thread = threading.Thread(target=encode)
    thread.start()
    thread.join()
    assert said == [1]


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
