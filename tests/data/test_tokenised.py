"""Tokenised rows as a collator gets them: which columns count, and what is refused."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packtrain.data.examples import Examples
from packtrain.data.tokenised import read_row
from packtrain.errors import DataError

MASKS = ("completion_mask", "assistant_masks")


def reference(row: dict) -> tuple[list[int], list[int]]:
    """The rule of the README, token by token."""
    ids, labels = [], []
    for place, token in enumerate(row["input_ids"]):
        if "attention_mask" in row and row["attention_mask"][place] == 0:
            continue
        ids.append(token)
        if "labels" in row:
            labels.append(row["labels"][place])
        elif all(row[name][place] == 1 for name in MASKS if name in row):
            labels.append(token)
        else:
            labels.append(-100)
    return ids, labels


@st.composite
def rows(draw, padded: bool = True) -> dict:
    """A row of any columns; padding, unlabelled, at one end or both."""
    length = draw(st.integers(1, 6))
    left, right = (draw(st.integers(0, 3)) for _ in range(2)) if padded and draw(st.booleans()) else (0, 0)
    whole = left + length + right

    def entries(values) -> list:
        return draw(st.lists(values, min_size=whole, max_size=whole))

    row = {"input_ids": entries(st.integers(0, 63))}
    real = [left <= place < left + length for place in range(whole)]
    if draw(st.booleans()):
        labels = entries(st.one_of(st.just(-100), st.integers(0, 63)))
        row["labels"] = [label if inside else -100 for label, inside in zip(labels, real, strict=True)]
    for name in MASKS:
        if draw(st.booleans()):
            row[name] = entries(st.integers(0, 1))
    if left or right or draw(st.booleans()):
        row["attention_mask"] = [int(inside) for inside in real]
    return row


@settings(max_examples=300, deadline=None)
@given(rows(), st.sampled_from([list, np.array, torch.tensor]))
def test_a_row_is_read_as_the_rule_says(row, kind):
    read = read_row({name: kind(values) for name, values in row.items()}, where="here")
    assert (read.input_ids.tolist(), read.labels.tolist()) == reference(row)
    assert read.unused == [name for name in MASKS if "labels" in row and name in row]


@settings(max_examples=50, deadline=None)
@given(rows(padded=False))
def test_a_row_is_read_as_a_dataset_is(row):
    read = read_row(row, where="here")
    supervised = (read.labels[1:] != -100).any()  # `from_dataset` refuses rows that teach nothing
    if not supervised:
        with pytest.raises(DataError, match="no supervised token"):
            Examples.from_dataset(datasets.Dataset.from_list([row]))
        return
    (example,) = Examples.from_dataset(datasets.Dataset.from_list([row]))
    assert np.array_equal(example["input_ids"], read.input_ids)
    assert np.array_equal(example["labels"][1:], read.labels[1:]) and example["labels"][0] == -100


IDS = {"input_ids": [5, 6, 7]}
REFUSED = {
    "no ids": ({"text": "one"}, "input_ids", "no 'input_ids', but text"),
    "ids that are text": ({"input_ids": "one"}, "input_ids", "flat list of integers"),
    "nested ids": ({"input_ids": [[1, 2]]}, "input_ids", r"shape \(1, 2\)"),
    "ragged ids": ({"input_ids": [[1, 2], [3]]}, "input_ids", "flat list of integers"),
    "floats": ({"input_ids": [1.0, 2.0]}, "input_ids", "it has float64"),
    "a null": ({"input_ids": [1, None]}, "input_ids", "flat list of integers"),
    "a huge id": ({"input_ids": [1, 2**70]}, "input_ids", "flat list of integers"),
    "an empty row": ({"input_ids": []}, "input_ids", "is empty"),
    "a negative id": ({"input_ids": [1, -5]}, "input_ids", "negative id"),
    "short labels": (IDS | {"labels": [1]}, "labels", "'labels' has 1 entries for 3 input_ids"),
    "one label": (IDS | {"labels": 1}, "labels", "flat list of integers"),
    "a negative label": (IDS | {"labels": [-100, -1, 7]}, "labels", "negative id other than -100"),
    "labels that are floats": (IDS | {"labels": [1.0, 2.0, 3.0]}, "labels", "it has float64"),
    "a short mask": (IDS | {"completion_mask": [1, 1]}, "completion_mask", "has 2 entries for 3"),
    "a long mask": (IDS | {"assistant_masks": [1] * 4}, "assistant_masks", "has 4 entries for 3"),
    "a mask of floats": (IDS | {"completion_mask": [0.0, 1.0, 1.0]}, "completion_mask", "it has float64"),
    "numbered documents": (IDS | {"attention_mask": [1, 1, 2]}, "attention_mask", "other than 0 and 1"),
    "a hole": (IDS | {"attention_mask": [1, 0, 1]}, "attention_mask", "zeros between real tokens"),
    "only padding": (IDS | {"attention_mask": [0, 0, 0]}, "attention_mask", "nothing but padding"),
    "labels on padding": (
        IDS | {"labels": [5, 6, 7], "attention_mask": [1, 1, 0]},
        "labels",
        "supervises 1 tokens that",
    ),
    "packed by TRL": (IDS | {"seq_lengths": [2, 1]}, "seq_lengths", "holds 2 documents"),
    "packed positions": (IDS | {"position_ids": [0, 1, 0]}, "position_ids", "go up by 1 from 0"),
    "token types": (IDS | {"token_type_ids": [0, 1, 1]}, "token_type_ids", "no token types"),
    "weights of tokens": (IDS | {"weight": [0.5, 1.0, 1.0]}, "weight", "list of numbers"),
    "pictures": (IDS | {"pixel_values": torch.zeros(1, 2, 2)}, "pixel_values", "list of numbers"),
    "a class": (IDS | {"label": 1}, "label", "label for the whole row"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_rows(name):
    row, key, message = REFUSED[name]
    with pytest.raises(DataError, match=message) as refused:
        read_row(row, where="row 3 of the batch")
    assert refused.value.key == key and refused.value.where == "row 3 of the batch" and refused.value.fix


@pytest.mark.parametrize(
    ("more", "unused"),
    [
        ({"text": "one", "id": "a7", "length": 3, "score": 0.5, "messages": [{"role": "user"}]}, 5),
        ({"labels": None, "completion_mask": None, "label": None}, 0),
        ({"seq_lengths": [3], "position_ids": [0, 1, 2], "example_id": 4}, 0),
        ({"token_type_ids": [0, 0, 0]}, 1),
    ],
)
def test_columns_that_say_nothing_new_are_left_out(more, unused):
    read = read_row(IDS | more, where="here")
    assert read.labels.tolist() == [5, 6, 7]
    assert len(read.unused) == unused and set(read.unused) <= set(more)


def test_positions_are_those_behind_left_padding():
    row = {"input_ids": [0, 5, 6], "attention_mask": [0, 1, 1], "position_ids": [1, 0, 1]}
    assert read_row(row, where="here").input_ids.tolist() == [5, 6]
    with pytest.raises(DataError, match="go up by 1 from 2"):
        read_row(row, where="here", position_start=2)
