"""The benchmark of `attach` compares what is the same: it stops where losses differ."""

from __future__ import annotations

from functools import partial

import pytest

from packtrain.modeling.tokenizer import train_bpe
from results.attach import run as bench_attach
from results.attach.run import compare, documents, sft, stock

TINY = dict(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
TINY |= dict(num_key_value_heads=4)


@pytest.mark.ci
@pytest.mark.slow  # trains twice
@pytest.mark.parametrize("build", [stock, sft])
def test_both_ways_take_the_same_steps(build, tmp_path):
    data = documents(16, 320)
    tokenizer = train_bpe(["some words"] * 10, vocab_size=300)
    found = compare(partial(build, data, tokenizer, str(tmp_path), **TINY), rounds=1)
    assert len(found["losses"]["before"]) == bench_attach.UPDATES
    assert [len(elapsed) for elapsed in found["seconds"]["attached"]] == [bench_attach.UPDATES - 1]
    before, attached = (sum(found["seconds"][way][0]) for way in ("before", "attached"))
    assert found["faster"]["estimate"] == pytest.approx(before / attached) and found["faster"]["low"] is None
    assert found["largest_relative_loss_difference"] < 1e-4


@pytest.mark.ci
@pytest.mark.slow
def test_it_stops_where_losses_differ(tmp_path):
    """Control: the second trainer learns faster."""
    data, made = documents(16, 320), []
    tokenizer = train_bpe(["some words"] * 10, vocab_size=300)

    def build():
        trainer = stock(data, tokenizer, str(tmp_path), **TINY)
        trainer.args.learning_rate *= 1 + len(made)
        made.append(trainer)
        return trainer

    with pytest.raises(AssertionError, match="the losses differ"):
        compare(build, rounds=1)
