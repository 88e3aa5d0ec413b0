"""Reading examples: `gather` equals reading row by row, views and pickles keep what they stand for."""

from __future__ import annotations

import dataclasses
import multiprocessing
import pickle
import tracemalloc

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packtrain.data.examples import Examples, build_examples
from packtrain.data.sources import open_rows
from packtrain.data.tokens import ListColumn
from packtrain.errors import DataError

ROWS = [{"prompt": "one " * n, "completion": "two " * m} for n, m in [(1, 3), (5, 1), (2, 2), (9, 4), (1, 1), (3, 7)]]


@pytest.fixture
def examples(build, tokenizer) -> Examples:
    return build(ROWS, tokenizer)


def test_gather_lays_documents_end_to_end(build, tokenizer):
    examples = build(
        [
            {"input_ids": [5, 6, 7]},
            {"input_ids": [8, 9]},
            {"input_ids": [10, 11, 12, 13], "labels": [-100, 20, -100, 21]},
        ],
        tokenizer,
    )
    ids, labels = examples.gather([2, 0])
    assert ids.tolist() == [10, 11, 12, 13, 5, 6, 7]
    assert labels.tolist() == [-100, 20, -100, 21, -100, 6, 7]
    assert ids.dtype == labels.dtype == np.int64

    ids, labels = examples.gather(np.array([2, 2, 1]), starts=np.array([0, 2, 1]), stops=np.array([2, 4, 2]))
    assert ids.tolist() == [10, 11, 12, 13, 9]
    assert labels.tolist() == [-100, 20, -100, 21, -100]  # the first label of every piece is blank

    for nothing in (examples.gather([]), examples.gather([1], np.array([1]), np.array([1]))):
        assert [part.tolist() for part in nothing] == [[], []]


@pytest.mark.parametrize(("starts", "stops"), [([-1], [2]), ([0], [3]), ([2], [1])])
def test_gather_stays_inside_the_example(starts, stops, build, tokenizer):
    examples = build([{"input_ids": [5, 6]}, {"input_ids": [7, 8]}], tokenizer)
    with pytest.raises(AssertionError):
        examples.gather([0], np.array(starts), np.array(stops))


_DOCUMENTS = st.lists(st.lists(st.integers(0, 2**31 - 1), min_size=2, max_size=9), min_size=1, max_size=12)


@settings(max_examples=60)
@given(data=st.data(), documents=_DOCUMENTS, large=st.booleans())
def test_gather_equals_reading_row_by_row(data, documents, large):
    """Over any chunking of the column, 32- or 64-bit offsets and values, and slices of a larger table."""
    kind = pa.large_list(pa.int64()) if large else pa.list_(pa.int32())
    cuts = sorted(data.draw(st.lists(st.integers(0, len(documents)), max_size=3)))
    whole = pa.array([[1, 2], *documents], kind)
    bounds = [0, *cuts, len(documents)]
    column = ListColumn(
        "input_ids",
        pa.chunked_array([whole.slice(1 + a, b - a) for a, b in zip(bounds[:-1], bounds[1:], strict=True)], kind),
    )
    picks = data.draw(st.lists(st.integers(0, len(documents) - 1), max_size=8))
    starts = [data.draw(st.integers(0, len(documents[i]))) for i in picks]
    stops = [data.draw(st.integers(a, len(documents[i]))) for i, a in zip(picks, starts, strict=True)]
    found = column.gather(
        np.array(picks, dtype=np.int64), np.array(starts, dtype=np.int64), np.array(stops, dtype=np.int64)
    )
    assert found.tolist() == [
        token for i, a, b in zip(picks, starts, stops, strict=True) for token in documents[i][a:b]
    ]
    assert column.lengths().tolist() == [len(document) for document in documents]


def test_index(examples):
    assert examples[3]["input_ids"].tolist() == examples.gather([3])[0].tolist()
    for outside in (-1, 6):
        with pytest.raises(IndexError):
            examples[outside]


def test_take(examples):
    view = examples.take([4, 1, 4])
    assert view.rows.tolist() == [4, 1, 4] and view.lengths.tolist() == examples.lengths[[4, 1, 4]].tolist()
    assert view[1]["labels"].tolist() == examples[1]["labels"].tolist()
    assert view.take([2, 1]).rows.tolist() == [4, 1]
    assert view.report.examples == 3 and view.report.tokens == int(view.lengths.sum())
    assert view.fingerprint == examples.take([4, 1, 4]).fingerprint
    assert len({view.fingerprint, examples.fingerprint, examples.take([1, 4, 4]).fingerprint}) == 3


def test_hold_out(examples):
    train, held_out = examples.hold_out(2, seed=7)
    assert sorted([*train.rows, *held_out.rows]) == list(range(6)) and len(held_out) == 2
    said = "rows held out for evaluation: 2"
    assert train.report.held_out == 2 and said in train.report.lines() and said not in examples.report.lines()
    assert examples.hold_out(0.5, seed=7)[0].report.held_out == 3
    assert examples.hold_out(2, seed=7)[1].rows.tolist() == held_out.rows.tolist()
    assert len({tuple(examples.hold_out(2, seed=seed)[1].rows) for seed in range(20)}) > 3
    assert len(examples.hold_out(0.5, seed=7)[1]) == 3
    for nothing in (6, 0.01, 0.99, 100):
        with pytest.raises(DataError, match="leaves nothing"):
            examples.hold_out(nothing, seed=7)


def test_hold_out_keeps_the_pieces_of_a_row_together(build, tokenizer):
    examples = build(ROWS, tokenizer, max_length=6, overflow="split", completion_only_loss=False)
    assert len(examples) > len(ROWS)
    for seed in range(10):
        train, held_out = examples.hold_out(3, seed=seed)
        assert not set(train.rows) & set(held_out.rows)
        assert len(set(held_out.rows)) == 3


def test_pickle_holds_paths_not_arrays(build, tokenizer):
    """A worker maps the files again; ten times the tokens or the rows make the pickle no larger."""

    def pickled(rows: int, words: int) -> tuple[Examples, bytes]:
        examples = build([{"text": "one two three " * words}] * rows, tokenizer)
        return examples, pickle.dumps(examples)

    (_, small), (longer, as_small), (more, as_small_too) = pickled(50, 10), pickled(50, 100), pickled(500, 10)
    assert len(longer) == 50 and len(more) == 500
    assert abs(len(as_small) - len(small)) < 50 and abs(len(as_small_too) - len(small)) < 50
    again = pickle.loads(as_small_too)
    assert again.fingerprint == more.fingerprint and again.lengths.filename == more.lengths.filename
    assert np.array_equal(again.gather([3, 1]), more.gather([3, 1]))
    view = pickle.loads(pickle.dumps(more.take([7, 7])))
    assert view.rows.tolist() == [7, 7] and view.report == more.take([7, 7]).report


def test_reading_holds_nothing_per_example(examples):
    """Every data worker has the examples; what it needs of a million is their number."""
    count = 1_000_000
    lengths = np.broadcast_to(examples.lengths[3:4], count)
    documents = dataclasses.replace(examples._documents, lengths=lengths, supervised=lengths, reopen=None)
    tracemalloc.start()
    try:
        many = Examples(documents, None, examples.report)
        read = many.gather([3])[0].tolist()
        _, peak = tracemalloc.get_traced_memory()
        assert len(many) == count and read == examples[3]["input_ids"].tolist()
        assert peak < count
        assert len(many.rows) == count and tracemalloc.get_traced_memory()[1] >= 8 * count, "control: it is measured"
    finally:
        tracemalloc.stop()


def test_another_process_reads_the_same(examples):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.map(examples.gather, [[3], [0, 5]])
    assert [ids.tolist() for ids, _ in found] == [examples.gather(ids)[0].tolist() for ids in ([3], [0, 5])]


@pytest.mark.parametrize("num_proc", [2, 5])
def test_processes_give_the_same_tokens(num_proc, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("packtrain.data.encoding._BATCH", 7)  # so that 30 rows are enough for five processes
    rows = open_rows("packtrain:arithmetic", num_rows=30)
    options = dict(max_length=512, overflow="truncate", on_bad_row="skip")
    alone = build_examples(rows, tokenizer, cache_dir=tmp_path / "alone", **options)
    together = build_examples(rows, tokenizer, cache_dir=tmp_path / "together", num_proc=num_proc, **options)
    assert 20 < len(alone) and len(list((tmp_path / "together").rglob("*.arrow"))) == num_proc
    assert alone.fingerprint == together.fingerprint and alone.report == together.report
    everything = np.arange(len(alone))
    assert np.array_equal(alone.gather(everything), together.gather(everything))


# --- datasets tokenised elsewhere --------------------------------------------------------------------------------


def as_lists(examples: Examples) -> list[tuple[list[int], list[int]]]:
    return [(example["input_ids"].tolist(), example["labels"].tolist()) for example in examples]


@pytest.mark.parametrize(
    ("columns", "labels"),
    [
        ({}, [[-100, 2, 3], [-100, 5]]),
        ({"labels": [[1, -100, 9], [4, 5]]}, [[-100, -100, 9], [-100, 5]]),
        ({"completion_mask": [[0, 0, 1], [0, 1]]}, [[-100, -100, 3], [-100, 5]]),
        ({"assistant_masks": [[True, True, False], [True, True]]}, [[-100, 2, -100], [-100, 5]]),
        (
            {"completion_mask": [[0, 1, 1], [1, 1]], "assistant_masks": [[0, 0, 1], [0, 1]]},
            [[-100, -100, 3], [-100, 5]],
        ),
        ({"labels": [[1, 2, 3], [4, 5]], "completion_mask": [[0, 0, 0], [0, 0]]}, [[-100, 2, 3], [-100, 5]]),
        ({"attention_mask": [[1, 1, 1], [1, 1]], "text": ["a", "b"]}, [[-100, 2, 3], [-100, 5]]),
    ],
)
def test_from_dataset(columns, labels):
    dataset = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5]], **columns})
    examples = Examples.from_dataset(dataset)
    assert as_lists(examples) == list(zip([[1, 2, 3], [4, 5]], labels, strict=True))
    assert examples.supervised.tolist() == [sum(label != -100 for label in row) for row in labels]
    assert as_lists(pickle.loads(pickle.dumps(examples))) == as_lists(examples)


@pytest.mark.parametrize("torch_format", [False, True])
def test_from_a_selection_of_a_dataset(torch_format, tmp_path):
    dataset = datasets.Dataset.from_dict({"input_ids": [[i, i + 1] for i in range(50)]})
    dataset.save_to_disk(tmp_path / "saved")
    chosen = datasets.load_from_disk(tmp_path / "saved").shuffle(seed=3).select(range(5, 25))
    expected = chosen["input_ids"][:]
    examples = Examples.from_dataset(chosen.with_format("torch") if torch_format else chosen)
    assert [ids for ids, _ in as_lists(examples)] == expected
    assert expected != [[i, i + 1] for i in range(5, 25)]  # it was shuffled indeed


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["one"]}, "column 'input_ids', and it has 1 rows with text"),
        ({"input_ids": []}, "column 'input_ids', and it has 0 rows"),
        ({"input_ids": ["one"]}, "has the type string, not lists of integers"),
        ({"input_ids": [[0.5, 1.0]]}, "has lists of double, not of integers"),
        ({"input_ids": [[[1]], [[2]]]}, "not of integers"),
        ({"input_ids": [[1, 2], None]}, "'input_ids' contains nulls"),
        ({"input_ids": [[1, 2], [1, None]]}, "'input_ids' contains nulls"),
        ({"input_ids": [[1, 2], []]}, "row 1: 'input_ids' is empty"),
        ({"input_ids": [[1, 2], [1]]}, "row 1: no supervised token"),
        ({"input_ids": [[1, 2], [1, -5], [1, 2]]}, "row 1: 'input_ids' contains a negative id"),
        ({"input_ids": [[1, 2], [1, 2]], "labels": [[1, 2], [1, -1]]}, "row 1: 'labels' contains a negative id"),
        ({"input_ids": [[1, 2], [1, 2]], "labels": [[1, 2], [1]]}, "row 1: 'labels' has 1 entries for 2 input_ids"),
        ({"input_ids": [[1, 2], [1, 0]], "attention_mask": [[1, 1], [1, 0]]}, "row 1: 'attention_mask' has zeros"),
        ({"input_ids": [[1, 2], [3, 4]], "attention_mask": [[1, 1], [1, 2]]}, "row 1: 'attention_mask' contains"),
        ({"input_ids": [[1, 2], [3, 4]], "attention_mask": [[1, 1], [1]]}, "row 1: 'attention_mask' has 1 entries"),
        ({"input_ids": [[1, 2], [3, 4]], "completion_mask": [[1, 1], [0, 5]]}, "row 1: 'completion_mask' contains"),
    ],
)
def test_from_dataset_refuses(columns, message):
    with pytest.raises(DataError, match=message):
        Examples.from_dataset(datasets.Dataset.from_dict(columns))
