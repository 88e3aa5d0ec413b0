"""Batches, literally; and the loader from plan to tensors, each token once."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling as StockCollator
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from packtrain.errors import DataError, PlanError
from packtrain.modeling.tokenizer import train_bpe
from packtrain.objectives.logits import logits_at
from packtrain.packing.collator import MicroBatches, PackCollator
from packtrain.packing.plan import make_plan
from packtrain.packing.strategies import STRATEGIES
from packtrain.training.loader import PlanSampler
from tests.data.test_tokenised import reference
from tests.data.test_tokenised import rows as any_row
from tests.tiny import tiny_model

TWO = [
    {"input_ids": [5, 6, 7], "labels": [-100, -100, 7], "example_id": 4},
    {"input_ids": [8, 9], "labels": [8, 9], "example_id": 2},
]


def as_lists(batch: dict) -> dict:
    return {key: value.tolist() if torch.is_tensor(value) else value for key, value in batch.items()}


def test_flat_batch():
    batch = PackCollator(layout="flat", pad_token_id=0)(TWO)
    bounds = batch.pop("document_bounds")
    assert bounds.documents == (0, 3, 5)
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
        "supervised_index": [2, 4],
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
        "supervised_index": torch.int64,
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
        "supervised_index": [2, 4],
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


# --- rows of stock trainers ---------------------------------------------------------------------------------------


def drawn_rows(seed: int = 0, lengths: tuple[int, ...] = (9, 4, 13, 6)) -> list[dict]:
    generator = np.random.default_rng(seed)
    rows = [{"input_ids": generator.integers(3, 64, length).tolist()} for length in lengths]
    for row in rows:
        ones = np.ones(len(row["input_ids"]), dtype=int)
        row["completion_mask"], row["assistant_masks"] = ones.tolist(), generator.integers(0, 2, len(ones)).tolist()
        row["completion_mask"][:2] = [0, 0]
        row["assistant_masks"][-1] = 1
    return rows


def padded_to(rows: list[dict], width: int, side: str, pad_token_id: int = 0) -> list[dict]:
    """Rows as a tokenizer gives them with `padding="max_length"`; padding has labels of -100, if it has any."""

    def pad(values: list[int], fill: int) -> list[int]:
        more = [fill] * (width - len(values))
        return more + values if side == "left" else values + more

    fills = {"input_ids": pad_token_id, "labels": -100}
    return [
        {name: pad(values, fills.get(name, 0)) for name, values in row.items()}
        | {"attention_mask": pad([1] * len(row["input_ids"]), 0)}
        for row in rows
    ]


def loss_of(model, batch) -> float:
    inputs = {key: value for key, value in batch.items() if key not in ("loss_weights", "example_ids")}
    with torch.no_grad():
        return float(model(**inputs, use_cache=False).loss)


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_bpe([], vocab_size=262)
    assert tokenizer.pad_token_id not in range(3, 64)
    return tokenizer


@pytest.mark.parametrize("layout", ["flat", "padded"])
@pytest.mark.parametrize("side", [None, "right", "left"])
def test_labels_and_padding_have_the_loss_of_the_stock_collator(llama, tokenizer, layout, side):
    rows = [{"input_ids": row["input_ids"], "labels": [-100, -100, *row["input_ids"][2:]]} for row in drawn_rows()]
    if side:
        rows = padded_to(rows, 15, side)
    stock = loss_of(llama, DataCollatorForSeq2Seq(tokenizer)([dict(row) for row in rows]))
    assert loss_of(llama, PackCollator(layout=layout)(rows)) == pytest.approx(stock, rel=1e-5)


@pytest.mark.parametrize("layout", ["flat", "padded"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_without_labels_is_not_learnt(llama, tokenizer, layout, side):
    """The stock collator knows padding by its id; the control is the same rows without their attention_mask."""
    rows = padded_to([{"input_ids": row["input_ids"]} for row in drawn_rows()], 20, side, tokenizer.pad_token_id)
    batch = StockCollator(tokenizer, mlm=False)([dict(row) for row in rows])
    if side == "left":  # the stock collator has padding predict the first token
        batch["labels"][torch.arange(len(rows)), batch["attention_mask"].argmax(dim=1)] = -100
    ours = loss_of(llama, PackCollator(layout=layout)(rows))
    assert ours == pytest.approx(loss_of(llama, batch), rel=1e-5)
    unmasked = [{"input_ids": row["input_ids"]} for row in rows]
    assert abs(loss_of(llama, PackCollator(layout=layout)(unmasked)) - ours) > 0.01


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_flattened_rows_have_the_loss_of_the_stock_collator(llama, layout):
    rows = [{"input_ids": row["input_ids"], "labels": [-100, *row["input_ids"][1:]]} for row in drawn_rows()]
    stock = loss_of(llama, DataCollatorWithFlattening()([dict(row) for row in rows]))
    assert loss_of(llama, PackCollator(layout=layout)(rows)) == pytest.approx(stock, rel=1e-5)


@pytest.mark.parametrize("layout", ["flat", "padded"])
@pytest.mark.parametrize(
    "columns", [("completion_mask",), ("assistant_masks",), ("completion_mask", "assistant_masks")]
)
def test_masks_have_the_loss_that_trl_makes_of_them(llama, tokenizer, tmp_path, layout, columns):
    rows = [{name: row[name] for name in ("input_ids", *columns)} for row in drawn_rows()]
    args = SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", completion_only_loss=True, max_length=None
    )
    trl = SFTTrainer(llama, args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)
    for padding_free in (False, True):
        collator = DataCollatorForLanguageModeling(tokenizer.pad_token_id, padding_free=padding_free)
        stock = loss_of(llama, collator(list(trl.train_dataset)))
        ours = loss_of(llama, PackCollator(layout=layout)(rows))
        assert ours == pytest.approx(stock, rel=1e-5)
    without = loss_of(llama, PackCollator(layout=layout)([{"input_ids": row["input_ids"]} for row in rows]))
    assert abs(without - ours) > 0.001  # the masks do change it


@pytest.mark.parametrize("weighting", ["token", "example"])
@settings(max_examples=60, deadline=None)
@given(batch=st.lists(any_row(), min_size=1, max_size=4), side=st.sampled_from(["right", "left"]))
def test_layouts_hold_what_the_rule_says_of_every_row(weighting, batch, side):
    expected = [reference(row) for row in batch]
    flat = PackCollator(loss_weighting=weighting)(batch)
    padded = PackCollator(layout="padded", padding_side=side, loss_weighting=weighting)(batch)
    bounds = flat["cu_seq_lens_q"].tolist()
    for number, (ids, labels) in enumerate(expected):
        here, real = slice(*bounds[number : number + 2]), padded["attention_mask"][number].bool()
        for values in (
            {name: value[0, here] for name, value in flat.items() if name in ("input_ids", "labels", "loss_weights")},
            {name: padded[name][number][real] for name in ("input_ids", "labels", "loss_weights")},
        ):
            assert values["input_ids"].tolist() == ids
            assert values["labels"].tolist() == [-100, *labels[1:]]
            learnt = [float(label != -100) for label in values["labels"]]
            each = max(sum(learnt), 1) if weighting == "example" else 1
            assert np.allclose(values["loss_weights"], [weight / each for weight in learnt])
        assert (padded["labels"][number][~real] == -100).all()


@pytest.mark.parametrize("removed", [False, True])
def test_masks_reach_the_collator_where_a_stock_trainer_keeps_them(llama, tmp_path, removed):
    rows = drawn_rows()
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", remove_unused_columns=removed)
    data = datasets.Dataset.from_list([row | {"text": "one"} for row in rows])
    trainer = Trainer(llama, args, train_dataset=data, data_collator=PackCollator())
    (batch,) = trainer.get_train_dataloader()
    expected = sum(label != -100 for row in rows for label in reference(row)[1][1:])
    everything = sum(len(row["input_ids"]) - 1 for row in rows)
    assert (batch["labels"] != -100).sum() == (everything if removed else expected) and expected < everything


def test_errors_name_the_row_of_the_batch():
    with pytest.raises(DataError, match="row 1 of the batch: completion_mask: .* has 1 entries for 2") as refused:
        PackCollator()([*TWO[:1], {"input_ids": [8, 9], "completion_mask": [1]}])
    assert refused.value.fix
    with pytest.raises(DataError, match="row 1 of the batch: example_id: must be a whole number"):
        PackCollator()([{"input_ids": [1]}, {"input_ids": [1], "example_id": "a"}])


def test_columns_that_are_not_used_are_logged_once(caplog):
    collator = PackCollator()
    plain = [{"input_ids": [1, 2], "labels": [1, 2]}]
    collator(plain)
    assert not caplog.messages
    for _ in range(2):
        collator([plain[0] | {"text": "one", "length": 2}])
    assert caplog.messages == ["packtrain: PackCollator does not use length, text of the rows"]
    collator([plain[0] | {"text": "one", "labels": [1, 2], "completion_mask": [0, 1]}])
    assert caplog.messages[1:] == ["packtrain: PackCollator does not use completion_mask of the rows"]


def test_rows_of_which_every_token_is_supervised_are_logged_once(caplog):
    """A stock Trainer has taken the masks away by then; nothing else tells such rows from text."""
    PackCollator()([{"input_ids": [1, 2], "completion_mask": [0, 1]}])
    assert not caplog.messages
    collator = PackCollator()
    collator([{"input_ids": [1, 2]}]), collator([{"input_ids": [1, 2], "labels": None}])
    (message,) = caplog.messages
    assert (
        "no labels and no masks, so every token is supervised" in message and "remove_unused_columns=False" in message
    )


def test_columns_instead_of_rows_are_refused():
    """What a `datasets.Dataset` gives for several indices."""
    with pytest.raises(DataError, match="features: is one mapping of columns(.|\n)*dataset.i. for i in ids"):
        PackCollator()({"input_ids": [[1, 2], [3]], "labels": [[1, 2], [3]]})


def test_a_weighting_that_stock_trainers_ignore_is_logged_once(caplog):
    for weighting, count in (("token", 0), ("example", 1)):
        caplog.clear()
        collator = PackCollator(loss_weighting=weighting)
        collator(TWO), collator(TWO)
        assert sum("transformers.Trainer and TRL ignore" in message for message in caplog.messages) == count


def test_a_stock_trainer_ignores_the_weights(llama):
    """What the log says is so: the model's own loss is the same for both weightings, and ours is not."""
    rows = drawn_rows()
    batches = [PackCollator(loss_weighting=weighting)(rows) for weighting in ("token", "example")]
    with torch.no_grad():
        token, example = (float(llama(**batch, use_cache=False).loss) for batch in batches)
        learnt = batches[0]["labels"] != -100
        logits = logits_at(llama, batches[0], learnt[0].nonzero()[:, 0] - 1)
    assert token == example
    nll = torch.nn.functional.cross_entropy(logits, batches[0]["labels"][learnt], reduction="none")
    weights = [batch["loss_weights"][learnt] for batch in batches]
    by_token, by_example = (float(weight @ nll / weight.sum()) for weight in weights)
    assert by_token == pytest.approx(token, rel=1e-5) and abs(by_example - by_token) > 1e-3


# --- from a plan --------------------------------------------------------------------------------------------------


class Tokens:
    """The smallest thing that batches are made of: token t of example i is 1000 * i + t."""

    def __init__(self, lengths):
        self.lengths, self.supervised = np.asarray(lengths), np.asarray(lengths) - 1

    def gather(self, example_ids, starts, stops):
        pieces = [1000 * i + np.arange(a, b) for i, a, b in zip(example_ids, starts, stops, strict=True)]
        ids = np.concatenate(pieces)
        return ids, np.where(ids % 1000 == 0, -100, ids)

    def factors(self, example_ids, starts, stops):
        return None

    def extras(self, example_ids):
        return {}


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
