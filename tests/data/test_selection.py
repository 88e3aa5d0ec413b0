"""`overflow` and `on_bad_row`: which tokens are left, and that the report accounts for every other one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packtrain.data.examples import Examples, build_examples
from packtrain.data.sources import open_rows
from packtrain.errors import DataError

# Row 1 is too long for 4; its prompt takes 5 of its 9 tokens. Row 2 is just as long as may be.
ROWS = [
    {"input_ids": [10, 11, 12], "labels": [-100, 11, 12]},
    {"input_ids": [20, 21, 22, 23, 24, 25, 26, 27, 28], "labels": [-100] * 5 + [25, 26, 27, 28]},
    {"input_ids": [30, 31, 32, 33], "labels": [-100, -100, 32, 33]},
    {"input_ids": [40, 41, 42, 43, 44], "labels": [40, 41, 42, 43, 44]},
]


def pieces(examples: Examples) -> list[tuple[int, list[int], list[int]]]:
    return [
        (int(row), example["input_ids"].tolist(), example["labels"].tolist())
        for row, example in zip(examples.rows, examples, strict=True)
    ]


WHOLE_0 = (0, [10, 11, 12], [-100, 11, 12])
WHOLE_2 = (2, [30, 31, 32, 33], [-100, -100, 32, 33])


def test_bad_rows_are_listed_next_to_those_of_which_a_cut_leaves_nothing(build, tokenizer):
    """In the order of the rows."""
    texts = [{"prompt": "one two three four " * 4, "completion": "seven"}, {"prompt": 3, "completion": "x"}]
    rows = [{"prompt": "?", "completion": "one"}, *texts, {"prompt": "?", "completion": "two"}, texts[0]]
    examples = build(rows, tokenizer, max_length=8, overflow="truncate", on_bad_row="skip")
    assert [where for where, _ in examples.report.skipped] == [f"rows.jsonl, line {number}" for number in (2, 3, 5)]
    assert examples.rows.tolist() == [0, 3]


def test_drop(build, tokenizer):
    examples = build(ROWS, tokenizer, max_length=4, overflow="drop")
    assert pieces(examples) == [WHOLE_0, WHOLE_2]
    report = examples.report
    assert (report.dropped_rows, report.tokens_lost, report.supervised_lost) == (2, 14, 8)
    assert report.lines()[-1] == "rows longer than max_length, dropped: 2 (14 tokens lost, 8 of them supervised)"


def test_truncate(build, tokenizer):
    with pytest.raises(DataError) as error:  # nothing to learn is left of row 1
        build(ROWS, tokenizer, max_length=4, overflow="truncate")
    assert "rows.jsonl, line 2: no supervised token is left after truncation to max_length=4" in str(error.value)
    examples = build(ROWS, tokenizer, max_length=4, overflow="truncate", on_bad_row="skip")
    assert pieces(examples) == [WHOLE_0, WHOLE_2, (3, [40, 41, 42, 43], [-100, 41, 42, 43])]
    report = examples.report
    assert (report.truncated_rows, report.tokens_lost, report.supervised_lost) == (1, 1, 1)
    assert [where for where, _ in report.skipped] == ["rows.jsonl, line 2"]


def test_split(build, tokenizer):
    examples = build(ROWS, tokenizer, max_length=4, overflow="split")
    assert pieces(examples) == [
        WHOLE_0,
        # [20 21 22 23] holds no label; [28] has nothing that predicts it
        (1, [24, 25, 26, 27], [-100, 25, 26, 27]),
        WHOLE_2,
        (3, [40, 41, 42, 43], [-100, 41, 42, 43]),  # and [44] likewise
    ]
    assert examples.supervised.tolist() == [2, 3, 2, 3]
    report = examples.report
    assert (report.split_rows, report.tokens_lost, report.supervised_lost) == (2, 6, 2)


def test_error_names_the_longest_and_the_way_out(build, tokenizer):
    with pytest.raises(DataError) as error:
        build(ROWS, tokenizer, max_length=4)
    assert "2 of 4 rows are longer than max_length=4, by 6 tokens in total" in str(error.value)
    assert "line 2: 9 tokens\n    rows.jsonl, line 4: 5 tokens" in str(error.value)
    assert "raise `data.max_length` to 9, or choose `data.overflow`" in error.value.fix


def test_all_that_fits_is_left_alone(build, tokenizer):
    for overflow in ("error", "truncate", "drop", "split"):
        examples = build(ROWS, tokenizer, max_length=9, overflow=overflow)
        assert examples.lengths.tolist() == [3, 9, 4, 5]
        assert examples.report.tokens_lost == examples.report.supervised_lost == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overflow": "cut"}, "data.overflow: is not a valid choice.*\n.*error, truncate, drop, split"),
        ({"on_bad_row": "ignore"}, "data.on_bad_row: is not a valid choice"),
        ({"max_length": 1}, "data.max_length: must be at least 2"),
    ],
)
def test_options_that_cannot_be(options, message, build, tokenizer):
    with pytest.raises(DataError, match=message):
        build(ROWS, tokenizer, **options)


@pytest.mark.parametrize("overflow", ["truncate", "drop"])
def test_nothing_left(overflow, build, tokenizer):
    with pytest.raises(DataError, match="none of 1 rows is left"):
        build([ROWS[1]], tokenizer, max_length=4, overflow=overflow, on_bad_row="skip")


_ROW = st.integers(2, 30).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.booleans(), min_size=n, max_size=n)))


@settings(max_examples=50)
@given(
    rows=st.lists(_ROW, min_size=1, max_size=8),
    limit=st.integers(2, 12),
    overflow=st.sampled_from(["truncate", "split", "drop"]),
)
def test_every_token_is_an_example_or_counted_lost(rows, limit, overflow):
    """Against a plain loop over lists."""
    import datasets

    ids = [list(range(length)) for length, _ in rows]
    labels = [[i if on else -100 for i, on in enumerate(mask)] for _, mask in rows]
    expected, skipped = [], []
    for row, (length, _) in enumerate(rows):
        cuts = [slice(0, length)]
        if length > limit:
            cuts = {"drop": [], "truncate": [slice(0, limit)]}.get(
                overflow, [slice(a, a + limit) for a in range(0, length, limit)]
            )
        blanked = [(row, ids[row][cut], [-100] + labels[row][cut][1:]) for cut in cuts]
        learnable = [piece for piece in blanked if any(label != -100 for label in piece[2])]
        if not learnable and (cuts or not any(label != -100 for label in labels[row][1:])):
            skipped.append(row)
        else:
            expected += learnable

    dataset = datasets.Dataset.from_dict({"input_ids": ids, "labels": labels})
    options = dict(max_length=limit, overflow=overflow, on_bad_row="skip")
    if not expected:
        with pytest.raises(DataError):
            Examples.from_dataset(dataset, **options)
        return
    examples = Examples.from_dataset(dataset, **options)
    assert pieces(examples) == expected
    assert examples.lengths.tolist() == [len(piece[1]) for piece in expected]
    assert examples.supervised.tolist() == [sum(label != -100 for label in piece[2]) for piece in expected]
    report = examples.report
    assert [where for where, _ in report.skipped] == [f"row {row}" for row in skipped]
    kept = sum(length for row, (length, _) in enumerate(rows) if row not in skipped)
    assert report.tokens + report.tokens_lost == kept
    learnt = sum(sum(mask[1:]) for row, (_, mask) in enumerate(rows) if row not in skipped)
    assert report.supervised_tokens + report.supervised_lost == learnt


def test_changing_max_length_tokenises_nothing_again(write_rows, tokenizer, cache_dir):
    path = write_rows(*ROWS)
    for limit in (9, 5, 4):
        build_examples(open_rows(path), tokenizer, max_length=limit, overflow="drop")
    assert len(list((cache_dir / "tokens").iterdir())) == 1


def test_view_is_memory_mapped_where_nothing_is_cut(build, tokenizer):
    assert isinstance(build(ROWS, tokenizer).lengths, np.memmap)


def test_bad_rows_and_overlong_rows_are_listed_in_one_error(build, tokenizer):
    empty = [{"input_ids": [], "labels": []}, {"input_ids": [1, 2], "labels": [-100, -100]}]
    with pytest.raises(DataError) as error:
        build([*ROWS, *empty], tokenizer, max_length=8)
    message = str(error.value)
    assert "data.on_bad_row: 2 of 6 rows cannot be trained on" in message and "line 5: " in message
    assert "data.overflow: 1 of 6 rows are longer" in message and "rows.jsonl, line 2: 9 tokens" in message
    assert message.count("fix: ") == 2 and "on_bad_row: skip" in message and "truncate, split or drop" in message
    with pytest.raises(DataError) as error:  # control: what is skipped is no error
        build([*ROWS, *empty], tokenizer, max_length=8, on_bad_row="skip")
    assert "on_bad_row" not in str(error.value) and "line 5" not in str(error.value)
