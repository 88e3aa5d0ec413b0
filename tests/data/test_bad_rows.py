"""Every kind of bad row is named with file, line and reason; the good row next to it is not."""

from __future__ import annotations

import codecs

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from packtrain.data.examples import build_examples
from packtrain.data.sources import open_rows
from packtrain.errors import DataError
from tests.data.helpers import shown

USER, ASSISTANT = {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}
GOOD = {
    "text": {"text": "one two"},
    "prompt_completion": {"prompt": "one", "completion": " two"},
    "question_answer": {"question": "one", "answer": "two"},
    "alpaca": {"instruction": "one", "input": "", "output": "two"},
    "messages": {"messages": [USER, ASSISTANT]},
    "sharegpt": {"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]},
    "input_ids": {"input_ids": [5, 6, 7], "labels": [5, 6, 7]},
}

# format, bad row (a dict, or a line as it stands), options, reason
BAD = [
    ("text", {"text": ""}, {}, "'text' is empty"),
    ("text", {"text": " \n\t"}, {}, "'text' is empty"),
    ("text", {"text": None}, {}, "'text' is null"),
    ("text", {"txet": "one"}, {}, "'text' is missing"),
    ("text", {}, {}, "'text' is missing"),
    ("text", {"text": 42}, {}, "'text' is a number, not text: 42"),
    ("text", {"text": True}, {}, "'text' is a boolean, not text: True"),
    ("text", {"text": ["one"]}, {}, "'text' is a list, not text: ['one']"),
    ("text", {"text": {"a": 1}}, {}, "'text' is an object, not text: {'a': 1}"),
    ("text", r'{"text": "\ud83d"}', {}, "the text contains a lone surrogate"),
    ("text", '{"text": "one"', {}, "invalid JSON: Expecting ',' delimiter at column 15"),
    ("text", '{"text": "one', {}, "invalid JSON: Unterminated string at column 10"),
    ("text", "one two", {}, "invalid JSON: Expecting value at column 1"),
    ("text", '["one"]', {}, "is not a JSON object: ['one']"),
    ("text", "[" * 100_000, {}, "cannot be read as JSON: maximum recursion depth"),
    ("text", '{"text": ' + "1" * 5000 + "}", {}, "cannot be read as JSON: Exceeds the limit"),
    ("text", b'{"text": "caf\xe9"}', {}, "invalid UTF-8 at byte 13 of the row"),
    ("text", '{"text": "a"}'.encode("utf-16"), {}, "invalid UTF-8 at byte 0 of the row"),
    ("prompt_completion", {"prompt": "one", "completion": ""}, {}, "'completion' is empty"),
    ("prompt_completion", {"prompt": "one"}, {}, "'completion' is missing"),
    ("prompt_completion", {"prompt": "one", "completion": 2.5}, {}, "'completion' is a number, not text: 2.5"),
    ("prompt_completion", {"prompt": [USER], "completion": "two"}, {}, "'prompt' and 'completion' must both be text"),
    ("prompt_completion", {"prompt": [USER], "completion": [USER]}, {}, "the last message has the role 'user'"),
    ("prompt_completion", {"prompt": [], "completion": [ASSISTANT]}, {}, "'prompt' is empty"),
    ("question_answer", {"question": "one", "answer": 4}, {}, "'answer' is a number, not text: 4"),
    ("question_answer", {"question": None, "answer": "two"}, {}, "'question' is null"),
    ("alpaca", {"instruction": "one", "input": 7, "output": "two"}, {}, "'input' is a number, not text: 7"),
    ("alpaca", {"instruction": "one", "input": "", "output": " "}, {}, "'output' is empty"),
    ("messages", {"messages": []}, {}, "'messages' is empty"),
    ("messages", {"messages": "one"}, {}, "'messages' is not a list of messages: 'one'"),
    ("messages", {"messages": ["one"]}, {}, "'messages' is not a list of messages: ['one']"),
    ("messages", {"messages": None}, {}, "'messages' is null"),
    ("messages", {"messages": [{"content": "one"}]}, {}, "messages[0] has the unknown role None"),
    (
        "messages",
        {"messages": [USER, {"role": "robot", "content": "x"}]},
        {},
        "messages[1] has the unknown role 'robot'",
    ),
    ("messages", {"messages": [USER, {"role": "assistant"}]}, {}, "messages[1] has no content"),
    ("messages", {"messages": [USER, {"role": "assistant", "content": None}]}, {}, "messages[1] has no content"),
    ("messages", {"messages": [USER, {"role": "assistant", "content": ""}]}, {}, "the content of messages[1] is empty"),
    ("messages", {"messages": [{"role": "user", "content": 5}]}, {}, "the content of messages[0] is a number"),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
        {},
        "the content of messages[0] has parts that are not text",
    ),
    (
        "messages",
        {"messages": [{"role": "developer", "content": "one"}]},
        {},
        "messages[0]: the chat template failed: TemplateError: no developers here",
    ),
    ("messages", {"messages": [USER], "tools": "{"}, {}, "'tools' is not valid JSON"),
    ("messages", {"messages": [USER]}, {"assistant_only_loss": True}, "none of its"),
    ("messages", {"messages": [USER]}, {"completion_only_loss": True}, "the last message has the role 'user'"),
    ("messages", {"messages": [ASSISTANT]}, {"completion_only_loss": True}, "the completion has no prompt"),
    (
        "sharegpt",
        {"conversations": [{"from": "alien", "value": "x"}]},
        {},
        "conversations[0] has the unknown role 'alien'",
    ),
    ("sharegpt", {"conversations": [{"from": "human"}]}, {}, "conversations[0] has no content"),
    ("input_ids", {"input_ids": []}, {}, "'input_ids' is empty"),
    ("input_ids", {"input_ids": [5]}, {}, "has 1 token, and nothing to predict"),
    ("input_ids", {"input_ids": None}, {}, "'input_ids' is null"),
    ("input_ids", {"input_ids": "5 6"}, {}, "'input_ids' is text, not a list of integers: '5 6'"),
    ("input_ids", {"input_ids": [5, 6.0]}, {}, "'input_ids' contains 6.0, which is not an integer"),
    ("input_ids", {"input_ids": [5, None]}, {}, "'input_ids' contains None, which is not an integer"),
    ("input_ids", {"input_ids": [5, True]}, {}, "'input_ids' contains True, which is not an integer"),
    ("input_ids", {"input_ids": [5, "6"]}, {}, "'input_ids' contains '6', which is not an integer"),
    ("input_ids", {"input_ids": [5, [6]]}, {}, "'input_ids' contains [6], which is not an integer"),
    ("input_ids", {"input_ids": [5, -1]}, {}, "'input_ids' contains -1, which is outside the vocabulary of"),
    ("input_ids", {"input_ids": [5, 10**6]}, {}, "'input_ids' contains 1000000, which is outside the vocabulary of"),
    ("input_ids", {"input_ids": [5, 10**30]}, {}, "'input_ids' contains an integer that does not fit into 64 bits"),
    ("input_ids", {"input_ids": [5, 6], "labels": [5]}, {}, "'labels' has 1 entries for 2 input_ids"),
    (
        "input_ids",
        {"input_ids": [5, 6], "labels": [5, -7]},
        {},
        "'labels' contains -7, which is outside the vocabulary",
    ),
    ("input_ids", {"input_ids": [5, 6], "labels": [5, -100]}, {}, "none of its 2 tokens is supervised"),
    ("input_ids", {"input_ids": [5, 6], "labels": "5"}, {}, "'labels' is text, not a list of integers"),
    (
        "input_ids",
        {"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0]},
        {},
        "'attention_mask' has zeros, so the row is padded",
    ),
    ("input_ids", {"input_ids": [5, 6], "completion_mask": [0, 0]}, {}, "none of its 2 tokens is supervised"),
    (
        "messages",
        {"messages": [USER, ASSISTANT], "tools": [{"name": "f"}], "functions": [{"name": "g"}]},
        {},
        "has tools in 'tools' and in 'functions'",
    ),
    (
        "messages",
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f"}], "function_call": {"name": "g"}}]},
        {},
        "messages[1] has 'tool_calls' and a 'function_call'",
    ),
    (
        "messages",
        {"messages": [USER, ASSISTANT | {"reasoning": "one", "thinking": "two"}]},
        {},
        "messages[1] has several texts of reasoning",
    ),
]


@pytest.mark.parametrize(("format", "bad", "options", "reason"), BAD, ids=range(len(BAD)))
def test_bad_row(format, bad, options, reason, write_rows, chat_tokenizer):
    good = GOOD[format]
    path = write_rows(good, bad, good)
    options = {"format": format, **options}
    with pytest.raises(DataError) as error:
        build_examples(open_rows(path), chat_tokenizer, **options)
    assert "1 of 3 rows cannot be trained on" in str(error.value)
    assert f"rows.jsonl, line 2: {reason}" in str(error.value)

    examples = build_examples(open_rows(path), chat_tokenizer, **options, on_bad_row="skip")
    assert examples.rows.tolist() == [0, 2]
    ((where, skipped_reason),) = examples.report.skipped
    assert where == "rows.jsonl, line 2" and skipped_reason.startswith(reason)
    alone = build_examples(open_rows(write_rows(good, name="good.jsonl")), chat_tokenizer, **options)
    assert shown(chat_tokenizer, examples) == 2 * shown(chat_tokenizer, alone)


@pytest.mark.parametrize("format", GOOD)
def test_good_rows_are_not_bad(format, build, chat_tokenizer):
    assert build([GOOD[format]], chat_tokenizer).report.skipped == ()


def test_conversation_without_template_is_bad_among_plain_prompts(build, tokenizer):
    rows = [GOOD["prompt_completion"], {"prompt": [USER], "completion": [ASSISTANT]}]
    examples = build(rows, tokenizer, on_bad_row="skip")
    assert examples.report.skipped == (
        ("rows.jsonl, line 2", "the row is a conversation, and the tokenizer has no chat template"),
    )


def test_plain_row_is_bad_among_conversations_for_assistant_only(build, chat_tokenizer):
    rows = [{"prompt": [USER], "completion": [ASSISTANT]}, GOOD["prompt_completion"]]
    examples = build(rows, chat_tokenizer, on_bad_row="skip", assistant_only_loss=True)
    assert [where for where, _ in examples.report.skipped] == ["rows.jsonl, line 2"]


def test_error_lists_ten_and_counts_all(build, tokenizer):
    rows = [{"text": "one"}, *({"text": i} for i in range(25))]
    with pytest.raises(DataError) as error:
        build(rows, tokenizer)
    message = str(error.value)
    assert "25 of 26 rows" in message and "... and 15 more" in message
    assert "line 2: 'text' is a number, not text: 0" in message
    assert "line 11:" in message and "line 12:" not in message
    assert error.value.key == "data.on_bad_row" and "skip" in error.value.fix


def test_report_lists_all_that_were_skipped(build, tokenizer):
    examples = build([*[{"text": "one"}] * 25, *({"text": i} for i in range(25))], tokenizer, on_bad_row="skip")
    assert len(examples.report.skipped) == 25 == len(examples.report.to_dict()["skipped"])
    assert "bad rows, skipped: 25" in examples.report.lines()
    assert examples.report.lines()[-1] == "  ... and 15 more"


def test_more_bad_rows_than_good_ones_are_no_exception(build, chat_tokenizer, tokenizer):
    """One row of another format decides for all, say: 21 of 22 rows were skipped with a line among others."""
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    rows = [{"messages": messages}, *[{"prompt": "one", "completion": "two"}] * 21]
    with pytest.raises(DataError) as error:
        build(rows, chat_tokenizer, on_bad_row="skip")
    message = str(error.value)
    assert "21 of 22 rows, more than half, cannot be trained on as the format `messages`" in message
    assert "set `data.format` to the format of most rows" in message and "line 2: " in message
    assert len(build([{"text": "one"}, {"text": 2}], tokenizer, on_bad_row="skip")) == 1  # control: half


def test_nothing_left(build, tokenizer):
    with pytest.raises(DataError, match="none of 2 rows is left"):
        build([{"text": 1}, {"text": 2}], tokenizer, on_bad_row="skip")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_a_file_in_another_unicode_is_named(name, encoding, tmp_path):
    text = "text\none\n" if name.endswith("csv") else '{"text": "one"}\n'
    path = tmp_path / name
    path.write_bytes((codecs.BOM_UTF16_BE if encoding.endswith("be") else b"") + text.encode(encoding))
    with pytest.raises(DataError, match=f"{name}: data.path: is text in UTF-16 or UTF-32") as error:
        open_rows(path)
    assert "iconv" in error.value.fix
    path.write_text(text)
    assert list(open_rows(path)) == [{"text": "one"}]  # the control


def test_two_columns_of_one_name_are_refused(tmp_path):
    """Only one of them would be read, as in JSON and CSV, where that is refused, too."""
    texts = pa.array(["one"]), pa.array(["two"])
    pq.write_table(pa.table(list(texts), names=["text", "text"]), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows.parquet: data.path: contains several columns of one name.*'text'"):
        open_rows(tmp_path / "rows.parquet")
