"""Documents of several sources, joined: every piece is read from its own source."""

from __future__ import annotations

import pickle

import datasets
import numpy as np
import pytest

from packtrain.data.examples import Examples, build_examples
from packtrain.data.joined import join_documents
from packtrain.data.report import merge_reports
from packtrain.data.sources import open_rows


@pytest.fixture
def parts(write_rows, tokenizer) -> list[Examples]:
    """Sources that store their labels in three ways: none, a mask, labels."""
    texts = write_rows(*({"text": f"one two {'three ' * i}"} for i in range(5)), name="a.jsonl")
    answers = write_rows(*({"question": "one?" * (i + 1), "answer": "two"} for i in range(4)), name="b.jsonl")
    ids = write_rows(*({"input_ids": [60, 61, 62 + i], "labels": [-100, 61, -100]} for i in range(3)), name="c.jsonl")
    return [build_examples(open_rows(path), tokenizer) for path in (texts, answers, ids)]


def join(parts: list[Examples]) -> Examples:
    return Examples.join(parts, merge_reports([(str(i), part.report) for i, part in enumerate(parts)]))


def content(examples, ids=None) -> list:
    return [{name: values.tolist() for name, values in examples[i].items()} for i in ids or range(len(examples))]


def test_examples_of_all_sources_in_their_order(parts):
    joined = join(parts)
    assert content(joined) == [each for part in parts for each in content(part)]
    assert joined.lengths.tolist() == [length for part in parts for length in part.lengths.tolist()]
    assert joined.rows.tolist() == list(range(12))
    assert [joined.source.where(i) for i in (0, 5, 11)] == ["a.jsonl, line 1", "b.jsonl, line 1", "c.jsonl, line 3"]
    assert joined.source[11] == {"input_ids": [60, 61, 64], "labels": [-100, 61, -100]}
    assert joined.blanks.tolist() == [0] * 12
    report = joined.report
    assert (report.rows, report.examples, report.format) == (12, 12, "text, question_answer, input_ids")
    assert report.tokens == sum(part.report.tokens for part in parts)
    assert report.supervised_tokens == sum(part.report.supervised_tokens for part in parts)


def test_pieces_come_in_the_order_they_are_asked_for(parts):
    joined, alone = join(parts), content(join(parts))
    for ids in ([11, 0, 5, 4, 0], [7], [3, 2], []):
        input_ids, labels = joined.gather(ids)
        assert input_ids.tolist() == [t for i in ids for t in alone[i]["input_ids"]]
        assert labels.tolist() == [t for i in ids for t in alone[i]["labels"]]
    starts, stops = np.array([1, 0, 2]), np.array([3, 2, 3])
    input_ids, _ = joined.gather([10, 1, 6], starts, stops)
    assert input_ids.tolist() == [
        t for i, a, b in zip([10, 1, 6], starts, stops, strict=True) for t in alone[i]["input_ids"][a:b]
    ]


def test_a_pickle_holds_paths(parts):
    joined = join(parts)
    again = pickle.loads(pickle.dumps(joined))
    assert content(again) == content(joined) and again.fingerprint == joined.fingerprint
    documents = pickle.dumps(join_documents([part._documents for part in parts]))
    assert len(documents) < 2000 and b"b.jsonl" not in documents


def test_the_fingerprint_is_of_the_sources_and_of_what_is_taken(parts):
    joined = join(parts)
    others = [join(parts[::-1]), join(parts[:2]), joined.take(np.arange(11)), joined.take(np.arange(12)[::-1])]
    assert len({examples.fingerprint for examples in (joined, *others)}) == 5
    assert join(parts).fingerprint == joined.fingerprint


def test_tokens_made_elsewhere_join(parts):
    dataset = Examples.from_dataset(datasets.Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5]]}))
    joined = join([parts[0], dataset])
    assert content(joined)[5:] == content(dataset) and joined.blanks.tolist() == [0] * 7
    assert joined.source is None
