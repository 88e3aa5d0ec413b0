"""`packtrain.attach` asks the trainer itself whether its loss stays: what it can't follow is refused, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForTokenClassification,
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

import packtrain
from packtrain.errors import PacktrainError
from packtrain.modeling.tokenizer import train_bpe
from packtrain.plugin.proof import documents_to_ask
from tests.plugin.helpers import COMMON, pad
from tests.plugin.test_attach import assert_same, losses
from tests.tiny import random_documents, tiny_model
from tests.training.helpers import long_tailed_lengths

BERT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
BERT |= dict(vocab_size=320, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_bpe(["two and three", "what is four times nine"] * 20, vocab_size=300)


@pytest.fixture(scope="module")
def documents() -> datasets.Dataset:
    return datasets.Dataset.from_list(random_documents(long_tailed_lengths(30)))


def make(output_dir, documents, *, cls=Trainer, model=None, collator=pad, **changes) -> Trainer:
    args = TrainingArguments(output_dir=str(output_dir), **COMMON | changes)
    return cls(model or tiny_model("llama"), args, train_dataset=documents, data_collator=collator)


class MeanOfRows(Trainer):
    """Every example weighs the same, however long."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model(**inputs).logits[:, :-1].transpose(1, 2)
        losses = cross_entropy(logits, labels[:, 1:], ignore_index=-100, reduction="none")
        return (losses.sum(1) / (labels[:, 1:] != -100).sum(1)).mean()


class MeanOfTokens(Trainer):
    """A mean over each micro-batch: the same in both layouts, but of micro-batches, not of the update."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs).loss


class ReadsTheMask(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        assert inputs["attention_mask"].any()
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def second_half(features: list[dict]) -> dict[str, torch.Tensor]:
    """A collator that decides what is learnt."""
    batch = pad(features)
    for row, feature in zip(batch["labels"], features, strict=True):
        row[: len(feature["input_ids"]) // 2] = -100
    return batch


def bert() -> nn.Module:
    torch.manual_seed(0)
    return BertForTokenClassification(BertConfig(**BERT))


@pytest.mark.parametrize("strategy", ["balanced", "pad_longest"])
def test_a_loss_of_whole_rows_is_refused(tmp_path, documents, strategy, caplog):
    if strategy == "pad_longest":  # control: there rows stay rows, and one micro-batch is the update
        packtrain.attach(make(tmp_path, documents, cls=MeanOfRows, gradient_accumulation_steps=1), strategy=strategy)
        assert "documents is" in caplog.text and "as before" in caplog.text
        return
    trainer = make(tmp_path, documents, cls=MeanOfRows)
    with pytest.raises(PacktrainError, match="which row a token is in"):
        packtrain.attach(trainer, layout="flat")
    assert packtrain.attach(trainer, strategy=strategy, allow_differences=True) is trainer
    assert "which row a token is in" in caplog.text


def test_a_refused_trainer_is_as_it_was(tmp_path, documents):
    before = losses(make(tmp_path, documents, cls=MeanOfRows))
    refused = make(tmp_path, documents, cls=MeanOfRows)
    implementation, use_cache = refused.model.config._attn_implementation, refused.model.config.use_cache
    with pytest.raises(PacktrainError):
        packtrain.attach(refused, layout="flat")
    config = refused.model.config
    assert (config._attn_implementation, config.use_cache) == (implementation, use_cache)
    assert_same(losses(refused), before)


def test_asking_draws_no_random_numbers_and_leaves_training_mode(tmp_path, documents):
    trainer = make(tmp_path, documents)
    trainer.model.train()
    state = torch.get_rng_state()
    packtrain.attach(trainer, max_tokens=np.int64(4096))
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.model.training


def test_labels_that_the_collator_makes_are_refused(tmp_path, documents):
    with pytest.raises(
        PacktrainError, match=r"rows \d+.*its collator makes \d+ labels of them, and packtrain reads \d+"
    ):
        packtrain.attach(make(tmp_path, documents, collator=second_half), layout="flat")
    without = documents.remove_columns("labels").add_column("labels", [ids for ids in documents["input_ids"]])
    packtrain.attach(make(tmp_path, without))  # control: the same data, and a collator that makes none


def test_an_end_token_that_is_also_the_padding_is_noticed(tmp_path, tokenizer):
    """The collator of transformers takes every such token for padding, the real ones, too."""
    rows = [[5 + i % 7, 6, 7, tokenizer.eos_token_id] * (1 + i % 3) for i in range(20)]
    ends = datasets.Dataset.from_dict({"input_ids": rows})
    shared = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    packtrain.attach(make(tmp_path, ends, collator=shared))  # control: another token pads
    before, tokenizer.pad_token = tokenizer.pad_token, tokenizer.eos_token
    try:
        with pytest.raises(PacktrainError, match=r"makes \d+ labels of them"):
            packtrain.attach(make(tmp_path, ends, collator=shared), layout="flat")
    finally:
        tokenizer.pad_token = before


def test_a_truncating_collator_is_noticed(tmp_path, documents):
    def shortened(features):
        return {name: rows[:, :12] for name, rows in pad(features).items()}

    with pytest.raises(PacktrainError, match=r"makes \d+ tokens of them, and train_dataset has \d+"):
        packtrain.attach(make(tmp_path, documents, collator=shortened), layout="flat")


def test_other_inputs_of_the_model_are_noticed(tmp_path, documents, tokenizer):
    tagged = documents.map(lambda row: {"token_type_ids": [i % 2 for i in range(len(row["input_ids"]))]})
    tagged = tagged.map(lambda row: {"labels": [-100] + [token % 2 for token in row["labels"][1:]]})
    collator = DataCollatorForTokenClassification(tokenizer)
    with pytest.raises(PacktrainError, match="its batches also have token_type_ids"):
        packtrain.attach(make(tmp_path, tagged, model=bert(), collator=collator), layout="flat")
    packtrain.attach(make(tmp_path, tagged.remove_columns("token_type_ids"), model=bert(), collator=collator))


def test_a_loss_that_learns_first_tokens_is_refused(tmp_path, documents, tokenizer):
    classes = documents.map(lambda row: {"labels": [token % 2 for token in row["input_ids"]]})
    collator = DataCollatorForTokenClassification(tokenizer)
    with pytest.raises(PacktrainError, match="includes the labels of first tokens.*set them to -100"):
        packtrain.attach(make(tmp_path, classes, model=bert(), collator=collator), layout="flat")


@pytest.mark.parametrize("labels", [1, 5])
def test_a_label_for_a_whole_row_is_refused(tmp_path, documents, tokenizer, labels):
    config = AutoConfig.for_model("bert", **BERT, num_labels=labels)
    column = [float(i % 3) if labels == 1 else i % 5 for i in range(len(documents))]
    rows = documents.remove_columns("labels").add_column("label", column)
    model = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(PacktrainError, match="its collator makes 4 labels|training would fail on packtrain's batches"):
        packtrain.attach(make(tmp_path, rows, model=model, collator=DataCollatorWithPadding(tokenizer)), layout="flat")


def test_a_loss_that_asks_for_what_is_not_there_is_refused_before_training(tmp_path, documents):
    with pytest.raises(PacktrainError, match="would fail on packtrain's batches: KeyError: 'attention_mask'"):
        packtrain.attach(make(tmp_path, documents, cls=ReadsTheMask), layout="flat")
    packtrain.attach(make(tmp_path, documents, cls=ReadsTheMask), strategy="pad_longest")


def test_a_denominator_that_counts_first_tokens_is_kept_or_said(tmp_path, documents, caplog):
    """transformers doesn't know that GPT-2 shifts its labels, and counts those of first tokens."""
    everything = documents.remove_columns("labels").add_column("labels", [ids for ids in documents["input_ids"]])
    with pytest.raises(PacktrainError, match="labels of first tokens.*counted"):
        packtrain.attach(make(tmp_path, everything, model=tiny_model("gpt2")), layout="flat")
    packtrain.attach(make(tmp_path, everything, model=tiny_model("gpt2")), allow_differences=True)
    assert "the trainer counted" in caplog.text
    before = losses(make(tmp_path, everything, model=tiny_model("gpt2")))
    assert_same(losses(packtrain.attach(make(tmp_path, everything, model=tiny_model("gpt2")))), before)
    caplog.clear()
    packtrain.attach(make(tmp_path, everything), layout="flat")  # control: it knows of llama
    assert "the trainer counted" not in caplog.text


def test_a_mean_of_means_is_refused_or_said(tmp_path, documents, caplog):
    with pytest.raises(PacktrainError, match="mean of each micro-batch"):
        packtrain.attach(make(tmp_path, documents, cls=MeanOfTokens), layout="flat")
    with pytest.raises(PacktrainError, match="not a number for a micro-batch without labels"):
        few = documents.select(range(25))
        packtrain.attach(make(tmp_path, few, cls=MeanOfTokens), layout="flat", allow_differences=True)
    packtrain.attach(make(tmp_path, documents, cls=MeanOfTokens), allow_differences=True)
    assert "mean of micro-batches' means" in caplog.text
    caplog.clear()
    packtrain.attach(make(tmp_path, documents, cls=MeanOfTokens, gradient_accumulation_steps=1), layout="flat")
    packtrain.attach(make(tmp_path, documents, label_smoothing_factor=0.1), layout="flat")
    assert "mean of micro-batches' means" not in caplog.text


# What is refused without asking


class OwnLoader(Trainer):
    def get_train_dataloader(self):
        return DataLoader(self.train_dataset.select(range(8)), batch_size=4, collate_fn=self.data_collator)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, input_ids, labels):
        return self.layer(input_ids)


def test_what_packtrain_cannot_follow_is_refused(tmp_path, documents):
    def refused(message: str, options: dict | None = None, **changes):
        with pytest.raises(PacktrainError, match=message):
            packtrain.attach(
                make(tmp_path, **{"documents": documents} | changes), **{"layout": "flat"} | (options or {})
            )

    refused("trainer: has its own `get_train_dataloader`", cls=OwnLoader)
    refused("train_dataset: has a transform", documents=documents.with_transform(lambda rows: rows))
    refused("from_list", documents=list(documents))
    refused("trainer.model: must be a transformers model", model=Plain())
    refused("strategy: must be the name of a strategy", {"strategy": None})
    for tokens in ("64", -5, 0):
        refused("max_tokens: must be a positive integer", {"max_tokens": tokens})
    refused("max_tokens: has no effect", {"max_tokens": 64, "layout": "unpad"})
    bart = BartConfig(vocab_size=320, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16)
    refused("trainer.model: reads two sequences", model=BartForConditionalGeneration(bart))
    args = TrainingArguments(output_dir=str(tmp_path), **COMMON)
    builds = Trainer(model_init=lambda: tiny_model("llama"), args=args, train_dataset=documents, data_collator=pad)
    with pytest.raises(PacktrainError, match="trainer.model_init: builds another model"):
        packtrain.attach(builds)


def test_a_bad_row_is_reported_with_what_can_be_done_here(tmp_path):
    rows = datasets.Dataset.from_dict({"input_ids": [[5, 6], []]})
    with pytest.raises(PacktrainError, match="row 1.*\n.*train_dataset.filter"):
        packtrain.attach(make(tmp_path, rows))
    with pytest.raises(PacktrainError, match="must have rows with a column 'input_ids'.*\n.*tokenise the rows"):
        packtrain.attach(make(tmp_path, datasets.Dataset.from_dict({"text": ["one"]})))


# Between attaching and training


@pytest.mark.parametrize(
    ("name", "value"), [("num_train_epochs", 4), ("max_steps", 3), ("gradient_accumulation_steps", 1)]
)
def test_settings_that_change_after_attaching_are_refused(tmp_path, documents, name, value):
    trainer = packtrain.attach(make(tmp_path, documents))
    setattr(trainer.args, name, value)
    with pytest.raises(PacktrainError, match=f"{name}: has changed since the trainer was attached"):
        trainer.train()


def test_another_dataset_after_attaching_is_refused(tmp_path, documents):
    trainer = packtrain.attach(make(tmp_path, documents))
    trainer.train_dataset = documents.select(range(10))
    with pytest.raises(PacktrainError, match="train_dataset: has changed"):
        trainer.train()


def masked(features: list[dict]) -> dict[str, torch.Tensor]:
    batch = pad(features)
    batch["labels"][:, :3] = -100
    return batch


def loss_of_all(outputs, labels, num_items_in_batch=None):
    return outputs.logits.float().logsumexp(-1).mean()


OTHERS: dict[str, Callable[[Trainer], Any]] = {
    "data_collator: has changed": lambda trainer: setattr(trainer, "data_collator", masked),
    "compute_loss_func: has changed": lambda trainer: setattr(trainer, "compute_loss_func", loss_of_all),
    "compute_loss: has changed": lambda trainer: setattr(trainer, "compute_loss", lambda *given, **named: None),
    "trainer.model: has changed": lambda trainer: setattr(trainer, "model", tiny_model("llama")),
    "attn_implementation: has changed": lambda trainer: trainer.model.set_attn_implementation("eager"),
    "train_dataset: has a transform": lambda trainer: trainer.train_dataset.set_transform(dict),
    "dataloader_drop_last: must be False": lambda trainer: setattr(trainer.args, "dataloader_drop_last", True),
    "train_sampling_strategy: does not go": lambda trainer: setattr(
        trainer.args, "train_sampling_strategy", "group_by_length"
    ),
}


@pytest.mark.parametrize("message", OTHERS)
def test_what_the_proof_was_of_does_not_change_after_attaching(tmp_path, documents, message):
    trainer = packtrain.attach(make(tmp_path, documents.select(range(30))))
    OTHERS[message](trainer)
    with pytest.raises(PacktrainError, match=message):
        trainer.train()


def test_another_loss_does_not_read_the_padding_of_an_unpadded_model(tmp_path, documents):
    trainer = packtrain.attach(make(tmp_path, documents, max_steps=2), layout="unpad")
    trainer.train()  # control
    trainer.compute_loss_func = loss_of_all
    with pytest.raises(PacktrainError, match="compute_loss_func: has changed"):
        trainer.train()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_of_an_attached_trainer_does_not_train_on_the_progress_of_another(tmp_path, documents, copied):
    before = losses(make(tmp_path, documents))
    with pytest.raises(PacktrainError, match="is a copy of an attached trainer.*\n.*copy it, then attach"):
        copied(packtrain.attach(make(tmp_path, documents))).train()
    assert_same(losses(packtrain.attach(copied(make(tmp_path, documents)))), before)


def test_a_seed_set_after_attaching_orders_examples_as_it_would_have(tmp_path, documents):
    def seeded(trainer: Trainer, seed: int) -> tuple[np.ndarray, np.ndarray]:
        set_seed(seed)
        return losses(trainer)

    before = seeded(make(tmp_path, documents), 7)
    assert_same(seeded(packtrain.attach(make(tmp_path, documents)), 7), before)
    other = seeded(packtrain.attach(make(tmp_path, documents)), 8)
    assert np.abs(other[0] - before[0]).max() > 1e-3  # control


@pytest.mark.parametrize("changes", [{}, {"max_steps": 5}, {"num_train_epochs": 1.5}])
def test_trained_samples_are_counted(tmp_path, documents, changes):
    trainer = packtrain.attach(make(tmp_path, documents, **changes), max_tokens=64)
    plan = trainer.get_train_dataloader().plan
    seen = sum(len(plan.examples(step)) for step in range(plan.total_steps))
    trainer.train()
    logged = trainer.state.log_history[-1]
    counted = logged["train_samples_per_second"] * logged["train_runtime"]
    assert counted == pytest.approx(seen, rel=0.05)


# Which documents are asked about


@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=60),
    rows=st.integers(1, 20),
    max_tokens=st.none() | st.integers(1, 600),
)
def test_documents_to_ask_about_fit_a_micro_batch_of_the_trainer(lengths, rows, max_tokens):
    sizes, ids = np.array(lengths, dtype=np.int32), np.arange(0, len(lengths), 2)
    chosen = documents_to_ask(sizes, ids, rows=rows, max_tokens=max_tokens)
    assert 1 <= len(chosen) <= 8 and set(chosen.example_ids) <= set(ids.tolist())
    assert len(set(chosen.example_ids.tolist())) == len(chosen)
    assert chosen.lengths.tolist() == sizes[chosen.example_ids].tolist()
    if len(chosen) > 1:
        assert len(chosen) * chosen.lengths.max() <= (max_tokens or rows * sizes[ids].max())
