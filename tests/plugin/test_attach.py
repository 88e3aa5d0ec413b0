"""`packtrain.attach`: the trainer that a user already has takes the same steps, laid out flat."""

from __future__ import annotations

import copy
import re
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch.utils.data import IterableDataset
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

import packtrain
from packtrain.errors import PacktrainError
from packtrain.modeling.audit.models import tiny_model as audited_model
from packtrain.modeling.tokenizer import train_bpe
from tests.plugin.helpers import COMMON, pad
from tests.tiny import random_documents, tiny_model
from tests.training.helpers import long_tailed_lengths

LONG = [pytest.mark.slow, pytest.mark.ci]
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


def test_rows_that_a_trainer_has_cut_are_counted(tmp_path, conversations, tokenizer, caplog):
    """TRL cuts rows without a word before they are attached."""
    whole = sft_trainer(tmp_path, conversations, tokenizer)
    lengths = sorted(len(row) for row in whole.train_dataset["input_ids"])
    most = lengths[-3] - 1  # three rows are longer, if no others are as long as the third
    cut = sum(length >= most for length in lengths)
    packtrain.attach(sft_trainer(tmp_path, conversations, tokenizer, max_length=most))
    said = f"{cut} of {len(lengths)} rows have max_length={most} tokens, to which SFTTrainer cuts longer ones"
    assert cut >= 3 and said in caplog.text
    caplog.clear()
    packtrain.attach(sft_trainer(tmp_path, conversations, tokenizer, max_length=lengths[-1] + 1))
    assert "cuts longer ones" not in caplog.text  # control


CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}.{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="everything", marks=[pytest.mark.slow, pytest.mark.ci]),
        pytest.param({"assistant_only_loss": True}, id="assistant_only"),
    ],
)
def test_sft_trainer_on_conversations(tmp_path, tokenizer, changes):
    chats = datasets.Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": QUESTIONS[i % 4]},
                    {"role": "assistant", "content": " ".join(QUESTIONS[: i % 3 + 1])},
                    {"role": "user", "content": "again"},
                    {"role": "assistant", "content": str(i)},
                ]
            }
            for i in range(18)
        ]
    )
    talking = copy.deepcopy(tokenizer)
    talking.chat_template = CHATML
    before = losses(sft_trainer(tmp_path, chats, talking, **changes))
    after = losses(packtrain.attach(sft_trainer(tmp_path, chats, talking, **changes)))
    assert_same(after, before)


def test_a_decoder_that_counts_positions_from_two(tmp_path, documents):
    """RoBERTa: packed positions must begin where the model's own do; control: from zero the losses are others."""

    def trainer() -> Trainer:
        model = audited_model("roberta", pad_token_id=1)
        config = type(model.config)(**model.config.to_dict() | {"is_decoder": True})
        torch.manual_seed(0)
        args = TrainingArguments(output_dir=str(tmp_path), **COMMON)
        model = AutoModelForCausalLM.from_config(config)
        return Trainer(model, args, train_dataset=documents, data_collator=partial(pad, padding=1))

    before, attached = losses(trainer()), packtrain.attach(trainer())
    from_zero = packtrain.attach(trainer())
    from_zero.get_train_dataloader().dataset.micro_batches.collator.position_start = 0
    assert attached.get_train_dataloader().dataset.micro_batches.collator.position_start == 2
    assert_same(losses(attached), before)
    assert np.abs(losses(from_zero)[0] - before[0]).max() > 1e-3


def test_a_model_that_leaks_between_documents_is_refused(tmp_path, documents, caplog):
    def trainer() -> Trainer:
        args = TrainingArguments(output_dir=str(tmp_path), **COMMON)
        return Trainer(audited_model("opt"), args, train_dataset=documents, data_collator=pad)

    with pytest.raises(PacktrainError, match="Trainer with OPTForCausalLM: .*attention leaks between documents"):
        packtrain.attach(trainer(), layout="flat", attn_implementation="sdpa")
    packtrain.attach(trainer(), attn_implementation="sdpa", allow_contamination=True)
    assert "attention leaks between documents" in caplog.text
    caplog.clear()
    packtrain.attach(trainer(), attn_implementation="sdpa")
    assert "keeps its own batches" in caplog.text and "attention leaks between documents" in caplog.text
    packtrain.attach(trainer())  # control: packtrain_varlen keeps them apart


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp"])
def test_an_engine_is_no_reason_not_to_ask_the_model(tmp_path, documents, caplog, engine):
    """Before training begins its weights are whole, unless ZeRO-3 made them in shards: then it is said."""

    def trainer() -> Trainer:
        args = TrainingArguments(output_dir=str(tmp_path), **COMMON)
        made = Trainer(audited_model("opt"), args, train_dataset=documents, data_collator=pad)
        setattr(made, f"is_{engine}_enabled", True)
        return made

    with pytest.raises(PacktrainError, match="attention leaks between documents"):
        packtrain.attach(trainer(), layout="flat", attn_implementation="sdpa")
    assert "not checked" not in caplog.text
    sharded = trainer()
    next(sharded.model.parameters()).ds_id = 0
    packtrain.attach(sharded, attn_implementation="sdpa")
    assert "whether attention leaks between documents was not checked: weights are sharded already" in caplog.text


def test_what_has_no_effect_is_a_warning_and_what_changes_is_one_line(tmp_path, documents, caplog):
    def told(router_loss: bool = False, **changes) -> list[str]:
        caplog.clear()
        trainer = stock_trainer(tmp_path, documents, **changes)
        trainer.model.config.use_cache = True
        trainer.model.config.output_router_logits = router_loss
        packtrain.attach(trainer, allow_differences=router_loss)
        assert not trainer.model.config.use_cache
        return [record.getMessage() for record in caplog.records if record.name == "packtrain.plugin.attach"]

    (changed,) = told()
    assert re.fullmatch(
        "packtrain: balanced lays out the training batches; use_cache True -> False; attn_implementation sdpa -> "
        r"packtrain_varlen; the loss of 4 documents is \d\.\d{4}, as before",
        changed,
    )
    assert any("neftune_noise_alpha" in line for line in told(neftune_noise_alpha=5.0))
    assert any("router loss per micro-batch" in line for line in told(router_loss=True))
    assert any("dataloader_in_order" in line for line in told(dataloader_in_order=False, dataloader_num_workers=1))
    assert any("dispatch_batches" in line for line in told(accelerator_config={"dispatch_batches": True}))


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
    ("strategy", "seed", "per_epoch"),
    [
        ("next_fit", 8, [9, 10, 10]),
        pytest.param("next_fit", 24, [9, 10, 10], marks=[pytest.mark.slow, pytest.mark.ci]),
        pytest.param("random", 6, [8, 9, 9], marks=[pytest.mark.slow, pytest.mark.ci]),
        pytest.param("random", 11, [8, 9, 9], marks=[pytest.mark.slow, pytest.mark.ci]),
        pytest.param("bfd", 8, [8, 8, 8], marks=[pytest.mark.slow, pytest.mark.ci]),
        ("balanced", 8, [8, 8, 8]),
    ],
)
def test_every_epoch_is_whole_however_long(tmp_path, strategy, seed, per_epoch):
    """Each planned epoch is an epoch of the trainer and sees every example once; also where it was resumed."""
    documents = datasets.Dataset.from_list(random_documents(long_tailed_lengths(60)))
    everything = sorted(map(tuple, documents["input_ids"]))
    settings = dict(num_train_epochs=3, data_seed=seed, save_strategy="steps", save_steps=1)

    def trained(resume=None) -> tuple[Trainer, list[list[tuple]]]:
        trainer, seen = stock_trainer(tmp_path, documents, **settings), []
        packtrain.attach(trainer, strategy=strategy, max_tokens=48 if strategy != "balanced" else None)
        plan = trainer.get_train_dataloader().plan
        assert [plan.steps_in_epoch(epoch) for epoch in range(3)] == per_epoch
        trainer.add_callback(Epochs(seen))
        step = trainer.training_step

        def recorded(model, inputs, *args):
            bounds = inputs["cu_seq_lens_q"].tolist()
            rows = [tuple(inputs["input_ids"][0, i:j].tolist()) for i, j in zip(bounds, bounds[1:], strict=False)]
            seen[-1] += [row for row in rows if row in everything]  # a micro-batch of filler alone is none
            return step(model, inputs, *args)

        trainer.training_step = recorded
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.global_step == trainer.state.max_steps == sum(per_epoch)
        assert trainer.state.epoch == 3.0
        return trainer, seen

    unbroken, seen = trained()
    assert [sorted(epoch) for epoch in seen] == [everything] * 3
    resumed, rest = trained(str(tmp_path / f"checkpoint-{per_epoch[0] + 1}"))
    assert [sorted(epoch) for epoch in rest[1:]] == [everything] and 0 < len(rest[0]) < len(everything)
    for mine, theirs in zip(resumed.model.parameters(), unbroken.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


class Epochs(TrainerCallback):
    """A new list in `seen` for every epoch that the trainer begins."""

    def __init__(self, seen: list):
        self.seen = seen

    def on_epoch_begin(self, *args, **kwargs):
        self.seen.append([])


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"dataloader_drop_last": True}, {}, "drops no example"),
        ({"auto_find_batch_size": True}, {}, "auto_find_batch_size: must be False"),
        (
            {"train_sampling_strategy": "group_by_length"},
            {},
            "transformers' group_by_length chooses which examples share",
        ),
        ({"train_sampling_strategy": "batch_rebalance"}, {}, "layout=.unpad"),
        ({}, {"strategy": "bfd"}, r"max_tokens: must be set(?s:.)*fix: set it to .* for example \d+$"),
        ({}, {"strategy": "balancd"}, "did you mean 'balanced'"),
        ({}, {"max_tokens": 10}, "max_tokens: is too small: the longest example has"),
        ({"accelerator_config": {"use_seedable_sampler": False}}, {}, "is not seeded per epoch"),
    ],
)
def test_contradictions_are_refused(tmp_path, documents, changes, options, message):
    with pytest.raises(PacktrainError, match=message):
        packtrain.attach(stock_trainer(tmp_path, documents, **changes), **{"layout": "flat"} | options)


def test_what_a_trainer_lacks_is_named(tmp_path, documents):
    def message(given: object, **options) -> str:
        with pytest.raises(PacktrainError) as refused:
            packtrain.attach(given, **options)
        return str(refused.value)

    assert "packtrain.unpad(model)" in message(tiny_model("llama"))
    without = message(stock_trainer(tmp_path, None))
    assert "has no train_dataset" in without and "streaming" not in without
    text = message(stock_trainer(tmp_path, datasets.Dataset.from_dict({"txt": ["a", "b"]})), layout="flat")
    assert (
        "'input_ids'" in text and "txt" in text and "packtrain.load_examples" in text and "build_examples" not in text
    )
    assert f"for example {4 * max(map(len, documents['input_ids']))}" in message(
        stock_trainer(tmp_path, documents), strategy="bfd"
    )
    bare = documents.select_columns(["input_ids"])
    trainer = Trainer(tiny_model("llama"), stock_trainer(tmp_path, bare).args, train_dataset=bare, data_collator=_bare)
    for layout in ("auto", "flat", "unpad"):
        unlabelled = message(trainer, layout=layout)
        assert "its batches have no labels" in unlabelled and "KeyError" not in unlabelled, layout
    rows = [{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}, {"input_ids": [3, 4, 5, 6], "labels": [3, 4]}]
    assert "train_dataset: 1 of 2 rows cannot be trained on" in message(
        stock_trainer(tmp_path, datasets.Dataset.from_list(rows))
    )


def _bare(features: list[dict]) -> dict[str, torch.Tensor]:
    labelled = pad([feature | {"labels": feature["input_ids"]} for feature in features])
    return {name: rows for name, rows in labelled.items() if name != "labels"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dataloader_drop_last": True}, "packtrain drops no example"),
        pytest.param({"auto_find_batch_size": True}, "all batches are planned once", marks=LONG),
        ({"train_sampling_strategy": "batch_rebalance"}, "transformers' batch_rebalance chooses which examples share"),
        pytest.param({"accelerator_config": {"use_seedable_sampler": False}}, "is not seeded per epoch", marks=LONG),
    ],
)
def test_what_no_plan_can_follow_keeps_its_own_batches_and_order(tmp_path, documents, changes, reason, caplog):
    before = losses(stock_trainer(tmp_path, documents, **changes))
    caplog.clear()
    assert_same(losses(packtrain.attach(stock_trainer(tmp_path, documents, **changes))), before)
    assert "Trainer with LlamaForCausalLM keeps its own batches" in caplog.text and reason in caplog.text


def streamed(documents) -> datasets.IterableDataset:
    return documents.to_iterable_dataset()


class Once(IterableDataset):
    """Rows that are gone once they were read."""

    def __init__(self, rows):
        self.rows = iter(rows)

    def __iter__(self):
        yield from self.rows


def test_a_streamed_dataset_keeps_its_own_batches_and_takes_the_same_steps(tmp_path, documents):
    before = losses(stock_trainer(tmp_path, streamed(documents), max_steps=5))
    assert_same(losses(packtrain.attach(stock_trainer(tmp_path, streamed(documents), max_steps=5))), before)
    with pytest.raises(PacktrainError, match="of known length(.|\n)*layout=.unpad"):
        packtrain.attach(stock_trainer(tmp_path, streamed(documents), max_steps=5), layout="flat")


def test_a_dataset_that_can_be_read_once_is_refused(tmp_path, documents):
    """The batches that are compared would be missing from the training; the control above is not refused."""
    for rows in (documents, list(documents)):
        with pytest.raises(PacktrainError, match="train_dataset does not start over(.|\n)*__iter__ starts over"):
            packtrain.attach(stock_trainer(tmp_path, Once(rows), max_steps=5))


def test_a_packed_stream_needs_no_attach(tmp_path, documents):
    packs = packtrain.PackedStream(documents, packtrain.PackCollator(), capacity=1024)
    with pytest.raises(PacktrainError, match="train_dataset: lays its rows out without padding already"):
        packtrain.attach(stock_trainer(tmp_path, packs, max_steps=5))


@pytest.mark.parametrize("layout", ["flat", "unpad"])
def test_a_second_attach_is_refused(tmp_path, documents, layout):
    for again in ("auto", "flat", "unpad"):
        with pytest.raises(PacktrainError, match="call attach once"):
            packtrain.attach(packtrain.attach(stock_trainer(tmp_path, documents), layout=layout), layout=again)


def test_random_masks_are_refused(tmp_path, documents, tokenizer):
    masking = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    masking.mlm = True  # which it refuses to be built with where the tokenizer has no mask token
    args = TrainingArguments(output_dir=str(tmp_path), **COMMON)
    trainer = Trainer(tiny_model("llama"), args, train_dataset=documents, data_collator=masking)
    with pytest.raises(PacktrainError, match="data_collator.mlm: must be False"):
        packtrain.attach(trainer, layout="flat")
    with pytest.raises(PacktrainError, match="takes no flat batches .*, and cannot run without padding either"):
        packtrain.attach(trainer)  # nor with padding: the tokenizer has no mask token


@pytest.mark.parametrize("weighting", ["token", "example"])
def test_a_weighting_that_the_trainer_would_ignore_is_refused(tmp_path, documents, weighting):
    trainer = stock_trainer(tmp_path, documents, remove_unused_columns=False)
    trainer.data_collator = packtrain.PackCollator(loss_weighting=weighting)
    if weighting == "token":
        packtrain.attach(trainer)
        return
    with pytest.raises(PacktrainError, match="data_collator.loss_weighting: must be 'token'"):
        packtrain.attach(trainer, layout="flat")


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
