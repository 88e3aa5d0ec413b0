"""Whatever a row holds, it becomes an example that can be learnt from, or is named with a reason; never a traceback."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packtrain.data.encoder import Encoder
from packtrain.data.formats import FORMATS

_ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),  # half surrogates included
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
_STRING = st.text(max_size=12) | st.sampled_from(["one", " two", "<s>", "</s>", "\n", "<|end|>"])
_MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["system", "developer", "user", "assistant", "tool"]) | _ANYTHING,
        "content": _STRING | _ANYTHING,
        "from": st.sampled_from(["human", "gpt", "system"]) | _ANYTHING,
        "value": _STRING | _ANYTHING,
        "tool_calls": _ANYTHING,
        "function_call": _ANYTHING,
        "reasoning_content": _ANYTHING,
        "weight": st.sampled_from([0, 0.5, 1, 2, True, "0", -1]),
        "train": st.booleans() | _ANYTHING,
    },
)
_COLUMNS = {
    "messages": st.lists(_MESSAGE, max_size=3) | _ANYTHING,
    "conversations": st.lists(_MESSAGE, max_size=3) | _ANYTHING,
    "prompt": _STRING | st.lists(_MESSAGE, max_size=3) | _ANYTHING,
    "completion": _STRING | st.lists(_MESSAGE, max_size=3) | _ANYTHING,
    "chosen": _STRING | st.lists(_MESSAGE, max_size=3) | _ANYTHING,
    "tokens": st.lists(_STRING | _ANYTHING, max_size=4) | _STRING | _ANYTHING,
    "completions": st.lists(_STRING | st.lists(_MESSAGE, max_size=3) | _ANYTHING, max_size=3) | _ANYTHING,
    "rejected": _STRING | st.lists(_MESSAGE, max_size=3) | _ANYTHING,
}
_LIST = st.lists(st.integers(-1, 330), max_size=6) | st.lists(_ANYTHING, max_size=6) | _ANYTHING
_MASK = st.lists(st.integers(0, 1), max_size=6) | _ANYTHING


def _row(format: str) -> st.SearchStrategy[dict]:
    columns = FORMATS[format].columns + FORMATS[format].optional
    tokens = {"input_ids": _LIST, "labels": _LIST, "completion_mask": _MASK, "assistant_masks": _MASK}
    known = _COLUMNS | tokens | {"attention_mask": _MASK}
    return st.fixed_dictionaries({}, optional={name: known.get(name, _STRING | _ANYTHING) for name in columns})


@pytest.mark.parametrize(("format", "kind"), [(name, kind) for name, each in FORMATS.items() for kind in each.kinds])
@pytest.mark.parametrize("mask", ["completion_only", "assistant_only", None])
@settings(max_examples=60)
@given(data=st.data())
def test_any_row_is_an_example_or_named(format, kind, mask, chat_tokenizer, data):
    if format in ("text", "input_ids", "tokens"):
        mask = None
    if kind in ("pair", "answers"):
        mask = "completion_only"
    encoder = Encoder(
        chat_tokenizer,
        format,
        completion_only=mask == "completion_only",
        assistant_only=mask == "assistant_only",
        kind=kind,
    )
    rows = data.draw(st.lists(_row(format), min_size=1, max_size=4))
    found = encoder(rows).to_pylist()
    assert len(found) == len(rows)
    for row in found:
        if row["problem"] is not None:
            assert row["problem"] and row["input_ids"] == [] and row["supervised"] == 0
        else:
            assert len(row["input_ids"]) >= 2 and row["supervised"] >= 1
            for column in {"labels", "learnt"} & set(row):
                assert len(row[column]) == len(row["input_ids"])


def test_good_rows_get_through(chat_tokenizer):
    """The check above is not passed by refusing everything."""
    found = Encoder(chat_tokenizer, "prompt_completion")([{"prompt": "one", "completion": " two"}, {}]).to_pylist()
    assert [row["problem"] is None for row in found] == [True, False]
