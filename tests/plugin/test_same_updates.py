"""What once gave other updates, or none: losses that are means, and what the first update doesn't show.

Each is refused where batches would be flat, and takes the untouched trainer's updates where its layers alone are.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForTokenClassification, Trainer, TrainingArguments

import packtrain
from packtrain.errors import PacktrainError
from packtrain.modeling.audit.models import tiny_model as audited_model
from tests.plugin.helpers import COMMON, pad
from tests.plugin.test_attach import assert_same, losses
from tests.tiny import random_documents, tiny_model
from tests.training.helpers import long_tailed_lengths

ROWS = 41  # of updates of eight: the last has one row, and half of its micro-batches none


@pytest.fixture(scope="module")
def documents() -> datasets.Dataset:
    """Documents, the longest last."""
    return datasets.Dataset.from_list(random_documents(sorted(long_tailed_lengths(ROWS))))


def make(output_dir: Path, documents, cls: type = Trainer, model=None, collator=pad, **changes) -> Trainer:
    args = TrainingArguments(output_dir=str(output_dir), **COMMON | {"num_train_epochs": 1} | changes)
    return cls(model or tiny_model("llama"), args, train_dataset=documents, data_collator=collator)


def tagger() -> BertForTokenClassification:
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=320)
    return BertForTokenClassification(
        BertConfig(**sizes, num_labels=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )


class HandWrittenMean(Trainer):
    """Not a number where nothing is kept."""

    shift = 1

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        logits, labels = logits[:, : logits.shape[1] - self.shift], labels[:, self.shift :]
        keep = (labels != -100).float()
        nll = cross_entropy(logits.transpose(1, 2), labels.clamp(min=0), reduction="none")
        return (nll * keep).sum() / keep.sum()


class MeanOfTags(HandWrittenMean):
    shift = 0


class MasksRowsInBatch(Trainer):
    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        inputs["labels"] = inputs["labels"].clone()
        inputs["labels"][:, :4] = -100
        return inputs


class MasksRowsInStep(Trainer):
    def training_step(self, model, inputs, *args):
        inputs["labels"][:, :4] = -100
        return super().training_step(model, inputs, *args)


MEANS = [
    pytest.param(dict(cls=HandWrittenMean), id="causal"),
    pytest.param(
        dict(cls=MeanOfTags, model=tagger), id="token classification", marks=[pytest.mark.slow, pytest.mark.ci]
    ),
]


def made(output_dir: Path, documents, how: dict, **changes) -> Trainer:
    model = {"model": how["model"]()} if "model" in how else {}
    return make(output_dir, documents, **how | model | changes)


@pytest.mark.parametrize("how", MEANS)
def test_a_mean_of_each_micro_batch_keeps_its_micro_batches(tmp_path, documents, how):
    """Also in the last update, which has one row: a micro-batch without labels would make its weights not a number."""
    before = losses(made(tmp_path, documents, how))
    assert len(before[0]) == 6
    attached = packtrain.attach(made(tmp_path, documents, how))
    assert_same(losses(attached), before)
    assert all(weight.isfinite().all() for weight in attached.model.parameters())
    # control: one row fewer in each micro-batch is another mean
    other = losses(made(tmp_path, documents, how, per_device_train_batch_size=2, gradient_accumulation_steps=4))
    assert np.abs(other[1] / before[1] - 1).max() > 1e-2


@pytest.mark.parametrize("how", MEANS)
@pytest.mark.parametrize(
    "options",
    [
        dict(layout="flat"),
        dict(strategy="pad_longest"),
        dict(max_tokens=512),
        dict(strategy="padding_free", layout="flat"),
    ],
    ids=str,
)
def test_a_mean_of_each_micro_batch_is_not_dealt_anew(tmp_path, documents, how, options):
    with pytest.raises(PacktrainError, match="(HandWrittenMean|MeanOfTags).*mean of each micro-batch"):
        packtrain.attach(made(tmp_path, documents, how), **options)
    packtrain.attach(made(tmp_path, documents, how, gradient_accumulation_steps=1), **options | {"max_tokens": None})


def test_no_update_is_not_a_number(tmp_path, documents):
    """Also where differences are allowed."""
    with pytest.raises(PacktrainError, match="not a number for a micro-batch without labels"):
        trainer = make(tmp_path, documents, cls=HandWrittenMean)
        packtrain.attach(trainer, layout="flat", allow_differences=True)
    packtrain.attach(make(tmp_path, documents), layout="flat", allow_differences=True)  # control: a sum


def sixteen(features: list[dict]) -> dict[str, torch.Tensor]:
    return {name: rows[:, :16] for name, rows in pad(features).items()}


def tagged(documents: datasets.Dataset, first: int) -> datasets.Dataset:
    """Tags for every token, but for the first of each of the `first` rows."""
    return documents.map(
        lambda row, i: {"labels": [-100 if i < first else 1, *row["input_ids"][1:]]}, with_indices=True
    )


HIDDEN = [
    pytest.param(dict(cls=MasksRowsInBatch), "has its own `_prepare_inputs`", id="_prepare_inputs"),
    pytest.param(dict(cls=MasksRowsInStep), "has its own `training_step`", id="training_step"),
    pytest.param(dict(collator=sixteen), r"makes 16 tokens of them, and train_dataset has \d+", id="truncates later"),
    pytest.param(dict(model=tagger), "includes the labels of first tokens", id="first labels later"),
]


@pytest.mark.parametrize(("how", "refusal"), HIDDEN)
def test_what_the_first_update_does_not_show_is_noticed(tmp_path, documents, how, refusal):
    rows = tagged(documents, first=24) if "model" in how else documents
    in_order = dict(train_sampling_strategy="sequential")
    with pytest.raises(PacktrainError, match=refusal):
        packtrain.attach(made(tmp_path, rows, how, **in_order), layout="flat")
    before = losses(made(tmp_path, rows, how, **in_order))
    assert_same(losses(packtrain.attach(made(tmp_path, rows, how, **in_order))), before)
    # control: without what is hidden there, batches are flat
    shown = (
        tagged(documents, first=ROWS) if "model" in how else documents.filter(lambda row: len(row["input_ids"]) <= 16)
    )
    plain = {name: value for name, value in how.items() if name != "cls"}
    packtrain.attach(made(tmp_path, shown, plain, gradient_accumulation_steps=1, **in_order), layout="flat")


def test_a_zeroed_head_hides_no_leak(tmp_path, documents, caplog):
    """All logits are equal and so is the loss, whatever attention does; the hidden states below the head tell."""

    def trainer() -> Trainer:
        torch.manual_seed(0)
        model = audited_model("opt", tie_word_embeddings=False)
        with torch.no_grad():
            model.lm_head.weight.zero_()
        return make(tmp_path, documents, model=model)

    with pytest.raises(PacktrainError, match="attention leaks between documents of a flat batch"):
        packtrain.attach(trainer(), layout="flat", attn_implementation="sdpa")
    before = losses(trainer())
    assert_same(losses(packtrain.attach(trainer(), attn_implementation="sdpa")), before)
    packtrain.attach(trainer(), layout="flat")  # control: packtrain_varlen isolates


@pytest.mark.parametrize("layout", ["auto", "flat", "unpad"])
def test_activated_lora_is_refused(tmp_path, documents, layout):
    """It acts from an invocation sequence of each row on, and does nothing while its B is zero."""

    def trainer(**activated) -> Trainer:
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], **activated)
        return make(tmp_path, documents, model=get_peft_model(tiny_model("llama"), config))

    with pytest.raises(PacktrainError, match="Trainer with LlamaForCausalLM: alora_invocation_tokens"):
        packtrain.attach(trainer(alora_invocation_tokens=[5, 6]), layout=layout)
    adapted = packtrain.attach(trainer(), layout=layout)  # control: plain
    zeros = [weight for name, weight in adapted.model.named_parameters() if "lora_B" in name]
    assert zeros and not any(weight.any() for weight in zeros)  # drawn at random only while it was asked


def test_a_router_loss_keeps_its_micro_batches(tmp_path, documents):
    build = partial(audited_model, "mixtral", output_router_logits=True, router_aux_loss_coef=0.1)
    with pytest.raises(PacktrainError, match="output_router_logits: adds a router loss per micro-batch"):
        packtrain.attach(make(tmp_path, documents, model=build()), layout="flat")
    torch.manual_seed(0)
    before = losses(make(tmp_path, documents, model=build()))
    torch.manual_seed(0)
    assert_same(losses(packtrain.attach(make(tmp_path, documents, model=build()))), before)
