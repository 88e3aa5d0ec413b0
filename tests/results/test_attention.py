"""The benchmarks compare like with like: the same documents, the same loss, whatever the layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from packtrain.modeling.attention.varlen import register
from results.attention import run as bench_attention
from results.attention.run import ROW, WAYS, batches, bench_steps, long_tailed_lengths, markdown
from results.encoder import run as bench_encoder
from tests.tiny import CONFIGS


def test_lengths_add_up_and_have_a_long_tail():
    for documents, tokens in ((48, 8_300), (72, 12_700), (47, 8_192)):
        lengths = long_tailed_lengths(documents, tokens)
        assert len(lengths) == documents and lengths.sum() == tokens
        assert 0 < lengths.min() and lengths.max() <= ROW
        assert lengths.max() > 5 * np.median(lengths)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_every_way_computes_every_document_once(way):
    lengths = long_tailed_lengths(20, 1_500)
    made = batches(way, lengths, vocabulary=64)
    assert sorted(i for batch in made for i in batch["example_ids"].tolist()) == list(range(20))
    supervised = sum((batch["labels"] != -100).sum().item() for batch in made)
    first_third = sum(max(1, length // 3) for length in lengths.tolist())
    assert supervised == 1_500 - first_third
    assert (sum(batch["input_ids"].numel() for batch in made) == 1_500) == (way.rows is None)


def test_the_whole_of_it_on_a_tiny_model(monkeypatch):
    """Loss and gradient norm of every way are compared inside; a way that computes something else would stop it."""
    register()
    monkeypatch.setitem(bench_attention.CASES, "tiny", (CONFIGS["llama"] | {"vocab_size": 64}, 12, 600))
    monkeypatch.setattr(bench_attention, "ROW", 256)
    found = bench_steps("tiny", rounds=1)
    assert set(found["relative"]) == {way.name for way in WAYS} and found["relative"]["pad_longest"] == 1
    result = {
        "steps": {"tiny": found},
        "attention_alone": bench_attention.bench_attention(1, tokens=300, documents=6, heads=2, dim=8),
        "machine": {"cpu": "some", "cores": 2},
        "packages": {"torch": "2", "transformers": "5"},
        "threads": 1,
        "rounds": 1,
        "command": "python results/attention/run.py",
    }
    assert "| pad_longest | 1.00 |" in markdown(result)


def test_encoder_ways_are_the_same_computation():
    register()
    torch.manual_seed(0)
    config = bench_encoder.BertConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=2,
        intermediate_size=48,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = bench_encoder.AutoModel.from_config(config, add_pooling_layer=False).train()
    found = bench_encoder.bench(model, longest=20, limit=0)
    assert found["largest_output_difference"] < 1e-5 and found["relative_gradient_difference"] < 1e-5
    lengths = [len(row["input_ids"]) for row in bench_encoder.texts(100)]
    assert (max(lengths), min(lengths), len(lengths)) == (100, 20, 16)
    assert found["tokens"] == sum(len(row["input_ids"]) for row in bench_encoder.texts(20))
