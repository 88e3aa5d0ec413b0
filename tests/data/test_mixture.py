"""Mixtures: the counts of an epoch are exact, no row is lost, none is both trained on and held out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from math import floor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import packtrain.data.encoding
from packtrain.data.examples import Examples
from packtrain.data.loading import find_examples, open_section, prepare_examples
from packtrain.data.mixture import apportion, draw
from packtrain.errors import DataError
from packtrain.recipe.sections import DataSection

# --- counts ------------------------------------------------------------------------------------------------------

_WEIGHTS = st.lists(
    st.integers(1, 1000) | st.floats(1e-3, 1e3, allow_nan=False).map(lambda x: round(x, 3)), min_size=1, max_size=6
)


def by_hand(total: int, weights: Sequence[float]) -> list[int]:
    """Largest remainders, one example at a time."""
    exact = [Fraction(str(weight)) for weight in weights]
    quotas = [total * weight / sum(exact) for weight in exact]
    counts = [floor(quota) for quota in quotas]
    left = [quota - count for quota, count in zip(quotas, counts, strict=True)]
    while sum(counts) < total:
        winner = left.index(max(left))
        counts[winner], left[winner] = counts[winner] + 1, Fraction(-1)
    return counts


@given(total=st.integers(0, 10**6), weights=_WEIGHTS)
def test_counts_are_those_of_largest_remainders(total, weights):
    counts = apportion(total, weights)
    assert sum(counts) == total
    assert counts == by_hand(total, weights)
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - total * Fraction(str(weight)) / sum(map(Fraction, map(str, weights)))) < 1
    assert apportion(total, [weight * 2 for weight in weights]) == counts  # only their proportions count


def test_counts_that_are_rounded_one_by_one_would_not_do():
    """Control: they don't add up."""
    assert apportion(10, [1, 1, 1]) == [4, 3, 3] and sum(round(10 / 3) for _ in range(3)) == 9
    assert apportion(3, [0.1, 0.2]) == [1, 2]  # as written: in binary fractions it is 0.99... and 2.00...
    assert apportion(5, [1e-9, 1]) == [0, 5]


@given(available=st.integers(1, 50), count=st.integers(0, 200), seed=st.integers(0, 5), source=st.integers(0, 3))
def test_every_example_is_drawn_as_often_as_any_other_or_once_more(available, count, seed, source):
    drawn = draw(available, count, seed=seed, source=source)
    times = np.bincount(drawn, minlength=available)
    assert len(drawn) == count and len(times) == available
    assert times.min() == count // available and times.max() == -(-count // available)
    assert np.array_equal(drawn, draw(available, count, seed=seed, source=source))
    more = draw(available, count + 1, seed=seed, source=source)
    assert not Counter(drawn.tolist()) - Counter(more.tolist())  # one more example takes none away


def test_which_are_repeated_is_the_seeds_choice():
    assert not np.array_equal(draw(100, 150, seed=0, source=0), draw(100, 150, seed=1, source=0))
    assert not np.array_equal(draw(100, 150, seed=0, source=0), draw(100, 150, seed=0, source=1))


# --- examples ----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch) -> Path:
    """10 rows of text and 30 with prompts; every row has words of its own."""
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text("".join(json.dumps({"text": f"alpha {i}"}) + "\n" for i in range(10)))
    Path("b.jsonl").write_text(
        "".join(json.dumps({"prompt": f"beta {i}?", "completion": " yes"}) + "\n" for i in range(30))
    )
    return tmp_path


def section(*weights: float, **options) -> DataSection:
    sources = [{"path": path, "weight": weight} for path, weight in zip(("a.jsonl", "b.jsonl"), weights, strict=False)]
    return DataSection(mixture=sources, **options)


def load(data: DataSection, tokenizer, seed: int = 0, **options) -> tuple[Examples, Examples | None]:
    return prepare_examples(data, open_section(data, seed=seed), tokenizer, seed=seed, **options)


def words(examples: Examples, tokenizer) -> Counter:
    """How often each row is among the examples, by its text."""
    return Counter(tokenizer.decode(example["input_ids"]).partition("?")[0] for example in examples)


def counts(examples: Examples) -> list[int]:
    return np.bincount(examples.rows >= 10, minlength=2).tolist()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(weights=st.tuples(st.integers(1, 60), st.integers(1, 60)), seed=st.integers(0, 3))
def test_an_epoch_has_the_counts_of_the_weights(weights, seed, tokenizer):
    """Against a literal reference: how often the text of every row occurs."""
    found = words(load(section(*weights), tokenizer, seed)[0], tokenizer)
    texts = [f"<s>alpha {i}</s>" for i in range(10)], [f"<s>beta {i}" for i in range(30)]
    assert sum(found.values()) == 40
    for mine, available, count in zip(texts, (10, 30), by_hand(40, weights), strict=True):
        times = [found[text] for text in mine]
        assert sum(times) == count
        assert all(count // available <= each <= -(-count // available) for each in times)


def test_weights_in_proportion_to_the_sources_read_every_example_once(tokenizer):
    train, _ = load(section(10, 30), tokenizer)
    assert train.rows.tolist() == list(range(40))
    assert set(words(train, tokenizer).values()) == {1}
    assert max(words(load(section(11, 29), tokenizer)[0], tokenizer).values()) == 2  # control


def test_what_is_repeated_and_left_out_is_said(tokenizer):
    train, held_out = load(section(3, 1), tokenizer)
    assert held_out is None and counts(train) == [30, 10]
    first, second = train.report.mixture
    assert (first.rows, first.available, first.examples) == (10, 10, 30)
    assert (second.rows, second.available, second.examples) == (30, 30, 10)
    assert first.tokens + second.tokens == train.report.tokens == int(train.lengths.sum())
    lines = "\n".join(train.report.lines())
    assert "75.0% a.jsonl (10 rows): 30 examples, each of its 10 is read 3 times" in lines
    assert "25.0% b.jsonl (30 rows): 10 examples, chosen from 30, the same in every epoch" in lines
    assert "each of its 10 is read 2 or 3 times" in load(section(25, 15), tokenizer)[0].report.mixture[0].line()
    assert "each of its 10 is read once" in load(section(1, 3), tokenizer)[0].report.mixture[0].line()
    assert json.dumps(train.report.to_dict())  # is stored in the summary


@pytest.mark.parametrize("eval_size", [0.2, 8])
def test_no_row_is_both_trained_on_and_held_out(eval_size, tokenizer):
    train, held_out = load(section(3, 1, eval_size=eval_size), tokenizer)
    assert not set(train.rows.tolist()) & set(held_out.rows.tolist())
    assert max(Counter(train.rows.tolist()).values()) > 1  # control: rows are repeated
    assert counts(held_out) == ([2, 6] if eval_size < 1 else [6, 2])
    assert counts(train) == [24, 8] and len(set(train.rows.tolist())) == (8 if eval_size < 1 else 4) + 8
    assert not words(train, tokenizer) & words(held_out, tokenizer)
    assert [share.held_out for share in train.report.mixture] == counts(held_out)
    assert train.source.where(int(held_out.rows[-1])).startswith("b.jsonl")


@pytest.mark.parametrize(
    ("eval_size", "message"), [(0.001, "holds out none of 40 rows"), (16, "a.jsonl: holds out 12")]
)
def test_a_source_that_cannot_hold_out_is_named(eval_size, message, tokenizer):
    with pytest.raises(DataError, match=message) as caught:
        load(section(3, 1, eval_size=eval_size), tokenizer)
    assert caught.value.key == "data.eval_size"


def test_where_names_the_row_of_the_source(tokenizer):
    train, _ = load(section(3, 1), tokenizer)
    for example in (0, 29, 30, 39):
        row = int(train.rows[example])
        text = tokenizer.decode(train[example]["input_ids"])
        name = f"a.jsonl, line {row + 1}" if row < 10 else f"b.jsonl, line {row - 9}"
        assert train.source.where(row) == name
        assert str(row % 10 if row < 10 else row - 10) in text


def test_a_weight_changes_no_token_and_tokenises_nothing(tokenizer, monkeypatch):
    def fail(*args, **options):
        raise AssertionError("tokenised again")

    train, _ = load(section(3, 1), tokenizer)
    monkeypatch.setattr(packtrain.data.encoding, "_map", fail)
    other, _ = load(section(1, 5), tokenizer)
    assert counts(other) == [7, 33] and other.fingerprint != train.fingerprint
    Path("a.jsonl").write_text('{"text": "changed"}\n')
    with pytest.raises(AssertionError, match="tokenised again"):  # control
        load(section(1, 5), tokenizer)


def test_the_fingerprint_covers_sources_weights_and_seed(tokenizer):
    first = load(section(3, 1), tokenizer)[0].fingerprint
    assert load(section(3, 1), tokenizer)[0].fingerprint == first
    assert load(section(6, 2), tokenizer)[0].fingerprint == first  # the same proportions
    assert load(section(3, 1.2), tokenizer)[0].fingerprint != first
    assert load(section(3, 1), tokenizer, seed=1)[0].fingerprint != first
    turned = DataSection(mixture=[{"path": "b.jsonl", "weight": 1}, {"path": "a.jsonl", "weight": 3}])
    assert load(turned, tokenizer)[0].fingerprint != first


def test_a_mixture_is_found_without_rows_or_tokenizer(tokenizer):
    data = section(3, 1, eval_size=0.2)
    assert find_examples(data, "tiny", seed=0)[0] is None
    train, _ = load(data, tokenizer, tokenizer_key="tiny")
    found, why = find_examples(data, "tiny", seed=0)
    assert why == "" and found.fingerprint == train.fingerprint and found.report == train.report
    reweighted = find_examples(section(1, 1, eval_size=0.2), "tiny", seed=0)[0]
    assert counts(reweighted) == [16, 16]
    Path("b.jsonl").write_text('{"text": "new"}\n')
    assert "b.jsonl changed" in find_examples(data, "tiny", seed=0)[1]


def test_a_tokenizer_trained_on_other_sources_is_another(tokenizer):
    """Its key says how it is trained, not on what."""
    load(section(3, 1), tokenizer, tokenizer_key="trained")
    other = DataSection(mixture=[{"path": "a.jsonl", "weight": 3}])
    assert find_examples(other, "trained", seed=0)[0] is None
    assert find_examples(section(2, 9), "trained", seed=0)[0] is not None  # control


def test_long_and_bad_rows_are_counted_over_all_sources(tokenizer):
    Path("a.jsonl").write_text('{"text": 1}\n{"text": "one two three four five six"}\n{"text": "one"}\n')
    Path("b.jsonl").write_text('{"text": "one"}\n{"text": "one two three four five six", "n": 1}\n{\n')
    train, _ = load(section(1, 1, max_length=4, overflow="truncate", on_bad_row="skip"), tokenizer)
    report = train.report
    assert (report.rows, report.truncated_rows, report.examples) == (6, 2, 4)
    assert [where for where, _ in report.skipped] == ["a.jsonl, line 1", "b.jsonl, line 3"]
    assert "b.jsonl: columns not used: n" in report.notes
    assert [share.available for share in report.mixture] == [2, 2]
    with pytest.raises(DataError, match="b.jsonl, line 3"):
        load(section(1, 1, max_length=4, overflow="truncate", on_bad_row="skip").model_copy(
            update={"on_bad_row": "error", "mixture": section(1, 1).mixture[1:]}), tokenizer)  # fmt: skip


def test_a_source_has_its_own_split_format_and_number_of_rows(tokenizer):
    Path("d").mkdir()
    Path("d/test.jsonl").write_text('{"text": "one", "prompt": "two", "completion": "three"}\n' * 5)
    data = DataSection(
        mixture=[
            {"path": "d", "split": "test", "format": "text", "weight": 1},
            {"path": "d", "split": "test", "format": "prompt_completion", "num_rows": 2, "weight": 1},
            {"path": ["a.jsonl", "b*.jsonl"], "weight": 1, "num_rows": 10},
            {"path": "packtrain:arithmetic", "weight": 1, "num_rows": 3},
        ]
    )
    train, _ = load(data, tokenizer)
    assert [share.rows for share in train.report.mixture] == [5, 2, 10, 3]
    assert [share.examples for share in train.report.mixture] == [5, 5, 5, 5]
    assert train.report.files[0] == ("d/test.jsonl", 5) and train.report.files[2:4] == (("a.jsonl", 10), ("b.jsonl", 0))
    assert train.source.where(5) == "d/test.jsonl, line 1" and train.source.where(19) == "packtrain:arithmetic, row 2"


@pytest.mark.parametrize(
    ("source", "key"),
    [
        ({"path": "absent.jsonl"}, "data.mixture.1.path"),
        ({"path": "json"}, "data.mixture.1.path"),
        ({"path": "b.jsonl", "split": "test"}, "data.mixture.1.split"),
        ({"path": "b.jsonl", "format": "messages"}, "data.mixture.1.format"),
        ({"path": "b.jsonl", "name": "main"}, "data.mixture.1.name"),
        ({"path": "b.jsonl", "weight": 1e-9}, "data.mixture.1.weight"),
    ],
)
def test_what_is_wrong_with_a_source_is_said_of_it(source, key, tokenizer):
    with pytest.raises(DataError) as caught:
        load(DataSection(mixture=[{"path": "a.jsonl", "weight": 1}, {"weight": 1} | source]), tokenizer)
    assert caught.value.key == key


def test_evaluation_rows_are_no_part_of_the_mixture(tokenizer):
    Path("e.jsonl").write_text('{"text": "one two"}\n' * 4)
    train, held_out = load(section(3, 1, eval_path=["e.jsonl"]), tokenizer)
    assert len(train) == 40 and len(held_out) == 4
    assert held_out.report.files == (("e.jsonl", 4),) and not held_out.report.mixture
    with pytest.raises(DataError) as caught:
        load(section(3, 1, eval_path=["e.jsonl", "absent*"]), tokenizer)
    assert caught.value.key == "data.eval_path"


def test_refused_rows_of_all_sources_are_listed_at_once(tokenizer):
    Path("a.jsonl").write_text('{"text": 1}\n{"text": "one"}\n')
    Path("b.jsonl").write_text('{"text": "one"}\n{"text": "one two three four five six"}\n')
    Path("held_out.jsonl").write_text('{"text": "one"}\n{"text": 2}\n')
    mixed, single = section(1, 1, max_length=4), DataSection(path="a.jsonl", eval_path="held_out.jsonl", max_length=4)
    for attempt in ("tokenised", "found in the cache"):
        with pytest.raises(DataError) as error:
            load(mixed, tokenizer, tokenizer_key="tiny")
        assert all(where in str(error.value) for where in ("a.jsonl, line 1", "b.jsonl, line 2")), attempt
    with pytest.raises(DataError) as error:
        find_examples(mixed, "tiny", seed=0)
    assert all(where in str(error.value) for where in ("a.jsonl, line 1", "b.jsonl, line 2"))
    with pytest.raises(DataError) as error:
        load(single, tokenizer)
    assert all(where in str(error.value) for where in ("a.jsonl, line 1", "held_out.jsonl, line 2"))
    assert str(error.value).count("fix: ") == 1
