"""Batches, literally; and the loader from plan to tensors, each token once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from packtrain.errors import DataError, PlanError
from packtrain.packing.collator import MicroBatches, PackCollator
from packtrain.packing.plan import make_plan
from packtrain.packing.strategies import STRATEGIES
from packtrain.training.loader import PlanSampler

TWO = [
    {"input_ids": [5, 6, 7], "labels": [-100, -100, 7], "example_id": 4},
    {"input_ids": [8, 9], "labels": [8, 9], "example_id": 2},
]


def as_lists(batch: dict) -> dict:
    return {key: value.tolist() if torch.is_tensor(value) else value for key, value in batch.items()}


def test_flat_batch():
    batch = PackCollator(layout="flat", pad_token_id=0)(TWO)
    assert as_lists(batch) == {
        "input_ids": [[5, 6, 7, 8, 9]],
        "labels": [[-100, -100, 7, -100, 9]],
        "position_ids": [[0, 1, 2, 0, 1]],
        "cu_seq_lens_q": [0, 3, 5],
        "cu_seq_lens_k": [0, 3, 5],
        "max_length_q": 3,
        "max_length_k": 3,
        "seq_idx": [[0, 0, 0, 1, 1]],
        "loss_weights": [[0.0, 0.0, 1.0, 0.0, 1.0]],
        "example_ids": [4, 2],
    }
    assert {key: value.dtype for key, value in batch.items() if torch.is_tensor(value)} == {
        "input_ids": torch.int64,
        "labels": torch.int64,
        "position_ids": torch.int64,
        "cu_seq_lens_q": torch.int32,
        "cu_seq_lens_k": torch.int32,
        "seq_idx": torch.int32,
        "loss_weights": torch.float32,
        "example_ids": torch.int64,
    }
    assert type(batch["max_length_q"]) is int


def test_padded_batch():
    batch = PackCollator(layout="padded", pad_token_id=3)(TWO)
    assert as_lists(batch) == {
        "input_ids": [[5, 6, 7], [8, 9, 3]],
        "labels": [[-100, -100, 7], [-100, 9, -100]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "position_ids": [[0, 1, 2], [0, 1, 2]],
        "loss_weights": [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]],
        "example_ids": [4, 2],
    }


def test_padded_left_and_to_max_length():
    collator = PackCollator(
        layout="padded", pad_token_id=3, padded_to="max_length", max_length=4, padding_side="left", position_start=2
    )
    batch = as_lists(collator(TWO))
    assert batch["input_ids"] == [[3, 5, 6, 7], [3, 3, 8, 9]]
    assert batch["labels"] == [[-100, -100, -100, 7], [-100, -100, -100, 9]]
    assert batch["attention_mask"] == [[0, 1, 1, 1], [0, 0, 1, 1]]
    assert batch["position_ids"] == [[2, 2, 3, 4], [2, 2, 2, 3]]


def test_position_start():
    assert PackCollator(position_start=2)(TWO)["position_ids"].tolist() == [[2, 3, 4, 2, 3]]


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_example_weighting(layout):
    """Each example weighs one: four supervised tokens get a quarter each, one supervised token gets one."""
    rows = [{"input_ids": [1, 2, 3, 4, 5]}, {"input_ids": [6, 7, 8], "labels": [-100, -100, 8]}]
    weights = PackCollator(layout=layout, loss_weighting="example")(rows)["loss_weights"]
    flat = [0, 0.25, 0.25, 0.25, 0.25, 0, 0, 1]
    assert weights.flatten().tolist() == (flat if layout == "flat" else [*flat, 0, 0])


def test_labels_default_to_the_input_ids_and_are_not_changed():
    ids = np.array([1, 1, 1])
    batch = PackCollator(pad_token_id=1)([{"input_ids": ids}, {"input_ids": ids, "labels": None}])
    assert batch["labels"].tolist() == [[-100, 1, 1, -100, 1, 1]]
    assert ids.tolist() == [1, 1, 1]


def test_a_real_end_token_keeps_its_label_where_it_is_also_the_padding_token():
    batch = PackCollator(layout="padded", pad_token_id=9)(TWO)
    assert batch["labels"].tolist() == [[-100, -100, 7], [-100, 9, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize(
    ("layout", "extra"), [("flat", {}), ("padded", {}), ("padded", {"padded_to": "max_length", "max_length": 6})]
)
def test_filler(layout, extra):
    batch = PackCollator(layout=layout, pad_token_id=7, **extra).empty()
    width = extra.get("max_length", 2)
    assert batch["input_ids"].tolist() == [[7] * width]
    assert batch["labels"].tolist() == [[-100] * width]
    assert batch["loss_weights"].sum() == 0 and batch["example_ids"].tolist() == [-1]
    if layout == "flat":
        assert batch["cu_seq_lens_q"].tolist() == [0, 2]
    else:
        assert batch["attention_mask"].sum() == 2  # a row of zeros would make NaN in a softmax


def test_bad_rows_and_options():
    for rows in ([{"input_ids": []}], [{"input_ids": [1, 2], "labels": [1]}], [{"input_ids": [[1, 2]]}]):
        with pytest.raises(DataError, match="row 0 of the batch"):
            PackCollator()(rows)
    with pytest.raises(PlanError, match="does not fit into a row of 2"):
        PackCollator(layout="padded", padded_to="max_length", max_length=2)(TWO)
    for options in ({"layout": "flatt"}, {"loss_weighting": "tokens"}, {"padded_to": "max_length"}):
        with pytest.raises(PlanError):
            PackCollator(**options)


class Tokens:
    """The smallest thing with `gather`, `factors` and `supervised`: token t of example i is 1000 * i + t."""

    def __init__(self, lengths):
        self.lengths, self.supervised = np.asarray(lengths), np.asarray(lengths) - 1

    def gather(self, example_ids, starts, stops):
        pieces = [1000 * i + np.arange(a, b) for i, a, b in zip(example_ids, starts, stops, strict=True)]
        ids = np.concatenate(pieces)
        return ids, np.where(ids % 1000 == 0, -100, ids)

    def factors(self, example_ids, starts, stops):
        return None


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("workers", [0, 2])
def test_from_plan_to_tensors(name, workers, sft_lengths):
    """All ranks together see every token once, every example weighs one, and resuming is starting later."""
    if workers and name not in ("balanced", "bfd"):
        pytest.skip("worker processes are tried with one strategy of each scope")
    lengths = sft_lengths[:100] % 300 + 2
    plan = make_plan(lengths, strategy=name, world_size=3, max_tokens=400, examples_per_step=30)
    strategy = STRATEGIES[name]
    collator = PackCollator(
        layout=plan.layout, padded_to=strategy.padded_to, max_length=int(lengths.max()), loss_weighting="example"
    )
    tokens, weights = [], np.zeros(len(lengths))
    for rank in range(3):
        sampler = PlanSampler(plan, rank)
        loader = DataLoader(
            MicroBatches(Tokens(lengths), collator), sampler=sampler, batch_size=None, num_workers=workers
        )
        batches = list(loader)
        assert len(batches) == len(sampler) == len(loader) == plan.total_steps * plan.gradient_accumulation_steps
        later = list(DataLoader(loader.dataset, sampler=PlanSampler(plan, rank, start_step=2), batch_size=None))
        skipped = 2 * plan.gradient_accumulation_steps
        assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches[skipped:], later, strict=True))
        for batch in batches:
            if batch["example_ids"].tolist() == [-1]:
                continue
            real = batch["attention_mask"].bool() if plan.layout == "padded" else torch.ones_like(batch["labels"]) > 0
            tokens += batch["input_ids"][real].tolist()
            np.add.at(weights, batch["input_ids"][real].numpy() // 1000, batch["loss_weights"][real].double().numpy())
    assert sorted(tokens) == [1000 * i + t for i in range(len(lengths)) for t in range(lengths[i])]
    if strategy.splits:  # a piece's first token has nothing to be predicted from: its weight is lost, and no more
        cut = lengths - 1 - np.round(weights * (lengths - 1))
        assert cut.min() == 0 and 0 < cut.sum() < plan.total_steps * 30
        assert np.allclose(weights, 1 - cut / (lengths - 1), atol=1e-5)
    else:
        assert np.allclose(weights, 1, atol=1e-5)
