"""Conversations as rows write them, brought into one form: roles, tool calls, and which turns are learnt.

    a row says                                              it becomes
    {"from": "gpt", "value": "4"}                           {"role": "assistant", "content": "4"}
    {"from": "function_call", "value": '{"name": ...}'}     an assistant message with `tool_calls`
    {"role": "ipython", "content": ...}                     {"role": "tool", "content": ...}
    {"function_call": {"name": ..., "arguments": "{...}"}}  `tool_calls`, arguments as an object
    {"role": "assistant", ..., "weight": 0}                 the message, and a switch that is off

A tool call has OpenAI's form, `{"type": "function", "function": {"name", "arguments"}}`; arguments that are JSON text are
read, so that a template can be given whichever it expects. A switch is a key of a message that says whether, or how much,
the message is learnt. Switches are not shown to the chat template.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from packtrain.data.report import BadRow, reason_of
from packtrain.errors import shorten
from packtrain.recipe.fields import did_you_mean

ROLES = ("system", "developer", "user", "assistant", "tool")
_KNOWN_AS = {role: role for role in ROLES} | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "observation": "tool",
    "ipython": "tool",
}
_CALLS = ("function_call", "tool_call")  # roles whose content is a tool call in JSON
SWITCHES = ("weight", "train", "training", "loss", "learn")
REASONING = ("reasoning_content", "reasoning", "thinking")  # transformers' names, any of which a template may read
_SMALLEST, _LARGEST = 2.0**-126, 2.0**127  # factors are kept in 32 bits
_LIKE_SWITCHES = ("weight", "train", "learn", "loss", "mask")  # in the names of keys
_READ = {"from", "value", "function_call", *SWITCHES}  # keys that no template sees


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A conversation for a chat template; its first `prompt_messages` messages are the prompt.

    Attributes:
        messages: role, content and what else the row gives, in one form.
        prompt_messages: how many messages come before the completion.
        tools: JSON schemas, or None.
        template_kwargs: further arguments of the chat template, `{"enable_thinking": False}`.
        switches: message number -> factor of its loss: 0 leaves it out, 1 learns it. Messages without a switch are absent.
        names: message number -> how the row names it, `messages[2]`.
        unknown: names of keys that look like a switch and are none.
    """

    messages: list[dict[str, Any]]
    prompt_messages: int
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    switches: dict[int, float] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Message:
    """One message in the common form, with its switch (None where it has none)."""

    body: dict[str, Any]
    where: str
    switch: float | None = None
    unknown: tuple[str, ...] = ()


def read_messages(row: Mapping[str, Any], column: str, roles: Mapping[str, str]) -> list[Message]:
    """Reads a column of messages, OpenAI's (`role`, `content`) or ShareGPT's (`from`, `value`).

    Args:
        roles: further names of speakers -> one of `ROLES`.

    Raises:
        BadRow: it is no list of messages; a speaker, a content, a tool call or a switch is none.
    """
    value = row.get(column)
    if value is None:
        raise BadRow(f"'{column}' is missing" if column not in row else f"'{column}' is null")
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = read_json(value, f"'{column}'")
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise BadRow(f"'{column}' is not a list of messages: {shorten(value, 40)}")
    if not value:
        raise BadRow(f"'{column}' is empty")
    return [_read_message(item, f"{column}[{number}]", roles) for number, item in enumerate(value)]


def make_chat(
    messages: list[Message],
    *,
    prompt_messages: int | None = None,
    tools: list[Any] | None = None,
    template_kwargs: dict[str, Any] | None = None,
) -> Chat:
    """Makes a conversation; by default its last message is the completion."""
    return Chat(
        messages=[message.body for message in messages],
        prompt_messages=len(messages) - 1 if prompt_messages is None else prompt_messages,
        tools=tools,
        template_kwargs=template_kwargs or {},
        switches={n: message.switch for n, message in enumerate(messages) if message.switch is not None},
        names=[message.where for message in messages],
        unknown=tuple(sorted({key for message in messages for key in message.unknown})),
    )


def turns_of(chat: Chat) -> dict[str, Chat]:
    """Splits a conversation into the assistant's answers, by their names, each with all messages before it as its prompt.

    A turn with the weight 0 is not an answer, only part of the prompts of later ones.

    Raises:
        BadRow: no message is an answer, one has no message before it, or a switch says what can't be done.
    """
    found = {}
    for number, (message, name) in enumerate(zip(chat.messages, chat.names, strict=True)):
        switch, answers = chat.switches.get(number), message["role"] == "assistant"
        if switch not in (None, 0, 1):
            raise BadRow(f"{name} has the weight {switch:g}, and an answer is learnt whole or not at all (1 or 0)")
        if switch and not answers:
            raise BadRow(f"{name} has a switch that is on, and only what the assistant answers is learnt")
        if not answers or switch == 0:
            continue
        if number == 0:
            raise BadRow(f'{name} has no message before it that it answers (give it "weight": 0, or leave it out)')
        found[name] = replace(chat, messages=chat.messages[: number + 1], prompt_messages=number, switches={})
    if not found:
        raise BadRow("none of its messages is an answer of the assistant that is learnt")
    return found


def make_message(role: str, content: str, where: str) -> Message:
    """Makes a message from a column of text."""
    return Message(body={"role": role, "content": content}, where=where)


def read_tools(row: Mapping[str, Any]) -> list[Any] | None:
    """Reads the tools of a row: `tools`, or `functions` in OpenAI's earlier form; lists, also as JSON text."""
    if row.get("tools") and row.get("functions"):
        raise BadRow("has tools in 'tools' and in 'functions'; keep one of them")
    for column in ("tools", "functions"):
        tools = row.get(column)
        if isinstance(tools, str):
            tools = read_json(tools, f"'{column}'") if tools.strip() else None
        if not tools:
            continue
        if not isinstance(tools, list):
            raise BadRow(f"'{column}' is not a list: {shorten(tools, 40)}")
        tools = [read_json(tool, f"{column}[{n}]") if isinstance(tool, str) else tool for n, tool in enumerate(tools)]
        if odd := next((tool for tool in tools if not isinstance(tool, dict)), None):
            raise BadRow(f"'{column}' contains {shorten(odd, 40)}, which is not an object that describes a tool")
        tools = [without_nulls(tool) for tool in tools]
        return tools if column == "tools" else [{"type": "function", "function": tool} for tool in tools]
    return None


def without_nulls(value: Any) -> Any:
    """Leaves out keys without a value: tables fill in those that only other rows have."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def read_json(text: str, where: str) -> Any:
    """Reads JSON text of a row."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRow(f"{where} is not valid JSON: {reason_of(error)}") from None
    except RecursionError:
        raise BadRow(f"{where} is not valid JSON: nested too deeply") from None


def _read_message(given: dict[str, Any], where: str, roles: Mapping[str, str]) -> Message:
    given = {key: value for key, value in given.items() if value is not None}
    sharegpt = "from" in given and "role" not in given
    speaker = given.get("from" if sharegpt else "role")
    role = roles.get(speaker) or _KNOWN_AS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        known = ", ".join(ROLES)
        raise BadRow(
            f"{where} has the unknown role {shorten(speaker, 40)} (known: {known}; `data.roles` maps other names to them)"
        )
    if speaker == role and given.keys() == {"role", "content"}:
        if isinstance(given["content"], str) and given["content"].strip():
            return Message(body=given, where=where)  # as most are: nothing else to look for
    body = {key: value for key, value in given.items() if key not in _READ} | {"role": role}
    content = given["value"] if sharegpt and "value" in given else given.get("content")
    if isinstance(content, list):
        content = _join_parts(content, where)
    if speaker in _CALLS:
        body["tool_calls"], content = _calls_in_text(content, where), None
    if body.get("tool_calls") and given.get("function_call"):
        raise BadRow(f"{where} has 'tool_calls' and a 'function_call'; keep one of them")
    calls = body.pop("tool_calls", None) or ([given["function_call"]] if given.get("function_call") else None)
    if isinstance(calls, str):
        calls = read_json(calls, f"the tool calls of {where}")
    if calls:
        if not isinstance(calls, list):
            raise BadRow(f"the tool calls of {where} are not a list: {shorten(calls, 40)}")
        body["tool_calls"] = [_read_call(call, f"{where}.tool_calls[{n}]") for n, call in enumerate(calls)]
    for name in REASONING:
        if name in body and not isinstance(body[name], str):
            raise BadRow(f"'{name}' of {where} is {kind_of(body[name])}, not text: {shorten(body[name], 40)}")
    if len({body[name] for name in REASONING if body.get(name)}) > 1:
        raise BadRow(f"{where} has several texts of reasoning; keep one of {', '.join(REASONING)}")
    if content is None and not calls:
        raise BadRow(f'{where} has no content (a message that says nothing has the content "")')
    if content is not None and not isinstance(content, str):
        raise BadRow(f"the content of {where} is {kind_of(content)}, not text: {shorten(content, 40)}")
    if role in ("user", "assistant") and not calls and not (content or "").strip():
        raise BadRow(f"the content of {where} is empty (leave the message out, or the row)")
    body.pop("content", None)
    body |= {} if content is None else {"content": content}
    switches = {key: _read_switch(given[key], f"'{key}' of {where}", key) for key in SWITCHES if key in given}
    if len(set(switches.values())) > 1:
        raise BadRow(f"{where} has switches that contradict each other: {', '.join(map(repr, switches))}")
    unknown = tuple(
        key for key, value in given.items()
        if key not in _READ
        and (isinstance(value, bool) or any(word in key for word in _LIKE_SWITCHES) or did_you_mean(key, SWITCHES))
    )  # fmt: skip
    return Message(body=body, where=where, switch=next(iter(switches.values()), None), unknown=unknown)


def _read_switch(value: Any, what: str, key: str) -> float:
    """Reads a switch: true, false, 0 or 1; a `weight` may be any factor from 0 on."""
    if not isinstance(value, bool | int | float) or not math.isfinite(value) or value < 0:
        raise BadRow(f"{what} is {shorten(value, 40)}, which is not true, false or a number from 0 on")
    if value and not _SMALLEST <= value <= _LARGEST:
        raise BadRow(f"{what} is {shorten(value, 40)}, which 32 bits can't hold: choose a factor near 1")
    if key != "weight" and value not in (0, 1):
        raise BadRow(f"{what} is {shorten(value, 40)}, and must be true or false (a factor of the loss is a 'weight')")
    return float(value)


def _read_call(call: Any, where: str) -> dict[str, Any]:
    """Reads a tool call into OpenAI's form, with the arguments as an object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise BadRow(f"{where} is not a call with the name of a function: {shorten(call, 40)}")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        arguments = read_json(arguments, f"the arguments of {where}") if arguments.strip() else {}
    if not isinstance(arguments, dict | None):
        raise BadRow(f"the arguments of {where} are not an object: {shorten(arguments, 40)}")
    outer = {key: value for key, value in call.items() if key in ("id", "type") and value is not None}
    found = {"name": function["name"], "arguments": without_nulls(arguments or {})}
    return {"type": "function"} | outer | {"function": found}


def _calls_in_text(content: Any, where: str) -> list[Any]:
    """Reads the tool call, or the list of them, that is the whole content of a message."""
    if isinstance(content, str):
        content = read_json(content, f"the tool call of {where}")
    return content if isinstance(content, list) else [content]


def _join_parts(parts: list[Any], where: str) -> str:
    """Joins `[{"type": "text", "text": ...}, ...]` to text; pictures and sound are refused."""
    texts = [part["text"] for part in parts if isinstance(part, dict) and part.get("type") == "text" and "text" in part]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        raise BadRow(f"the content of {where} has parts that are not text: {shorten(parts, 40)}")
    return "".join(texts)


def kind_of(value: Any) -> str:
    """Names the kind of a JSON value, for messages."""
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    return {list: "a list", dict: "an object", str: "text"}.get(type(value), type(value).__name__)
