"""The study of the leak says what its runs say, and its leak is one."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from packtrain.modeling.attention.varlen import register
from packtrain.objectives.causal import CAUSAL_LM
from packtrain.packing.collator import collate_flat
from results.epoch_packing.run import BFD, SMALL
from results.leak_cost import run as study

SEEDS = 6


def one_run(train: float, single: float, packs: float, capacity: int) -> dict:
    return {"train": train, "single": single, "packs": packs, "updates": 22, "capacity": capacity, "documents": 17.0}


@pytest.fixture
def runs() -> dict:
    """Seeds that differ by far more than the ways. In large packs the leak is 0.01 worse on single documents and trains
    0.03 lower; in small ones it changes nothing."""
    ways: dict[str, dict[str, list]] = {packs: {study.ISOLATED: [], study.LEAKING: []} for packs in study.PACKS}
    for seed in range(SEEDS):
        level, noise = 2.5 + 0.2 * seed, 0.001 * (-1) ** seed
        ways[BFD][study.ISOLATED].append(one_run(level, level, level + 0.1, 4096))
        ways[BFD][study.LEAKING].append(one_run(level - 0.03, level + 0.01, level - 0.02, 4096))
        ways[SMALL][study.ISOLATED].append(one_run(level, level, level + 0.1, 940))
        ways[SMALL][study.LEAKING].append(one_run(level + noise, level + noise, level + noise, 940))
    return ways


def test_ways_are_paired_by_seed_and_the_page_says_so(runs):
    found = study.compare_ways(runs)
    single = found[BFD]["differences"]["single"]
    assert single["estimate"] == pytest.approx(0.01) and single["low"] > 0
    assert found[BFD]["hidden"]["estimate"] == pytest.approx(-0.03)
    assert np.std([one["single"] for one in runs[BFD][study.ISOLATED]]) > 0.2, "control: pairs are needed to see it"
    result: dict = {
        "found": found,
        "base": {"parameters": 1000},
        "untrained": {"4,096": {"single": 3.0, "packs": 3.25}},
    }
    result |= {"rates": {BFD: 0.002, SMALL: 0.001}, "command": "python results/leak_cost/run.py", "threads": 1}
    result |= {"machine": {"cpu": "a", "cores": 1, "memory_gib": 1}, "packages": {"torch": "1", "transformers": "2"}}
    page = study.markdown(json.loads(json.dumps(result)))
    assert "| 4,096 tokens, 17.0 documents | held out, single documents | 3.0000 | 3.0100 | **+0.0100" in page
    assert "the model that leaked is worse by 0.0100. Its training loss is lower by 0.0300." in page
    assert "can't be told from the other" in page and "held-out loss by +0.2500 in packs of 4,096 tokens" in page
    assert "0.002 (`bfd`), 0.001 (`bfd, small packs`)" in page


def test_packs_without_a_finished_seed_are_left_out(runs):
    runs[SMALL] = {study.ISOLATED: [], study.LEAKING: []}
    assert list(study.compare_ways(runs)) == [BFD]


def test_the_leak_is_one():
    """Another first document changes the losses of the second under the leak, and only there."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation=register()).eval()
    lengths = np.array([6, 5])

    def losses(first: int, leaking: bool) -> torch.Tensor:
        ids = np.array([first] * 6 + [7, 8, 9, 10, 11])
        batch = collate_flat(ids, ids.copy(), lengths, np.arange(2))
        assert batch["position_ids"].flatten().tolist() == [*range(6), *range(5)]
        batch = study.leak(batch) if leaking else batch
        assert (
            batch["position_ids"].flatten().tolist() == [*range(6), *range(5)] and len(batch["supervised_index"]) == 9
        )
        with torch.no_grad():
            return CAUSAL_LM.losses(model, batch).nll

    assert torch.equal(losses(3, False)[5:], losses(4, False)[5:]), "control: isolated documents keep their losses"
    assert (losses(3, True)[5:] - losses(4, True)[5:]).abs().max() > 1e-4
    assert torch.allclose(losses(3, True)[:5], losses(3, False)[:5], atol=1e-6), "nothing is before the first document"
