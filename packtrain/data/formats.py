"""Row formats: which columns they need, and what a row of each says.

    format             columns                        becomes
    input_ids          input_ids (+ labels)           Ids, used as they are
    messages           messages (+ tools)             Chat
    prompt_completion  prompt, completion             Text; Chat where both are lists of messages
    sharegpt           conversations (+ tools)        Chat
    alpaca             instruction, output (+ input)  Chat; Text where the tokenizer has no chat template
    question_answer    question, answer               the same
    text               text                           Text without a prompt

A format is found by its columns, the first of this table that fits, or named by the user. Parsers check types
and raise `BadRow` with the reason; they know nothing of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from packtrain.data.report import BadRow
from packtrain.errors import DataError, shorten
from packtrain.recipe.fields import did_you_mean

IGNORED = -100  # the label of a token that is not supervised
MASKS = ("completion_mask", "assistant_masks")  # columns that say what is learnt: where all of them are not 0
ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_response": "tool",
    "observation": "tool",
} | {role: role for role in ROLES}

# Without a chat template: the wording of Stanford Alpaca, and that of lm-evaluation-harness for GSM8K.
ALPACA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
QUESTION_PROMPT = "Question: {question}\nAnswer:"


@dataclass(frozen=True, kw_only=True)
class Text:
    """Plain text: a completion, after a prompt if there is one."""

    prompt: str = ""
    completion: str


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A conversation for a chat template; its first `prompt_messages` messages are the prompt."""

    messages: list[dict[str, object]]
    prompt_messages: int
    tools: list[object] | None = None


@dataclass(frozen=True, kw_only=True)
class Ids:
    """Token ids `[L]` and labels `[L]`, both int64, as the row gives them."""

    input_ids: np.ndarray
    labels: np.ndarray


Row = dict[str, object]


@dataclass(frozen=True, kw_only=True)
class Format:
    """A row format: `parse(row, chat)` reads a row; `chat` tells whether there is a chat template to render with.

    `completion_only` is whether only completions are learnt unless the user says otherwise; None where a row
    has no completion to single out.
    """

    columns: tuple[str, ...]
    parse: Callable[[Row, bool], Text | Chat | Ids]
    completion_only: bool | None


def find_format(columns: Sequence[str], name: str = "auto") -> tuple[str, list[str]]:
    """Returns the format's name, and the other formats that the columns fit as well.

    Args:
        columns: columns of the rows.
        name: a key of `FORMATS`, or `auto`.

    Raises:
        DataError: unknown name, missing columns, or columns that fit no format.
    """
    known = "; ".join(f"{key} ({', '.join(fmt.columns)})" for key, fmt in FORMATS.items())
    if name != "auto" and name not in FORMATS:
        near = did_you_mean(name, FORMATS)
        fix = f"did you mean `{near}`?" if near else f"formats and the columns they need: {known}"
        raise DataError("is not a row format", key="data.format", value=name, fix=fix)
    fitting = [key for key, fmt in FORMATS.items() if set(fmt.columns) <= set(columns)]
    if name != "auto":
        missing = [column for column in FORMATS[name].columns if column not in columns]
        if missing:
            what = f"the rows have no column {', '.join(map(repr, missing))}, which format `{name}` needs"
            fix = f"the columns are {', '.join(columns)}; the formats are {known}"
            raise DataError(what, key="data.format", value=name, fix=fix)
        return name, []
    if not fitting:
        fix = f"rename columns to fit one of the formats: {known}"
        raise DataError(f"no format fits the columns {', '.join(columns) or '(none)'}", key="data.format", fix=fix)
    return fitting[0], fitting[1:]


def _parse_text(row: Row, chat: bool) -> Text:
    return Text(completion=_text(row, "text"))


def _parse_prompt_completion(row: Row, chat: bool) -> Text | Chat:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        before, after = _messages(row, "prompt"), _messages(row, "completion")
        return Chat(messages=before + after, prompt_messages=len(before), tools=_tools(row))
    if isinstance(prompt, list) != isinstance(completion, list) and prompt is not None and completion is not None:
        raise BadRow("'prompt' and 'completion' must both be text or both be lists of messages")
    return Text(prompt=_text(row, "prompt"), completion=_text(row, "completion"))


def _parse_messages(row: Row, chat: bool) -> Chat:
    messages = _messages(row, "messages")
    return Chat(messages=messages, prompt_messages=len(messages) - 1, tools=_tools(row))


def _parse_sharegpt(row: Row, chat: bool) -> Chat:
    turns = _list_of_objects(row, "conversations")
    renamed = []
    for number, turn in enumerate(turns):
        role = turn.get("from", turn.get("role"))
        if not isinstance(role, str) or role not in _SHAREGPT_ROLES:
            raise BadRow(f"conversations[{number}] is from {shorten(role, 40)}, an unknown speaker")
        message = {"role": _SHAREGPT_ROLES[role], "content": turn.get("value", turn.get("content"))}
        renamed.append(_message(message, f"conversations[{number}]"))
    return Chat(messages=renamed, prompt_messages=len(renamed) - 1, tools=_tools(row))


def _parse_alpaca(row: Row, chat: bool) -> Text | Chat:
    instruction, output = _text(row, "instruction"), _text(row, "output")
    context = _text(row, "input") if row.get("input") not in (None, "") else ""
    if chat:
        return _one_turn(f"{instruction}\n\n{context}" if context else instruction, output)
    template = ALPACA_PROMPT_WITH_INPUT if context else ALPACA_PROMPT
    return Text(prompt=template.format(instruction=instruction, input=context), completion=output)


def _parse_question_answer(row: Row, chat: bool) -> Text | Chat:
    question, answer = _text(row, "question"), _text(row, "answer")
    if chat:
        return _one_turn(question, answer)
    return Text(prompt=QUESTION_PROMPT.format(question=question), completion=" " + answer)


def _parse_input_ids(row: Row, chat: bool) -> Ids:
    ids = _integers(row, "input_ids")
    if not len(ids):
        raise BadRow("'input_ids' is empty")
    given = row.get("labels") is not None  # they have the last word: masks next to them say nothing
    labels = _integers(row, "labels", len(ids)) if given else ids.copy()
    for column in () if given else MASKS:
        if row.get(column) is not None:
            labels[_integers(row, column, len(ids)) == 0] = IGNORED
    if row.get("attention_mask") is not None and not _integers(row, "attention_mask", len(ids)).all():
        raise BadRow("'attention_mask' has zeros, so the row is padded; tokenise without padding")
    return Ids(input_ids=ids, labels=labels)


FORMATS: dict[str, Format] = {
    "input_ids": Format(columns=("input_ids",), parse=_parse_input_ids, completion_only=None),
    "messages": Format(columns=("messages",), parse=_parse_messages, completion_only=False),
    "prompt_completion": Format(columns=("prompt", "completion"), parse=_parse_prompt_completion, completion_only=True),
    "sharegpt": Format(columns=("conversations",), parse=_parse_sharegpt, completion_only=False),
    "alpaca": Format(columns=("instruction", "output"), parse=_parse_alpaca, completion_only=True),
    "question_answer": Format(columns=("question", "answer"), parse=_parse_question_answer, completion_only=True),
    "text": Format(columns=("text",), parse=_parse_text, completion_only=None),
}
# Columns beyond the needed ones that a format reads where it finds them.
OPTIONAL_COLUMNS: dict[str, tuple[str, ...]] = {
    "input_ids": ("labels", *MASKS, "attention_mask"),
    "messages": ("tools",),
    "prompt_completion": ("tools",),
    "sharegpt": ("tools",),
    "alpaca": ("input",),
}


def _one_turn(user: str, assistant: str) -> Chat:
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return Chat(messages=messages, prompt_messages=1)


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if value is None:
        raise BadRow(f"'{column}' is missing" if column not in row else f"'{column}' is null")
    if not isinstance(value, str):
        raise BadRow(f"'{column}' is {_kind(value)}, not text: {shorten(value, 40)}")
    if not value.strip():
        raise BadRow(f"'{column}' is empty")
    return value


def _list_of_objects(row: Row, column: str) -> list[dict[str, object]]:
    value = row.get(column)
    if value is None:
        raise BadRow(f"'{column}' is missing" if column not in row else f"'{column}' is null")
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise BadRow(f"'{column}' is not a list of messages: {shorten(value, 40)}")
    if not value:
        raise BadRow(f"'{column}' is empty")
    return value


def _messages(row: Row, column: str) -> list[dict[str, object]]:
    return [_message(item, f"{column}[{n}]") for n, item in enumerate(_list_of_objects(row, column))]


def _message(message: dict[str, object], where: str) -> dict[str, object]:
    """Returns a message with role and content checked, keys without a value left out."""
    message = {key: value for key, value in message.items() if value is not None}
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise BadRow(f"{where} has the unknown role {shorten(role, 40)} (known: {', '.join(ROLES)})")
    if content is None and message.get("tool_calls"):
        return message
    if isinstance(content, list):
        content = _join_parts(content, where)
    if content is None:
        raise BadRow(f"{where} has no content")
    if not isinstance(content, str):
        raise BadRow(f"the content of {where} is {_kind(content)}, not text: {shorten(content, 40)}")
    if not content.strip() and role in ("user", "assistant") and not message.get("tool_calls"):
        raise BadRow(f"the content of {where} is empty")
    return message | {"content": content}


def _join_parts(parts: list[object], where: str) -> str:
    """Joins `[{"type": "text", "text": ...}, ...]` to text; pictures and sound are refused."""
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise BadRow(f"the content of {where} has parts that are not text: {shorten(parts, 40)}")
    return "".join(texts)


def _tools(row: Row) -> list[object] | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError as error:
            raise BadRow(f"'tools' is not valid JSON: {error.msg}") from None
    if tools is not None and not isinstance(tools, list):
        raise BadRow(f"'tools' is not a list: {shorten(tools, 40)}")
    return tools or None


def _integers(row: Row, column: str, length: int | None = None) -> np.ndarray:
    """Returns a row's list as int64 `[L]`."""
    value = row.get(column)
    if value is None:
        raise BadRow(f"'{column}' is missing" if column not in row else f"'{column}' is null")
    if not isinstance(value, list):
        raise BadRow(f"'{column}' is {_kind(value)}, not a list of integers: {shorten(value, 40)}")
    if odd := set(map(type, value)) - ({int, bool} if column in (*MASKS, "attention_mask") else {int}):
        example = next(item for item in value if type(item) in odd)
        raise BadRow(f"'{column}' contains {shorten(example, 40)}, which is not an integer")
    if length is not None and len(value) != length:
        raise BadRow(f"'{column}' has {len(value)} entries for {length} input_ids")
    try:
        return np.array(value, dtype=np.int64)
    except OverflowError:
        raise BadRow(f"'{column}' contains an integer that does not fit into 64 bits") from None


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    return {list: "a list", dict: "an object", str: "text"}.get(type(value), type(value).__name__)
