"""The study of unpadded trainers measures what it says: equal updates, a control that differs, times of the same work."""

from __future__ import annotations

import json

import numpy as np
import pytest

from results.page import RESULTS
from results.unpad import equality, ranks, speed
from results.unpad.cases import CASES, Words, dpo, long_tailed, masked, sequence, tiny
from results.unpad.equality import examine
from results.unpad.run import equality_lines

SMALL = speed.Timed(dpo, tiny("llama", 320), 320, long_tailed(12, 40, 64), 4)


@pytest.mark.ci
@pytest.mark.slow  # trains three times
@pytest.mark.parametrize(("build", "family"), [(dpo, "llama"), (sequence, "gpt2"), (masked, "roberta")])
def test_an_attached_trainer_takes_the_same_updates_and_the_control_does_not(build, family):
    found = examine(next(case for case in CASES if case.build is build), family, updates=2)
    assert found.way == "unpadded" and not found.refused
    assert max(found.loss, found.gradient, found.curve) < 1e-6 < 1e-3 < found.leaking


@pytest.mark.ci
@pytest.mark.slow  # trains
def test_a_trainer_that_cannot_be_attached_is_a_line_of_the_page():
    case = next(case for case in CASES if case.trainer.endswith("question answering"))
    found = examine(case, "bert", updates=1)
    assert "reads padding" in found.refused and found.way == ""
    other = examine(next(case for case in CASES if case.build is sequence), "bert", updates=1)
    lines = "\n".join(equality_lines([vars(found), vars(other)]))
    assert "Refused: Trainer, question answering (BERT)" in lines and "1 pairs of 1 trainers" in lines


@pytest.mark.ci
@pytest.mark.slow  # trains
def test_both_ways_are_timed_at_the_same_work(monkeypatch):
    monkeypatch.setitem(speed.CASES, "small", SMALL)
    found = speed.compare("small", rounds=1)
    assert [len(times) for times in found["seconds"].values()] == [1, 1] and 0.1 < found["padding"] < 0.9
    before, attached = (found["seconds"][way][0] for way in ("untouched", "attached"))
    assert found["faster"]["estimate"] == pytest.approx(before / attached)


@pytest.mark.ci
@pytest.mark.slow  # trains
def test_it_stops_where_losses_differ(monkeypatch):
    """Control: the second trainer learns faster."""

    def hurried(trainer):
        trainer.args.learning_rate *= 10
        return trainer

    monkeypatch.setitem(speed.CASES, "small", SMALL)
    monkeypatch.setitem(speed.WAYS, "attached", hurried)
    with pytest.raises(AssertionError, match="the losses differ"):
        speed.compare("small", rounds=1)


@pytest.mark.ci
@pytest.mark.slow  # trains
def test_orders_that_keep_updates_end_at_the_same_loss(monkeypatch, tmp_path):
    """Control: `group_by_length` makes other updates of the same examples."""
    sizes = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4
    )
    monkeypatch.setattr(ranks, "LLAMA", ranks.LLAMA | sizes)
    data, words = ranks.documents(24, seed=0, mean=16), Words(ranks.VOCABULARY, np.ones(1), 1)
    losses = {}
    for way in ranks.WAYS:
        trainer = ranks.build(way, data, data, words, str(tmp_path))
        trainer.train()
        losses[way] = trainer.evaluate()["eval_loss"]
    for way in ("attached", "batch_rebalance"):
        assert losses[way] == pytest.approx(losses["random"], rel=1e-6)
    assert losses["group_by_length"] != pytest.approx(losses["random"], rel=1e-6)


def test_the_stored_figures_hold():
    stored = json.loads((RESULTS / "unpad" / "bench.json").read_text(encoding="utf-8"))
    held = [one for one in stored["equality"] if not one["refused"]]
    assert len({one["trainer"] for one in held}) >= 10 and len({one["family"] for one in held}) >= 10
    assert max(one["loss"] for one in held) < 1e-6 and max(one["gradient"] for one in held) < 1e-5
    assert min(one["leaking"] for one in held) > 1e-3
    assert {one["trainer"] for one in stored["equality"]} == {case.trainer for case in CASES}
    assert {one["trainer"] for one in stored["speed"]} == set(speed.CASES)
    assert set(stored["ranks"]["seconds"]) == set(ranks.WAYS)
    assert equality.UPDATES == 20
