"""One cell: a conversation through packtrain with a template and a tokenizer, and what became of it.

text    complete   every string of the row is in the text that the ids spell
        noted      all but reasoning of earlier turns, which the report names
        refused    the row is refused
mask    exact      the learnt tokens, and their factors, are those of the reference (or contain what they must)
trip    whole      decoding the learnt tokens of each turn gives its words, and nothing else but the template's markup
failure            none of these: text is lost, or tokens are wrongly learnt or not, and nobody says so
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerFast

from packtrain.data.encoder import Encoder
from results.templates.reference import (
    Expected,
    Renderer,
    Spans,
    align,
    expect,
    forms,
    merged,
    missing_from,
    tokens_in,
    words_of,
    words_outside,
    written,
)

WARN = "`data.on_lost_content: warn`"
FIX = re.compile(r"`[a-z_.]+(: [a-z]+)?`|leave|rewrite|the chat template leaves out")
EARLIER = "the chat template leaves out the reasoning of earlier turns"


@dataclass
class Cell:
    """What became of one conversation; `failures` says what nobody was told."""

    text: str
    reference: str = ""
    rules: tuple[str, ...] = ()
    problem: str = ""
    tokens: int = 0
    learnt: int = 0
    failures: list[str] = field(default_factory=list)

    def as_dict(self) -> dict:
        return {key: value for key, value in asdict(self).items() if value}


@dataclass
class Encoded:
    """A row of an Encoder's table."""

    ids: list[int]
    factors: np.ndarray
    remarks: list[str]
    problem: str


def encode(tokenizer: PreTrainedTokenizerFast, rows: list[dict], format: str = "messages", **options) -> list[Encoded]:
    """Runs rows through packtrain, and reads its table."""
    found = []
    for row in Encoder(tokenizer, format, **options)(rows).to_pylist():
        factors = np.array(row.get("learnt") or [1] * len(row["input_ids"]), dtype=float)
        runs = row.get("factors") or []
        for start, end, factor in zip(runs[::3], runs[1::3], runs[2::3], strict=True):
            factors[int(start) : int(end)] = factor
        found.append(Encoded(row["input_ids"], factors, (row["remarks"] or "").splitlines(), row["problem"] or ""))
    return found


def judge(tokenizer: PreTrainedTokenizerFast, row: dict, encoded: Encoded, training: str | None) -> Cell:
    """Compares what became of a row with what is right."""
    if encoded.problem:
        return Cell(text="refused", problem=encoded.problem, failures=_of_refusal(encoded.problem))
    given = row.get("tools"), row.get("chat_template_kwargs", {})
    own = Renderer(tokenizer, tokenizer.chat_template, *given)
    other = Renderer(tokenizer, training, *given) if training else None
    for messages in forms(row):
        text = own.render(messages)
        places = None if text is None else align(tokenizer, encoded.ids, text)
        if places is not None:
            break
    else:
        return Cell(text="unlike", failures=["the ids spell no rendering of the row"])
    expected = expect(own, other, messages, text)
    cell = Cell(
        text="complete",
        reference=expected.by,
        rules=expected.rules,
        tokens=len(encoded.ids),
        learnt=int(np.count_nonzero(encoded.factors)),
    )
    _check_text(cell, row, text, encoded.remarks)
    _check_mask(cell, row, text, places, encoded, expected)
    _check_trip(cell, row, tokenizer, encoded, expected)
    return cell


def _of_refusal(problem: str) -> list[str]:
    found = [] if re.search(r"messages\[\d+\]|'\w+'|the tools|none of its", problem) else ["the refusal names no turn"]
    return found + ([] if FIX.search(problem) else ["the refusal names no fix"])


def _check_text(cell: Cell, row: dict, text: str, remarks: list[str]) -> None:
    """Looks for every string of the row in the text."""
    strings, earlier = [], []
    last = max(n for n, message in enumerate(row["messages"]) if message["role"] == "user")
    for number, message in enumerate(row["messages"]):
        for kind, string in words_of(message):
            is_earlier = kind == "reasoning" and number < last
            (earlier if is_earlier and EARLIER in remarks else strings).append(string)
    lost = missing_from(text, strings)
    for tool in row.get("tools") or []:
        function = tool["function"]
        (name, argument), *_ = function["parameters"]["properties"].items()
        lost += missing_from(text, [function["name"], function["description"], name, argument["description"]])
    if any(string not in text for string in earlier):
        cell.text = "noted"
    warned = any("leaves out" in remark and remark != EARLIER for remark in remarks)
    if lost and not warned:
        cell.failures.append(f"not in the text, and nobody says so: {lost}")
    elif warned:
        cell.text = "warned"


def _check_mask(cell: Cell, row: dict, text: str, places: Spans, encoded: Encoded, expected: Expected) -> None:
    """Compares the factors of all tokens with the reference, where it has spans."""
    if expected.spans is None:
        return
    switches = {n: m["weight"] for n, m in enumerate(row["messages"]) if "weight" in m}
    factors = np.zeros(len(places))
    spans = merged(expected.spans) if switches else expected.spans
    turns = {n: text.find(m["content"].strip()) for n, m in enumerate(row["messages"]) if n in switches}
    for span in spans:
        factor = next((switches[n] for n, at in turns.items() if span[0] <= at < span[1]), 1)
        factors = np.maximum(factors, factor * tokens_in([span], text, places))
    wrong = np.flatnonzero(~np.isclose(factors, encoded.factors))
    if len(wrong):
        shown = [text.encode()[slice(*places[n])].decode(errors="replace") for n in wrong[:8].tolist()]
        sign = "learnt" if encoded.factors[wrong[0]] > factors[wrong[0]] else "not learnt"
        cell.failures.append(f"{len(wrong)} tokens wrongly {sign}, by {expected.by}: {shown}")


def _check_trip(
    cell: Cell, row: dict, tokenizer: PreTrainedTokenizerFast, encoded: Encoded, expected: Expected
) -> None:
    """Decodes what is learnt: each turn's words, in order, and no others than the template's own."""
    turns = [m for m in row["messages"] if m["role"] == "assistant" and m.get("weight") != 0]
    on = encoded.factors > 0
    runs = np.split(np.arange(len(on)), np.flatnonzero(np.diff(on)) + 1)
    decoded = [tokenizer.decode([encoded.ids[n] for n in run]) for run in runs if on[run[0]]]
    whole = tokenizer.decode(encoded.ids)
    rest = "\x00".join(decoded)
    for turn in turns:
        for kind, string in dict.fromkeys(words_of(turn)):
            form = next((form for form in written(string) if form in rest), None)
            if form is None:
                if string in whole and not (cell.text in ("noted", "warned") and kind in ("reasoning", "tool call")):
                    cell.failures.append(f"learnt tokens don't decode to {string!r}: {decoded}")
                continue
            rest = rest.replace(form, "\x00", -1 if kind == "tool call" else 1)
    others = [s for m in row["messages"] if m["role"] != "assistant" or m.get("weight") == 0 for _, s in words_of(m)]
    foreign = [s for s in others if s in rest and len(s) > 3 and s not in tokenizer.chat_template]
    structure = "id type function name arguments call00001 call00002"  # of a tool call
    structure += " think" * any("think>" in (turn.get("content") or "") for turn in turns)
    foreign += words_outside(tokenizer.chat_template + structure, rest)
    if foreign:
        cell.failures.append(f"learnt, and none of the turn's words: {foreign}")
