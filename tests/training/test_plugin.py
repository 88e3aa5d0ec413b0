"""`packtrain.attach`: the trainer that a user already has takes the same steps, laid out flat."""

from __future__ import annotations

import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import packtrain
from packtrain.errors import PacktrainError
from packtrain.modeling.tokenizer import train_bpe
from tests.tiny import random_documents, tiny_model
from tests.training.helpers import long_tailed_lengths

COMMON = dict(
    use_cpu=True,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    num_train_epochs=2,
    logging_steps=1,
    learning_rate=1e-3,
    report_to="none",
    save_strategy="no",
    disable_tqdm=True,
)
QUESTIONS = [
    "two and three",
    "what is four times nine, and why",
    "one",
    "add seven to the product of six and two, then stop",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_bpe(QUESTIONS * 20, vocab_size=300)


@pytest.fixture(scope="module")
def documents() -> datasets.Dataset:
    return datasets.Dataset.from_list(random_documents(long_tailed_lengths(30)))


@pytest.fixture(scope="module")
def conversations() -> datasets.Dataset:
    """Prompts and completions of very different lengths."""
    return datasets.Dataset.from_list(
        [{"prompt": QUESTIONS[i % 4], "completion": " ".join(QUESTIONS[: 1 + i % 3]) + str(i)} for i in range(26)]
    )


def losses(trainer: Trainer) -> tuple[np.ndarray, np.ndarray]:
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return np.array([entry["loss"] for entry in logs]), np.array([entry["grad_norm"] for entry in logs])


def assert_same(ours, theirs):
    assert len(ours[0]) == len(theirs[0]) > 0
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-4)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-3)


def pad(features: list[dict]) -> dict[str, torch.Tensor]:
    """What any user's padding collator does."""

    def rows(key: str, fill: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(feature[key]) for feature in features], batch_first=True, padding_value=fill
        )

    return {
        "input_ids": rows("input_ids", 0),
        "labels": rows("labels", -100),
        "attention_mask": (rows("input_ids", -1) >= 0).long(),
    }


def stock_trainer(output_dir, documents, **changes) -> Trainer:
    args = TrainingArguments(output_dir=str(output_dir), **COMMON | changes)
    return Trainer(tiny_model("llama"), args, train_dataset=documents, data_collator=pad)


def sft_trainer(output_dir, conversations, tokenizer, *, peft_config=None, **changes) -> SFTTrainer:
    torch.manual_seed(0)
    return SFTTrainer(
        tiny_model("llama", vocab_size=len(tokenizer)),
        args=SFTConfig(output_dir=str(output_dir), **COMMON | {"max_length": None} | changes),
        train_dataset=conversations,
        eval_dataset=conversations.select(range(5)),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


@pytest.mark.parametrize("strategy", ["balanced", "padding_free", "group_by_length"])
def test_a_stock_trainer_takes_the_same_steps(tmp_path, documents, strategy):
    before = losses(stock_trainer(tmp_path, documents))
    assert_same(losses(packtrain.attach(stock_trainer(tmp_path, documents), strategy=strategy)), before)


@pytest.mark.parametrize(
    "changes", [{}, {"peft_config": LoraConfig(r=4, target_modules="all-linear")}], ids=["full", "lora"]
)
def test_sft_trainer_takes_the_same_steps(tmp_path, conversations, tokenizer, changes):
    before = sft_trainer(tmp_path, conversations, tokenizer, **changes)
    after = packtrain.attach(sft_trainer(tmp_path, conversations, tokenizer, **changes))
    assert_same(losses(after), losses(before))
    assert after.evaluate()["eval_loss"] == pytest.approx(before.evaluate()["eval_loss"], rel=1e-3)


def test_another_order_is_noticed(tmp_path, documents):
    """Control: other examples in the updates give other losses."""
    before = losses(stock_trainer(tmp_path, documents))
    other = losses(packtrain.attach(stock_trainer(tmp_path, documents, data_seed=7)))
    assert np.abs(other[0] - before[0]).max() > 1e-3


def test_max_tokens_raises_the_accumulation_and_keeps_the_steps(tmp_path, documents):
    before = losses(stock_trainer(tmp_path, documents))
    limit = max(map(len, documents["input_ids"]))
    trainer = packtrain.attach(stock_trainer(tmp_path, documents), max_tokens=limit)
    assert trainer.args.gradient_accumulation_steps > 2
    widths = [batch["input_ids"].shape[1] for batch in trainer.get_train_dataloader()]
    assert max(widths) <= limit
    assert_same(losses(trainer), before)


def test_a_resumed_trainer_ends_with_the_same_weights(tmp_path, documents):
    settings = dict(save_strategy="steps", save_steps=3)
    unbroken = packtrain.attach(stock_trainer(tmp_path, documents, **settings))
    unbroken.train()
    resumed = packtrain.attach(stock_trainer(tmp_path, documents, **settings))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.epoch == unbroken.state.epoch == 2.0
    for mine, theirs in zip(resumed.model.parameters(), unbroken.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_packing_the_epoch_says_what_it_changes(tmp_path, documents, caplog):
    trainer = packtrain.attach(stock_trainer(tmp_path, documents), strategy="bfd", max_tokens=96)
    assert "updates see other examples" in caplog.text
    trainer.train()
    assert trainer.state.global_step == trainer.args.max_steps


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"dataloader_drop_last": True}, {}, "drops no example"),
        ({}, {"strategy": "bfd"}, "needs the size of a pack"),
        ({}, {"strategy": "balancd"}, "did you mean 'balanced'"),
        ({}, {"max_tokens": 10}, "an example has .* tokens.*max_tokens|max_tokens.*an example has"),
        ({"accelerator_config": {"use_seedable_sampler": False}}, {}, "no seed per epoch"),
    ],
)
def test_contradictions_are_refused(tmp_path, documents, changes, options, message):
    with pytest.raises(PacktrainError, match=message):
        packtrain.attach(stock_trainer(tmp_path, documents, **changes), **options)


def test_trl_packing_is_refused(tmp_path, conversations, tokenizer):
    trainer = sft_trainer(tmp_path, conversations, tokenizer, packing=True, packing_strategy="wrapped", max_length=64)
    with pytest.raises(PacktrainError, match="packed its examples already.*\n.*packing=False"):
        packtrain.attach(trainer)


def test_the_collator_alone_gives_the_stock_loss(tmp_path, documents):
    before = losses(stock_trainer(tmp_path, documents))
    model = tiny_model("llama")
    model.config.use_cache = False  # a cache undoes isolation
    trainer = Trainer(
        model,
        TrainingArguments(output_dir=str(tmp_path), remove_unused_columns=False, **COMMON),
        train_dataset=documents,
        data_collator=packtrain.PackCollator(),
    )
    assert_same(losses(trainer), before)


def test_the_readme_example_runs(tmp_path, conversations, tokenizer, monkeypatch):
    """The ten lines of the README, with a tiny model and data for `model` and `dataset`."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    example = re.search(r"<!-- example: attach -->\n```python\n(.*?)```", readme, re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    model = tiny_model("llama", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    model.config.name_or_path = model.name_or_path = str(tmp_path / "tokenizer")  # where SFTTrainer looks for one
    scope = {"model": model, "dataset": conversations}
    exec(example, scope)
    assert scope["trainer"].state.global_step > 0
