"""Lengths are checked at the door."""

from __future__ import annotations

import numpy as np
import pytest

from packtrain.errors import PlanError
from packtrain.packing.lengths import LONGEST, check_lengths, histogram, load_lengths


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([3, -1, 2], "negative"),
        ([1.0, 2.0], "integers, not float64"),
        ([1.0, float("nan")], "integers, not float64"),
        ([True, False], "integers, not bool"),
        (["a"], "integers"),
        ([[1, 2], [3, 4]], "one-dimensional"),
        ([[1, 2], [3]], "flat list"),
        (7, "one-dimensional"),
        ([1, LONGEST + 1], "above"),
        ([10**30], "integers"),
    ],
)
def test_bad_lengths(lengths, message):
    with pytest.raises(PlanError, match=message):
        check_lengths(lengths)


def test_the_error_names_the_example():
    with pytest.raises(PlanError, match=r"example 5000001.*\(got -7\)"):
        check_lengths(np.array([1] * 5_000_001 + [-7], dtype=np.int32))


def test_good_lengths_are_not_copied():
    for dtype in (np.uint8, np.uint16, np.int32, np.int64):
        array = np.array([0, 1, 100], dtype=dtype)
        assert check_lengths(array) is array
    assert check_lengths([]).shape == (0,)


def test_lengths_file(tmp_path):
    np.save(tmp_path / "good.npy", np.array([4, 5], dtype=np.uint16))
    loaded = load_lengths(tmp_path / "good.npy")
    assert isinstance(loaded, np.memmap) and loaded.tolist() == [4, 5]

    np.save(tmp_path / "float.npy", np.array([4.0]))
    np.save(tmp_path / "object.npy", np.array([4, None]), allow_pickle=True)
    np.save(tmp_path / "table.npy", np.ones((2, 2), dtype=int))
    np.savez(tmp_path / "archive.npz", np.ones(2, dtype=int))
    (tmp_path / "text.npy").write_text("12\n13\n")
    (tmp_path / "empty.npy").write_bytes(b"")
    for name in ("float.npy", "object.npy", "table.npy", "archive.npz", "text.npy", "empty.npy", "absent.npy"):
        with pytest.raises(PlanError, match=name):
            load_lengths(tmp_path / name)


def test_histogram():
    assert histogram(np.array([3, 1, 3, 0], dtype=np.uint16)).tolist() == [1, 1, 0, 2]
    assert histogram(np.zeros(0, dtype=np.int64)).tolist() == [0]
