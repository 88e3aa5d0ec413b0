"""A chat template without end is refused with a reason, and the row is named."""

from __future__ import annotations

import json
import signal
import threading
import time

import pytest

from packtrain.data import limits
from packtrain.data.encoder import Encoder
from packtrain.data.examples import build_examples
from packtrain.data.limits import Endless, Limits
from packtrain.data.sources import open_rows
from packtrain.errors import DataError
from tests.data.helpers import CHAT_TEMPLATE, make_tokenizer

ROW = {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}
LONG = {"messages": [{"role": "user", "content": "one two three"}, ROW["messages"][1]]}
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
    monkeypatch.setattr(limits, "BYTES", 1 << 28 if template == "doubles" else limits.BYTES)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (ROW, LONG)))
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
    """Calls that take longer together than one may; control: one that does so by itself. The timer is gone afterwards."""

    def busy(seconds: float) -> str:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass
        return "done"

    before = signal.getsignal(signal.SIGVTALRM)
    with Limits(seconds=0.5) as limited:
        assert [limited.call(busy, 0.2) for _ in range(4)] == ["done"] * 4
        with pytest.raises(Endless, match="seconds"):
            limited.call(busy, 5)
    assert signal.getsignal(signal.SIGVTALRM) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_worker_processes_are_limited(tmp_path, monkeypatch):
    """Where rows are tokenised in several processes."""
    monkeypatch.setattr(limits, "SECONDS", 0.4)
    rows = [ROW] * 1500 + [LONG]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = make_tokenizer(chat_template=IF_LONG + ENDLESS["prints"] + "{% endif %}" + CHAT_TEMPLATE)
    with pytest.raises(DataError, match=r"line 1501: .*the chat template takes more than"):
        build_examples(open_rows(tmp_path / "rows.jsonl"), tokenizer, num_proc=2, cache_dir=tmp_path / "cache")


def test_outside_of_the_main_thread_nothing_is_limited():
    said: list[int] = []

    def encode():
        said.append(len(Encoder(make_tokenizer(chat_template=CHAT_TEMPLATE), "messages")([ROW])))

    thread = threading.Thread(target=encode)
    thread.start()
    thread.join()
    assert said == [1]
