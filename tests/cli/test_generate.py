"""`packtrain generate`: prompts of a pipe, and a chat in a terminal."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from tests.cli.helpers import run
from tests.data.helpers import make_tokenizer
from tests.tiny import tiny_model


class Input(io.StringIO):
    """Standard input: a terminal, or a pipe."""

    def __init__(self, text: str, *, terminal: bool):
        super().__init__(text)
        self.isatty = lambda: terminal


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    return folder


def test_every_line_of_a_pipe_is_a_prompt_and_only_answers_are_printed(model, monkeypatch, capsys, tmp_path):
    """As with `--prompts`; in a chat the second answer would depend on the first."""
    asked = ["What is 2+2?", "And 東京?"]
    short = ["generate", str(model), "--max-new-tokens", "6"]
    assert run(*short, *(word for text in asked for word in ("--prompt", text))) == 0
    answers = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", Input("\n".join(asked) + "\n\n", terminal=False))
    assert run(*short) == 0
    assert capsys.readouterr().out == answers
    monkeypatch.setattr(sys, "stdin", Input("\n".join(asked), terminal=False))
    assert run(*short, "--out", str(tmp_path / "answers.jsonl")) == 0
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == asked and "Ctrl-D" not in capsys.readouterr().out

    monkeypatch.setattr(sys, "stdin", Input(asked[0], terminal=True))  # control
    assert run(*short) == 0
    assert "Write a message; Ctrl-D ends.\n> " in capsys.readouterr().out


def test_a_pipe_without_prompts_and_a_chat_into_a_file_are_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "stdin", Input("\n", terminal=False))
    assert run("generate", "nowhere") == 2
    assert "standard input is no terminal and holds no prompts" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", Input("", terminal=True))
    assert run("generate", "nowhere", "--out", str(tmp_path / "answers.jsonl")) == 2
    assert "--out: has no effect on a chat" in capsys.readouterr().err
