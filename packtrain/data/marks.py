"""Marks between which every string of a conversation is rendered, and what they tell of the text.

    messages     {"role": "user", "content": " 2+2? "}      marked   " (2+2?) "
    rendered     <|user|>(2+2?)<|end|>                      string 0 stands at 8..12 of the text without marks

A mark is a character of Unicode's private planes that carries the number of its string. Blanks at the ends of a string stay
outside, as templates cut them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from packtrain.data.messages import REASONING, Chat

Kind = Literal["content", "reasoning", "tool call", "tools", "tool answer"]

_OPEN, _CLOSE = 0xF0000, 0x100000  # first private characters that begin, and end, the string of that number
MARKED = re.compile("[\U000f0000-\U0010ffff]")
MOST_STRINGS = 0xFFFD
_THINKING = re.compile(r"(\s*<think>)?(.*?)(</think>)(.*)", re.DOTALL)


@dataclass(frozen=True)
class Lost:
    """A string of a conversation that its text does not contain: of which kind, in which message (None: the tools)."""

    kind: Kind
    message: int | None
    string: str


@dataclass(frozen=True, kw_only=True)
class Marked:
    """A conversation whose strings stand between marks; `strings[n]` is the one between the marks of number n."""

    chat: Chat
    strings: list[Lost]

    def of_message(self, message: int) -> list[int]:
        return [number for number, string in enumerate(self.strings) if string.message == message]


def mark_strings(chat: Chat) -> Marked:
    """Puts marks around every string of a conversation: what messages say, tool calls, and names and texts of tools."""
    strings: list[Lost] = []

    def mark(text: str, kind: Kind, message: int | None) -> str:
        core = text.strip()
        if not core:
            return text
        before = text[: len(text) - len(text.lstrip())]
        number = len(strings)
        strings.append(Lost(kind, message, core))
        opened, closed = chr(_OPEN + number % MOST_STRINGS), chr(_CLOSE + number % MOST_STRINGS)
        return before + opened + core + closed + text[len(before) + len(core) :]

    def mark_values(value: object, message: int) -> object:
        if isinstance(value, str):
            return mark(value, "tool call", message)
        if isinstance(value, dict):
            return {mark(str(key), "tool call", message): mark_values(inner, message) for key, inner in value.items()}
        return [mark_values(inner, message) for inner in value] if isinstance(value, list) else value

    def mark_schema(schema: object) -> object:
        """Marks names and descriptions; the other strings of a schema are words that templates compare with."""
        if isinstance(schema, list):
            return [mark_schema(inner) for inner in schema]
        if not isinstance(schema, dict):
            return schema
        done = dict(schema)
        if isinstance(schema.get("properties"), dict):
            names = {name: mark(str(name), "tools", None) for name in schema["properties"]}
            done["properties"] = {names[name]: mark_schema(inner) for name, inner in schema["properties"].items()}
            if isinstance(schema.get("required"), list):
                done["required"] = [names.get(name, name) for name in schema["required"] if isinstance(name, str)]
        for key in ("name", "description"):
            if isinstance(schema.get(key), str):
                done[key] = mark(schema[key], "tools", None)
        for key in schema.keys() - {"properties", "required", "name", "description"}:
            done[key] = mark_schema(schema[key])
        return done

    tools = None if chat.tools is None else [mark_schema(tool) for tool in chat.tools]
    messages = []
    for number, message in enumerate(chat.messages):
        done = dict(message)
        for name in REASONING:
            if message.get(name):
                done = {key: value for key, value in done.items() if key not in REASONING}
                done[name] = mark(message[name], "reasoning", number)
                break
        content = message.get("content")
        if isinstance(content, str):
            kind: Kind = "tool answer" if message["role"] == "tool" else "content"
            thinking = _THINKING.fullmatch(content) if message["role"] == "assistant" else None
            if thinking:
                opened, thought, closed, answer = thinking.groups(default="")
                thought = mark(thought, "reasoning", number)
                done["content"] = opened + thought + closed + mark(answer, kind, number)
            else:
                done["content"] = mark(content, kind, number)
        if message.get("tool_calls"):
            done["tool_calls"] = [_marked_call(call, number, mark, mark_values) for call in message["tool_calls"]]
        messages.append(done)
    return Marked(chat=replace(chat, messages=messages, tools=tools), strings=strings)


def _marked_call(call: dict, number: int, mark: Callable, mark_values: Callable) -> dict:
    function = dict(call["function"], name=mark(call["function"]["name"], "tool call", number))
    arguments = function["arguments"]
    if isinstance(arguments, str):  # in text form: marked inside, and written again
        function["arguments"] = json.dumps(mark_values(json.loads(arguments), number), ensure_ascii=False)
    else:
        function["arguments"] = mark_values(arguments, number)
    return call | {"function": function}


def unmark(text: str) -> tuple[dict[int, list[tuple[int, int]]], str]:
    """Returns string number -> where it stands (whole, between its own marks), and the text without marks."""
    found: dict[int, list[tuple[int, int]]] = {}
    opened: dict[int, int] = {}
    parts, position, at = [], 0, 0
    for match in MARKED.finditer(text):
        piece = text[at : match.start()]
        parts.append(piece)
        position += len(piece)
        at = match.end()
        code = ord(match.group())
        if code < _CLOSE:
            opened[code - _OPEN] = position
        elif (number := code - _CLOSE) in opened:
            found.setdefault(number, []).append((opened.pop(number), position))
    parts.append(text[at:])
    return found, "".join(parts)


def contains(text: str, string: str) -> bool:
    """Whether a text contains a string, as it is or as JSON writes it."""
    return string in text or json.dumps(string, ensure_ascii=False)[1:-1] in text or json.dumps(string)[1:-1] in text
