"""Rows that are tokenised already: which columns say what is supervised, and what is wrong with a row.

    input_ids           5 6 7 0        labels, if there are any, have the last word; otherwise a token is
    completion_mask     0 1 1 1        supervised where all masks are 1
    attention_mask      1 1 1 0        padding, which is no part of the document
    becomes             5 6 7,  labels  - 6 7  (- is -100)

`Examples.from_dataset` applies the rule to whole columns, and refuses padded rows; `read_row` applies it to one row, as a
data loader hands it to a collator, and takes off padding at its ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Number
from typing import Any, NamedTuple

import numpy as np

from packtrain.data.formats import IGNORED, MASKS
from packtrain.errors import DataError

PER_TOKEN = ("input_ids", "labels", "attention_mask", *MASKS, "position_ids", "token_type_ids")
_LEAVE_OUT = "leave it out with `dataset.remove_columns({!r})`"


def labels_of(input_ids: np.ndarray, labels: np.ndarray | None, masks: Iterable[np.ndarray]) -> np.ndarray:
    """Returns what is supervised, int64 `[T]`: `labels` themselves, or a copy of the ids, ignored where a mask is 0.

    >>> labels_of(np.array([5, 6, 7]), None, [np.array([0, 1, 1]), np.array([1, 1, 0])])
    array([-100,    6, -100])
    """
    if labels is not None:
        return labels
    labels = input_ids.copy()
    for mask in masks:
        labels[mask == 0] = IGNORED
    return labels


def wrong_values(column: str, values: np.ndarray) -> np.ndarray:
    """Tells which values, integers `[k]`, a column can't have: bool `[k]`. `wrong` says why."""
    if column == "input_ids":
        return values < 0
    if column == "labels":
        return (values < 0) & (values != IGNORED)
    return (values != 0) & (values != 1)


def wrong(column: str) -> str:
    """Says in words what `wrong_values` finds."""
    known = {"input_ids": "a negative id", "labels": f"a negative id other than {IGNORED}"}
    return f"'{column}' contains {known.get(column, 'something other than 0 and 1')}"


def other_length(column: str, entries: int, tokens: int) -> str:
    """Says that a column does not have one entry per token."""
    return f"'{column}' has {entries} entries for {tokens} input_ids"


# ------------------------------------------------------------------------------------- one row, as a collator gets it


class TokenisedRow(NamedTuple):
    """One row: `input_ids` and `labels` int64 `[L]`, without padding, and the columns that are not used."""

    input_ids: np.ndarray
    labels: np.ndarray
    unused: list[str]


def read_row(row: Mapping[str, Any], *, where: str, position_start: int = 0) -> TokenisedRow:
    """Reads a row as a data loader hands it over: lists, arrays or tensors of integers.

    Args:
        row: `input_ids`; `labels`, or the masks `completion_mask` and `assistant_masks`; `attention_mask`, of which zeros
            at the ends are padding. `position_ids`, `token_type_ids` and `seq_lengths` only where they say nothing new
            (positions from `position_start`, zeros, one document). Text and single values are not used; other numbers
            are refused.
        where: the row, for errors.

    Raises:
        DataError: with row, column, value and fix.
    """
    if row.get("input_ids") is None:
        what = f"the row has no 'input_ids', but {', '.join(row) or 'no columns at all'}"
        raise DataError(what, where=where, key="input_ids", fix="tokenise the rows first")
    given = [name for name in PER_TOKEN if row.get(name) is not None]
    if "labels" in given:
        given = [name for name in given if name not in MASKS]
    columns = {name: _integers(name, row[name], where) for name in given}
    length = len(columns["input_ids"])
    if not length:
        raise DataError("'input_ids' is empty", where=where, key="input_ids", value=[], fix="remove the row")
    for name, values in columns.items():
        if len(values) != length:
            what, fix = other_length(name, len(values), length), "give one entry per token"
            raise DataError(what, where=where, key=name, value=values.tolist(), fix=fix)
        if name not in ("position_ids", "token_type_ids") and (bad := wrong_values(name, values)).any():
            value, fix = int(values[bad][0]), "correct or remove the row"
            raise DataError(wrong(name), where=where, key=name, value=value, fix=fix)
    _refuse_other_documents(row, length, where)
    unused = _unused(row, {*given, "seq_lengths", "example_id"} - {"token_type_ids"}, where)
    columns = _without_padding(columns, where)
    _refuse_other_inputs(columns, position_start, where)
    masks = [columns[name] for name in MASKS if name in columns]
    labels = labels_of(columns["input_ids"], columns.get("labels"), masks)
    return TokenisedRow(columns["input_ids"], labels, unused)


def _integers(name: str, value: Any, where: str) -> np.ndarray:
    """Returns a column of a row as int64 `[L]`; booleans count as integers in masks."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError):  # ragged, or a tensor on another device
        array = np.empty((0, 0))
    if array.ndim == 1 and not len(array):
        return np.empty(0, dtype=np.int64)
    if array.ndim != 1 or array.dtype.kind not in ("iu" if name in ("input_ids", "labels") else "iub"):
        what = f"'{name}' must be a flat list of integers"
        if array.size and array.ndim == 1 and array.dtype.kind in "fb":
            what += f", and it has {array.dtype}"
        elif array.ndim != 1 and array.size:
            what += f", and it has the shape {array.shape}"
        shown = value.tolist() if hasattr(value, "tolist") else value
        raise DataError(what, where=where, key=name, value=shown, fix="give one integer per token")
    return array.astype(np.int64, copy=False)


def _without_padding(columns: Mapping[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    """Takes padding off the ends of all columns, and `attention_mask` with it."""
    columns = dict(columns)
    mask = columns.pop("attention_mask", None)
    if mask is None or mask.all():
        return columns
    key, shown = "attention_mask", mask.tolist()
    real = np.flatnonzero(mask)
    if not len(real):
        raise DataError("the row is nothing but padding", where=where, key=key, value=shown, fix="remove the row")
    start, stop = int(real[0]), int(real[-1]) + 1
    if stop - start != len(real):
        what = "'attention_mask' has zeros between real tokens, which is not padding"
        fix = "remove these tokens from the row, or set their attention_mask to 1"
        raise DataError(what, where=where, key=key, value=shown, fix=fix)
    labels = columns.get("labels")
    if labels is not None and (supervised := (labels != IGNORED) & (mask == 0)).any():
        what = f"'labels' supervises {supervised.sum()} tokens that are padding by 'attention_mask'"
        fix = f"set the labels of padding to {IGNORED}, or its attention_mask to 1 where it is to be learnt"
        raise DataError(what, where=where, key="labels", value=labels.tolist(), fix=fix)
    return {name: values[start:stop] for name, values in columns.items()}


def _refuse_other_documents(row: Mapping[str, Any], length: int, where: str) -> None:
    """Refuses `seq_lengths` of several documents, which TRL writes where it has packed them into one row."""
    if row.get("seq_lengths") is None:
        return
    lengths = _integers("seq_lengths", row["seq_lengths"], where).tolist()
    if lengths != [length]:
        what = f"the row is packed already: it holds {len(lengths)} documents"
        fix = "give every document as a row of its own (in TRL, `packing=False`)"
        raise DataError(what, where=where, key="seq_lengths", value=lengths, fix=fix)


def _refuse_other_inputs(columns: Mapping[str, np.ndarray], position_start: int, where: str) -> None:
    """Refuses positions and token types that differ from those the batch will have."""
    positions, types = columns.get("position_ids"), columns.get("token_type_ids")
    if positions is not None and not np.array_equal(positions, np.arange(len(positions)) + position_start):
        what = f"the positions of a row must go up by 1 from {position_start}, as packtrain makes them"
        fix = "give every document as a row of its own, and " + _LEAVE_OUT.format("position_ids")
        raise DataError(what, where=where, key="position_ids", value=positions.tolist(), fix=fix)
    if types is not None and types.any():
        what, fix = "must be 0, because packtrain's batches have no token types", _LEAVE_OUT.format("token_type_ids")
        raise DataError(what, where=where, key="token_type_ids", value=types.tolist(), fix=fix)


def _unused(row: Mapping[str, Any], used: set[str], where: str) -> list[str]:
    """Returns the columns that are not used, and refuses those that a model or a loss would miss."""
    unused = []
    for name, value in row.items():
        if value is None or name in used:
            continue
        if name in ("label", "label_ids"):
            what = "is a label for the whole row, and PackCollator makes one label per token"
            raise DataError(what, where=where, key=name, value=value, fix=_LEAVE_OUT.format(name))
        if name not in PER_TOKEN and _holds_numbers(value):
            what = "is a list of numbers that PackCollator does not know how to lay out"
            shown = value.tolist() if hasattr(value, "tolist") else value
            raise DataError(what, where=where, key=name, value=shown, fix=_LEAVE_OUT.format(name))
        unused.append(name)
    return unused


def _holds_numbers(value: Any) -> bool:
    """Tells whether a value is a list, array or tensor of numbers, however nested; by its first entry."""
    nested = False
    while (isinstance(value, list | tuple) or getattr(value, "ndim", 0)) and len(value):
        value, nested = value[0], True
    return nested and not isinstance(value, str) and (isinstance(value, Number) or hasattr(value, "ndim"))
