"""Every row format: what it is found by, and the exact text and mask that a row becomes."""

from __future__ import annotations

import datasets
import pytest
from trl import SFTConfig, SFTTrainer

from packtrain.data.examples import Examples
from packtrain.data.formats import FORMATS, find_format
from packtrain.data.sources import open_rows, texts
from packtrain.errors import DataError
from tests.data.helpers import CHAT_TEMPLATE, make_tokenizer, shown
from tests.tiny import tiny_model

USER = {"role": "user", "content": "What is 2+2?"}
ASSISTANT = {"role": "assistant", "content": "It is 4."}
SYSTEM = {"role": "system", "content": "the sum"}
TURN = [USER, ASSISTANT]
CHAT = "<s><|user|>What is 2+2?<|end|><|assistant|>"

# (row, what it becomes without a chat template, what with one); None: refused, see below
ROWS = {
    "text": (
        {"text": "What is 2+2?"},
        "<s>[What is 2+2?</s>]",
        "<s>[What is 2+2?</s>]",
    ),
    "prompt_completion": (
        {"prompt": "What is 2+2?", "completion": " It is 4."},
        "<s>What is 2+2?[ It is 4.</s>]",
        "<s>What is 2+2?[ It is 4.</s>]",
    ),
    "prompt_completion, messages": (
        {"prompt": [SYSTEM, USER], "completion": [ASSISTANT]},
        None,
        "<s><|system|>the sum<|end|><|user|>What is 2+2?<|end|><|assistant|>[It is 4.</s>]",
    ),
    "question_answer": (
        {"question": "What is 2+2?", "answer": "It is 4."},
        "<s>Question: What is 2+2?\nAnswer:[ It is 4.</s>]",
        CHAT + "[It is 4.</s>]",
    ),
    "alpaca": (
        {"instruction": "the sum", "input": "2+2", "output": "4"},
        "<s>Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nthe sum\n\n### Input:\n2+2\n\n### Response:\n[4</s>]",
        "<s><|user|>the sum\n\n2+2<|end|><|assistant|>[4</s>]",
    ),
    "alpaca, no input": (
        {"instruction": "the {sum}", "input": "", "output": "4"},
        "<s>Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nthe {sum}\n\n### Response:\n[4</s>]",
        "<s><|user|>the {sum}<|end|><|assistant|>[4</s>]",
    ),
    "messages": (
        {"messages": TURN},
        None,
        "<s>[<|user|>What is 2+2?<|end|><|assistant|>It is 4.</s>]",
    ),
    "messages, text in parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "two "}, {"type": "text", "text": "three"}]}
            ]
        },
        None,
        "<s>[<|user|>two three<|end|>]",
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "What is 2+2?"}, {"from": "gpt", "value": "It is 4."}]},
        None,
        "<s>[<|user|>What is 2+2?<|end|><|assistant|>It is 4.</s>]",
    ),
}


@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("chat", [False, True])
def test_row_becomes(case, chat, build, tokenizer, chat_tokenizer):
    row, *expected = ROWS[case]
    chosen = chat_tokenizer if chat else tokenizer
    if expected[chat] is None:
        with pytest.raises(DataError, match="no chat template"):
            build([row], chosen)
    else:
        examples = build([row], chosen)
        assert shown(chosen, examples) == [expected[chat]]
        assert examples.report.format == case.split(",")[0]


def test_pretokenised_rows_are_used_as_they_are(build, tokenizer):
    rows = [
        {"input_ids": [5, 6, 7, 8], "labels": [5, -100, 9, 8]},  # labels need not be the ids
        {"input_ids": [5, 6], "labels": [-100, 6]},
        {"input_ids": [7, 8, 9]},  # no labels: all are learnt
    ]
    examples = build(rows, tokenizer)
    assert [example["input_ids"].tolist() for example in examples] == [[5, 6, 7, 8], [5, 6], [7, 8, 9]]
    assert [example["labels"].tolist() for example in examples] == [[-100, -100, 9, 8], [-100, 6], [-100, 8, 9]]
    assert examples.supervised.tolist() == [2, 1, 2]


def test_pretokenised_rows_with_masks(build, tokenizer):
    rows = [{"input_ids": [5, 6, 7, 8], "completion_mask": [0, 1, 1, 1], "assistant_masks": [True, True, True, False]}]
    (example,) = build(rows, tokenizer)
    assert example["labels"].tolist() == [-100, 6, 7, -100]


LABELS, COMPLETION = {"labels": [5, -100, 7, 8]}, {"completion_mask": [0, 1, 1, 0]}
MASKS = {"assistant_masks": [0, 0, 1, 1]}
GIVEN = [{}, LABELS, COMPLETION, MASKS, COMPLETION | MASKS]


@pytest.mark.parametrize("columns", [*GIVEN, LABELS | COMPLETION, LABELS | COMPLETION | MASKS])
def test_labels_and_masks_mean_what_they_mean_to_trl(columns, build, tokenizer, tmp_path):
    """In a file, in a dataset, and where TRL has prepared it; given labels are the last word."""
    row = {"input_ids": [5, 6, 7, 8]} | columns
    dataset = datasets.Dataset.from_list([row])
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], completion_only_loss=True)
    trainer = SFTTrainer(tiny_model("llama"), args, train_dataset=dataset, processing_class=tokenizer)
    prepared = trainer.train_dataset
    expected = [-100, *trainer.data_collator([prepared[0]])["labels"][0, 1:].tolist()]
    for examples in (build([row], tokenizer), Examples.from_dataset(dataset), Examples.from_dataset(prepared)):
        assert examples[0]["labels"].tolist() == expected


@pytest.mark.parametrize("late", [{"labels": [-100, -100, 7]}, {"completion_mask": [0, 0, 1]}])
def test_labels_that_come_late_count_as_well(late, build, tokenizer):
    """The columns of a file are those of its first rows; labels may begin further down."""
    examples = build([{"input_ids": [5, 6, 7]}] * 150 + [{"input_ids": [5, 6, 7], **late}], tokenizer)
    assert examples[149]["labels"].tolist() == [-100, 6, 7]
    assert examples[150]["labels"].tolist() == [-100, -100, 7]
    assert examples.supervised[149:].tolist() == [2, 1]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["text"], ("text", [])),
        (["id", "question", "answer"], ("question_answer", [])),
        (["instruction", "input", "output", "text"], ("alpaca", ["text"])),  # as tatsu-lab/alpaca
        (["prompt", "prompt_id", "messages"], ("messages", [])),  # as HuggingFaceH4/ultrachat_200k
        (["input_ids", "attention_mask", "text"], ("input_ids", ["text"])),
    ],
)
def test_format_is_found_by_columns(columns, expected):
    assert find_format(columns) == expected


def test_named_format_overrides_detection(build, tokenizer):
    row = {"instruction": "the sum", "output": "4", "text": "one two"}
    assert shown(tokenizer, build([row], tokenizer, format="text")) == ["<s>[one two</s>]"]
    assert build([row], tokenizer).report.notes == (
        "the columns also fit the format text; `data.format` chooses",
        "columns not used: text",
    )


def test_columns_that_fit_no_format_are_listed_with_the_formats():
    with pytest.raises(DataError) as error:
        find_format(["query", "response"])
    assert "no format fits the columns query, response" in str(error.value)
    assert all((f"{name} (" in str(error.value)) == ("example" in fmt.kinds) for name, fmt in FORMATS.items())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("question_anwser", "did you mean `question_answer`"),
        ("parquet", "formats and the columns"),
        ("text", "no column 'text'"),
    ],
)
def test_named_format_that_cannot_be(name, message):
    with pytest.raises(DataError, match=message):
        find_format(["question", "answer"], name)


def test_sharegpt_roles(build, chat_tokenizer):
    speakers = ["system", "human", "gpt", "observation", "assistant"]
    row = {"conversations": [{"from": speaker, "value": "one"} for speaker in speakers]}
    assert shown(chat_tokenizer, build([row], chat_tokenizer)) == [
        "<s>[<|system|>one<|end|><|user|>one<|end|><|assistant|>one</s><|tool|>one<|end|><|assistant|>one</s>]"
    ]


def test_tools_reach_the_template(build):
    template = "{{ tools[0].name }}" + CHAT_TEMPLATE
    tokenizer = make_tokenizer(chat_template=template)
    for tools in ([{"name": "seven"}], '[{"name": "seven"}]'):
        assert shown(tokenizer, build([{"messages": TURN, "tools": tools}], tokenizer))[0].endswith("It is 4.</s>]")
        assert "seven" in tokenizer.decode(build([{"messages": TURN, "tools": tools}], tokenizer)[0]["input_ids"])


def test_texts_for_a_tokenizer(write_rows):
    rows = open_rows(write_rows({"question": "one", "answer": "two"}, {"question": 3, "answer": "x"}, "broken"))
    assert list(texts(rows)) == ["one", "two"]
    rows = open_rows(write_rows({"prompt": "one ", "completion": "two"}))
    assert list(texts(rows)) == ["one two"]
    with pytest.raises(DataError, match="token ids"):
        list(texts(open_rows(write_rows({"input_ids": [1, 2]}))))


_TURN = [{"role": "user", "content": "2+2?"}]
_ANSWER = [{"role": "assistant", "content": "4"}]


@pytest.mark.parametrize(
    ("rows", "kind", "chat", "expected"),
    [
        ([{"prompt": _TURN, "completion": _ANSWER}], "example", True, ("conversation",)),
        ([{"prompt": "2+2?", "completion": "4"}], "example", True, ("text",)),
        (
            [{"prompt": _TURN, "completion": _ANSWER}, {"prompt": "2+2?", "completion": "4"}],
            "example",
            True,
            ("conversation", "text"),
        ),
        ([{"prompt": "2+2?", "chosen": "4", "rejected": "5"}], "pair", True, ("text",)),
        ([{"prompt": _TURN, "completions": [_ANSWER]}], "answers", True, ("conversation",)),
        ([{"question": "2+2?", "answer": "4"}], "example", True, ("conversation",)),
        ([{"question": "2+2?", "answer": "4"}], "example", False, ("question_answer",)),
        ([{"input_ids": [5, 6]}], "example", True, ("input_ids",)),
        ([{"text": "one two"}, {"text": ""}], "example", True, ("text",)),  # what a bad row would be counts nowhere
    ],
)
def test_it_is_known_how_rows_were_written_out(rows, kind, chat, expected, build, tokenizer, chat_tokenizer):
    examples = build(rows, chat_tokenizer if chat else tokenizer, kind=kind, on_bad_row="skip")
    assert examples.report.prompts == expected
    assert Examples.join([examples, examples.take([0])], examples.report)._documents.prompts == list(expected)
