"""A share of the examples is kept by their scores, which must be of these examples; nothing else is pruned."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packtrain.data.examples import Examples
from packtrain.data.loading import find_examples, open_section, prepare_examples
from packtrain.data.pruning import choose
from packtrain.data.scores import About, check_target, write_scores
from packtrain.errors import DataError
from packtrain.recipe.sections import DataSection, KeepSection

SCORED = Path("scored.parquet")


@pytest.fixture(autouse=True)
def rows(tmp_path, monkeypatch) -> Path:
    """24 rows of different lengths."""
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"prompt": f"What is {i}+{i}?", "completion": " 4" * (i % 5 + 1)}) for i in range(24)]
    Path("rows.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def load(tokenizer, keep: dict | None = None, seed: int = 0, **options) -> tuple[Examples, Examples | None]:
    section = DataSection(path="rows.jsonl", keep=None if keep is None else KeepSection(**keep), **options)
    rows = open_section(section, seed=seed)
    return prepare_examples(section, rows, tokenizer, seed=seed, tokenizer_key="tiny")


def write(examples: Examples, path: Path = SCORED, seed: int = 0, **changed) -> np.ndarray:
    """Scores drawn at random; returns them."""
    scores = {"loss": np.random.default_rng(seed).random(len(examples)), "el2n": np.arange(len(examples)) % 7 / 7}
    about = About(data=examples.fingerprint, examples=len(examples), models=("m",))
    write_scores(path, examples, scores | changed, about)
    return scores["loss"]


@given(scores=st.lists(st.sampled_from([0.0, 0.5, 0.5, 1.0, 2.0]), min_size=2, max_size=30), data=st.data())
def test_the_highest_lowest_or_middle_are_chosen(scores, data):
    """Against sorted lists; every rank order has them side by side."""
    count = data.draw(st.integers(1, len(scores) - 1))
    values, ranked = np.array(scores), sorted(scores)
    below = (len(scores) - count) // 2
    for which, right in (
        ("low", ranked[:count]),
        ("high", ranked[-count:]),
        ("middle", ranked[below : below + count]),
    ):
        chosen = choose(values, count, which)
        assert len(set(chosen.tolist())) == count and sorted(values[chosen].tolist()) == right


def test_those_of_the_file_are_kept_in_their_order(tokenizer):
    """Rows that are held out stay those they were."""
    whole, held_out = load(tokenizer, eval_size=4)
    loss = write(whole)
    kept, still_held_out = load(tokenizer, {"by": "loss", "share": 0.7, "scores": str(SCORED)}, eval_size=4)
    best = np.sort(np.argsort(loss)[-14:])
    assert kept.rows.tolist() == whole.rows[best].tolist() and still_held_out.fingerprint == held_out.fingerprint
    (note,) = set(kept.report.notes) - set(whole.report.notes)
    assert note.startswith("kept 14 of 20 training examples (those with the highest loss, from ")
    assert "6 are left out" in note and kept.report.examples == 14 and note in kept.report.lines()
    low, _ = load(tokenizer, {"by": "loss", "share": 0.7, "which": "low", "scores": str(SCORED)}, eval_size=4)
    assert len({whole.fingerprint, kept.fingerprint, low.fingerprint}) == 3  # a run resumes with its own only
    section = DataSection(path="rows.jsonl", eval_size=4, keep=KeepSection(by="loss", share=0.7, scores=str(SCORED)))
    found, why = find_examples(section, "tiny", seed=0)  # as `packtrain plan` does
    assert why == "" and found.fingerprint == kept.fingerprint and found.report.notes == kept.report.notes


def test_a_random_choice_is_the_seeds(tokenizer):
    """A smaller share is part of a larger one."""
    rows = {seed: load(tokenizer, {"by": "random", "share": 0.5, "seed": seed})[0].rows.tolist() for seed in (1, 2)}
    assert rows[1] != rows[2] and len(rows[1]) == len(rows[2]) == 12
    assert load(tokenizer, {"by": "random", "share": 0.5}, seed=1)[0].rows.tolist() == rows[1]  # training.seed
    few = load(tokenizer, {"by": "random", "share": 0.25, "seed": 1})[0].rows.tolist()
    assert set(few) < set(rows[1])


def without(column: str) -> None:
    pq.write_table(pq.read_table(SCORED).drop_columns([column]), SCORED)


def shortened() -> None:
    pq.write_table(pq.read_table(SCORED).slice(1), SCORED)


@pytest.mark.parametrize(
    ("damage", "changed", "key", "words"),
    [
        (SCORED.unlink, {}, "data.keep.scores", "there is no such file"),
        (lambda: SCORED.write_text("row,loss\n0,1\n"), {}, "data.keep.scores", "holds no scores"),
        (lambda: pq.write_table(pa.table({"loss": [1.0] * 24}), SCORED), {}, "data.keep.scores", "holds no scores"),
        (lambda: without("loss"), {}, "data.keep.by", "is no column of scored.parquet"),
        (shortened, {}, "data.keep.scores", "has 23 lines for 24 examples"),
        (lambda: None, {"completion_only_loss": False}, "data.keep.scores", "scores of 24 other"),
        (lambda: None, {"eval_size": 4}, "data.keep.scores", "not of the 20 of this recipe"),
        (lambda: None, {"share": 0.01}, "data.keep.share", "keeps 0 of 24"),
        (lambda: None, {"share": 0.99}, "data.keep.share", "keeps 24 of 24"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)
def test_scores_that_do_not_fit_are_refused(tokenizer, damage, changed, key, words):
    write(load(tokenizer)[0])
    keep = {"by": "loss", "share": 0.5, "scores": str(SCORED)}
    assert len(load(tokenizer, keep)[0]) == 12  # control
    damage()
    options = {name: value for name, value in changed.items() if name != "share"}
    with pytest.raises(DataError, match=words) as refused:
        load(tokenizer, keep | {"share": changed.get("share", 0.5)}, **options)
    assert refused.value.key == key and refused.value.fix


def test_scores_that_are_not_finite_are_refused(tokenizer):
    examples = load(tokenizer)[0]
    write(examples, loss=np.where(np.arange(24) == 3, np.nan, 1.0))
    with pytest.raises(DataError, match="has 1 values of `loss` that are not finite"):
        load(tokenizer, {"by": "loss", "share": 0.5, "scores": str(SCORED)})
    assert len(load(tokenizer, {"by": "el2n", "share": 0.5, "scores": str(SCORED)})[0]) == 12  # control


def test_a_file_of_scores_says_whose_they_are_and_replaces_no_other(tokenizer):
    examples = load(tokenizer)[0]
    loss = write(examples)
    table = pq.read_table(SCORED)
    assert table.column_names == ["row", "source", "length", "supervised", "loss", "el2n"]
    assert table["source"].to_pylist()[:2] == ["rows.jsonl, line 1", "rows.jsonl, line 2"]
    assert table["length"].to_pylist() == examples.lengths.tolist() and table["loss"].to_pylist() == loss.tolist()
    assert table["supervised"].to_pylist() == examples.supervised.tolist()
    check_target(SCORED)  # may be written anew
    check_target(Path("new/scored.parquet"))
    for other in (Path("rows.jsonl"), Path(".")):
        with pytest.raises(DataError, match="holds no scores: it would be replaced"):
            check_target(other)
    Path("full").write_text("")
    with pytest.raises(DataError, match="can't be written") as refused:
        write(examples, Path("full/scored.parquet"))
    assert refused.value.key == "--out"
