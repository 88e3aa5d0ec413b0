"""Chat templates: what a conversation looks like as text, where each message stands in it, and what it leaves out.

A template is foreign code: it may cut blanks, hoist the system prompt, drop a tool call, or say a thinking header only in
the last turn. So nothing is assumed of it. Every string of a conversation is rendered once more between two characters
that no text contains (of Unicode's private planes), and these say where it came to stand:

    template     <|user|>{{ content }}<|end|><|assistant|>{{ content }}<|end|>
    marked       <|user|>(What is 2+2?)<|end|><|assistant|>(4)<|end|>
    without the marks it must be what the template renders of the row itself; else the marks changed what it does

A turn's words are then extended to what the model will have to generate: to the left, to the end of the generation prompt
(rendered from the messages before it, as at inference); to the right, to the end of what the template still renders when
the conversation stops there, its end-of-turn token included. A string without marks in the text was left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from packtrain.data.messages import REASONING, Chat
from packtrain.data.offsets import Span
from packtrain.data.report import BadRow
from packtrain.errors import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["content", "reasoning", "tool call", "tools", "tool answer"]

_OPEN, _CLOSE = 0xF0000, 0x100000  # first private characters that begin, and end, the string of that number
_MARKED = re.compile("[\U000f0000-\U0010ffff]")
_MOST_STRINGS = 0xFFFD
_GENERATION = re.compile(r"\{%-?\+?\s*generation\s*[-+]?%\}")
_THINKING = re.compile(r"(\s*<think>)?(.*?)(</think>)(.*)", re.DOTALL)
_SHORT = 8  # characters; a shorter string may stand in a text by chance
_REMEMBERED = 4096  # turns' ends


@dataclass(frozen=True)
class Lost:
    """A string of a conversation that its text does not contain: of which kind, in which message (None: the tools)."""

    kind: Kind
    message: int | None
    string: str


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A conversation as text.

    Attributes:
        chat: the conversation in the form that the template takes (see `_FORMS`).
        text: what the template renders.
        lost: strings that are not in it.
        turns: message number -> first character of what is generated in this turn, and one behind the last; only for the
            messages that were asked for, and not for those of which nothing is rendered.
    """

    chat: Chat
    text: str
    lost: tuple[Lost, ...] = ()
    turns: dict[int, tuple[int, int]]


class ChatTemplate:
    """Renders conversations with the chat template of a tokenizer; can be pickled."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._remembered: dict[object, int] = {}

    def __reduce__(self):
        return ChatTemplate, (self.tokenizer,)

    @cached_property
    def has_markers(self) -> bool:
        """Whether the template says itself what the assistant generates, with `{% generation %}`."""
        template = self.tokenizer.chat_template
        templates = template.values() if isinstance(template, dict) else [template or ""]
        return any(_GENERATION.search(text) for text in templates)

    def render(self, chat: Chat, turns: Iterable[int] = ()) -> Rendered:
        """Renders a conversation and locates messages.

        Args:
            turns: numbers of the messages to be located.

        Raises:
            BadRow: the template fails, or a message cannot be located.
        """
        chat, text = self._text(chat)
        turns = list(turns)
        if not turns and _says_all(chat, text):
            return Rendered(chat=chat, text=text, turns={})
        marked = _mark(chat)
        places = self._places(marked, text)
        if places is None:  # the marks changed what the template does
            lost = [s for s in marked.strings if not _contains(text, s.string)]
            located = {turn: self._by_prefixes(chat, text, turn) for turn in turns}
        else:
            lost = [string for number, string in enumerate(marked.strings) if number not in places]
            located = {turn: self._extent(marked, places, text, turn) for turn in turns}
        known = {turn: span for turn, span in located.items() if span is not None}
        return Rendered(chat=chat, text=text, lost=tuple(lost), turns=known)

    def prompt(self, rendered: Rendered) -> str:
        """Renders the prompt of a conversation, with the generation prompt."""
        chat = rendered.chat
        return self._apply(replace(chat, messages=chat.messages[: chat.prompt_messages]), add_generation_prompt=True)

    def generated(self, rendered: Rendered) -> list[Span]:
        """Returns what the template's `{% generation %}` markers enclose, in characters of the text.

        Raises:
            BadRow: it cannot be said, as the markers stand where their output is changed afterwards.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        chat, text = rendered.chat, rendered.text
        messages = [{k: v for k, v in _with_reasoning(message).items() if v is not None} for message in chat.messages]
        options: dict[str, Any] = self.tokenizer.special_tokens_map | chat.template_kwargs
        options |= {"tools": chat.tools, "chat_template": self.tokenizer.get_chat_template(None, chat.tools)}
        rendered_again: Any = render_jinja_template([messages], return_assistant_tokens_mask=True, **options)
        (again,), (spans,) = rendered_again
        bounds = [bound for span in spans for bound in span]
        if again != text or bounds != sorted(bounds) or (bounds and not 0 <= bounds[0] <= bounds[-1] <= len(text)):
            raise BadRow("what the chat template marks with {% generation %} cannot be located in the text it renders")
        return [(start, end, 1.0) for start, end in spans]

    # ------------------------------------------------------------------------------------------- rendering

    def _text(self, chat: Chat) -> tuple[Chat, str]:
        """Returns the conversation in the form that the template takes, and its text."""
        failure = None
        for form in (
            (self._form, *_FORMS) if any(message.get("tool_calls") for message in chat.messages) else _FORMS[:1]
        ):
            try:
                given = replace(chat, messages=[form(message) for message in chat.messages])
                return given, self._apply(given)
            except BadRow as error:
                failure = failure or error
        raise BadRow(f"{self._where_it_fails(chat)}{failure}")

    def _where_it_fails(self, chat: Chat) -> str:
        """Names the first message at which the template fails: `messages[1]: `."""
        for number, name in enumerate(chat.names[:-1]):
            try:
                self._apply(replace(chat, messages=chat.messages[: number + 1]))
            except BadRow:
                return f"{name}: "
        return f"{chat.names[-1]}: " if chat.names else ""

    @cached_property
    def _form(self) -> Callable[[dict], dict]:
        """The first form of tool calls that the template renders as one would write it."""
        for form in _FORMS:
            messages = [form(message) for message in _PROBE]
            try:
                text = self._apply(Chat(messages=messages, prompt_messages=3, tools=[_PROBE_TOOL]))
            except BadRow:
                continue
            behind = text.partition(_QUESTION)[2]
            if "probed_place" in behind and not re.search(r"""\\"probed_|'probed_|None""", behind):
                return form
        return _FORMS[0]

    def _apply(self, chat: Chat, **options: Any) -> str:
        messages = [_with_reasoning(message) for message in chat.messages]
        try:
            options |= {"tools": chat.tools, "tokenize": False}
            text: Any = self.tokenizer.apply_chat_template(messages, **chat.template_kwargs, **options)
            return text
        except Exception as error:  # a template is foreign code: whatever it raises is about this row
            raise BadRow(f"the chat template failed: {type(error).__name__}: {error}") from None

    # ------------------------------------------------------------------------------------------- turns

    def _places(self, marked: _Marked, text: str) -> dict[int, list[tuple[int, int]]] | None:
        """Returns string number -> where it stands in the text; None where the marks change the text."""
        if _MARKED.search(text) or len(marked.strings) > _MOST_STRINGS:
            return None
        try:
            found, bare = _unmark(self._apply(marked.chat))
        except BadRow:
            return None
        return found if bare == text else None

    def _extent(self, marked: _Marked, places: dict, text: str, turn: int) -> tuple[int, int] | None:
        """Returns the characters of a turn: its words, extended to what is generated; None where no word is rendered."""
        own = [places[number][0] for number in marked.of_message(turn) if number in places]
        if not own:
            return None
        first, last = min(own)[0], max(end for _, end in own)
        everything = [place for found in places.values() for place in found]
        left = max((end for _, end in everything if end <= first), default=0)
        right = min((start for start, _ in everything if start >= last), default=len(text))
        messages = marked.chat.messages
        start = first
        if messages[turn]["role"] == "assistant":
            start = left + self._remember(
                ("start", text[left:first], turn == 0, _key(marked.chat, turn - 1)),
                lambda: self._prompted(marked, turn, text[left:first]),
            )
        if turn == len(messages) - 1:
            return start, len(text)
        end = last + self._remember(
            ("end", text[last:right], _key(marked.chat, turn)), lambda: self._ended(marked, turn, text[last:right])
        )
        return start, end

    def _prompted(self, marked: _Marked, turn: int, between: str) -> int:
        """Returns how much of the text before a turn's words is the prompt, as the model is prompted for this turn."""
        header = between.rfind(self._header) + len(self._header) if self._header in between else 0
        if turn == 0:
            return header if header or not self._header else len(between)
        try:
            before = replace(marked.chat, messages=marked.chat.messages[:turn])
            found, bare = _unmark(self._apply(before, add_generation_prompt=True))
        except BadRow:
            return header or len(between)
        last = max((end for places in found.values() for _, end in places), default=0)
        return max(header, self._common(bare[last:], between))

    def _ended(self, marked: _Marked, turn: int, behind: str) -> int:
        """Returns how much of the text behind a turn's words is still this turn's.

        Where a conversation may stop with another token than the one that ends a turn inside it (gpt-oss), the latter is
        what stands before the next generation prompt.
        """
        upto = replace(marked.chat, messages=marked.chat.messages[: turn + 1])
        lengths = [0]
        for options in ({}, {"add_generation_prompt": True}):
            try:
                found, bare = _unmark(self._apply(upto, **options))
            except BadRow:
                continue
            own = [found[number][0] for number in marked.of_message(turn) if number in found]
            if own and (not options or (self._header and bare.endswith(self._header))):
                end = len(bare) - (len(self._header) if options else 0)
                lengths.append(self._common(bare[max(stop for _, stop in own) : end], behind))
        return max(lengths)

    @cached_property
    def _header(self) -> str:
        """The generation prompt, as it follows a question; empty where that can't be told."""
        question = Chat(messages=[{"role": "user", "content": _QUESTION}], prompt_messages=1)
        try:
            without, prompted = self._apply(question), self._apply(question, add_generation_prompt=True)
        except BadRow:
            return ""
        return prompted[len(without) :] if prompted.startswith(without) else ""

    def _by_prefixes(self, chat: Chat, text: str, turn: int) -> tuple[int, int]:
        """Locates a turn where marks change what the template does: by what it renders without and with the turn."""
        messages = chat.messages
        assistant = messages[turn]["role"] == "assistant"
        before = ""
        if turn:
            before = self._apply(replace(chat, messages=messages[:turn]), add_generation_prompt=assistant)
        until = self._apply(replace(chat, messages=messages[: turn + 1]))
        end = len(text) if turn == len(messages) - 1 else self._common(until, text)
        words = str(messages[turn].get("content") or "").strip()
        if not text.startswith(before) or not _contains(text[len(before) : end], words):
            raise BadRow(
                f"{chat.names[turn] if chat.names else f'message {turn}'} cannot be located in what the chat template "
                "renders: it renders the messages before it otherwise when this one follows"
            )
        return len(before), end

    def _common(self, expected: str, text: str) -> int:
        """Returns the length of the common beginning, no special token or tag cut in two."""
        if text.startswith(expected):
            return len(expected)
        length = 0
        for one, other in zip(self._pieces(expected), self._pieces(text), strict=False):
            if one != other:
                plain = not self._special.fullmatch(one) and not self._special.fullmatch(other)
                return length + (len(_common_prefix(one, other)) if plain else 0)
            length += len(one)
        return length

    def _pieces(self, text: str) -> Iterator[str]:
        return (piece for piece in self._special.split(text) if piece)

    @cached_property
    def _special(self) -> re.Pattern[str]:
        added = sorted({str(token) for token in self.tokenizer.get_added_vocab()}, key=len, reverse=True)
        known = [re.escape(token) for token in added if token.strip()]
        return re.compile("(" + "|".join([*known, r"<[|｜/]?[^<>\s]{1,60}>", r"\[/?[A-Z_]{2,40}\]"]) + ")")

    def _remember(self, key: object, find: Callable[[], int]) -> int:
        if key not in self._remembered:
            if len(self._remembered) >= _REMEMBERED:
                self._remembered.clear()
            self._remembered[key] = find()
        return self._remembered[key]


def _key(chat: Chat, turn: int) -> tuple:
    """Returns what the template's text around a message may depend on, but for the strings."""
    message = chat.messages[turn]
    kwargs = json.dumps(chat.template_kwargs, sort_keys=True, default=str)
    return kwargs, bool(chat.tools), message["role"], bool(message.get("tool_calls")), "content" in message


def _common_prefix(one: str, other: str) -> str:
    length = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]


# ------------------------------------------------------------------------------------------------- forms of tool calls


def _as_objects(message: dict) -> dict:
    return message


def _as_text(message: dict) -> dict:
    """Writes the arguments of tool calls as JSON text."""
    if not message.get("tool_calls"):
        return message
    calls = [
        call
        | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}}
        for call in message["tool_calls"]
    ]
    return message | {"tool_calls": calls}


def _with_content(form: Callable[[dict], dict]) -> Callable[[dict], dict]:
    """Gives messages without a content an empty one."""
    return lambda message: {"content": ""} | form(message)


_FORMS = (_as_objects, _with_content(_as_objects), _as_text, _with_content(_as_text))
_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probed_tool",
        "description": "Looks up.",
        "parameters": {
            "type": "object",
            "properties": {"probed_city": {"type": "string", "description": "Where."}},
            "required": ["probed_city"],
        },
    },
}
_QUESTION = "Where?"
_PROBE: list[dict[str, Any]] = [
    {"role": "user", "content": _QUESTION},
    {
        "role": "assistant",
        "tool_calls": [
            {
                "id": "call00001",  # as long as Mistral's templates want it
                "type": "function",
                "function": {"name": "probed_tool", "arguments": {"probed_city": "probed_place"}},
            }
        ],
    },
    {"role": "tool", "name": "probed_tool", "tool_call_id": "call00001", "content": "There."},
    {"role": "assistant", "content": "There."},
]


def _with_reasoning(message: dict) -> dict:
    """Gives a message's reasoning under every name by which templates read it."""
    given = next((message[name] for name in REASONING if message.get(name)), None)
    return message if given is None else message | dict.fromkeys(REASONING, given)


# ------------------------------------------------------------------------------------------------- marks


@dataclass(frozen=True, kw_only=True)
class _Marked:
    """A conversation whose strings stand between marks; `strings[n]` is the one between the marks of number n."""

    chat: Chat
    strings: list[Lost]

    def of_message(self, message: int) -> list[int]:
        return [number for number, string in enumerate(self.strings) if string.message == message]


def _mark(chat: Chat) -> _Marked:
    strings: list[Lost] = []

    def mark(text: str, kind: Kind, message: int | None) -> str:
        core = text.strip()
        if not core:
            return text
        before = text[: len(text) - len(text.lstrip())]
        number = len(strings)
        strings.append(Lost(kind, message, core))
        opened, closed = chr(_OPEN + number % _MOST_STRINGS), chr(_CLOSE + number % _MOST_STRINGS)
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
    return _Marked(chat=replace(chat, messages=messages, tools=tools), strings=strings)


def _marked_call(call: dict, number: int, mark: Callable, mark_values: Callable) -> dict:
    function = dict(call["function"], name=mark(call["function"]["name"], "tool call", number))
    arguments = function["arguments"]
    if isinstance(arguments, str):  # in text form: marked inside, and written again
        function["arguments"] = json.dumps(mark_values(json.loads(arguments), number), ensure_ascii=False)
    else:
        function["arguments"] = mark_values(arguments, number)
    return call | {"function": function}


def _unmark(text: str) -> tuple[dict[int, list[tuple[int, int]]], str]:
    """Returns string number -> where it stands (whole, between its own marks), and the text without marks."""
    found: dict[int, list[tuple[int, int]]] = {}
    opened: dict[int, int] = {}
    parts, position, at = [], 0, 0
    for match in _MARKED.finditer(text):
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


def _contains(text: str, string: str) -> bool:
    """Whether a text contains a string, as it is or as JSON writes it."""
    return string in text or json.dumps(string, ensure_ascii=False)[1:-1] in text or json.dumps(string)[1:-1] in text


def _says_all(chat: Chat, text: str) -> bool:
    """Whether a text surely contains every string of a plain conversation: in order, and none by chance."""
    if chat.tools:
        return False
    position = 0
    for message in chat.messages:
        content = message.get("content")
        if not isinstance(content, str) or any(message.get(name) for name in ("tool_calls", *REASONING)):
            return False
        content = content.strip()
        if not content:
            continue
        if len(content) < _SHORT or "</think>" in content:
            return False
        position = text.find(content, position)
        if position < 0:
            return False
        position += len(content)
    return True


def describe_lost(chat: Chat, lost: Lost) -> str:
    """Says what was left out: `messages[2]: the chat template leaves out the tool call 'get_weather'`."""
    where = "" if lost.message is None else f"{chat.names[lost.message]}: "
    return f"{where}the chat template leaves out the {lost.kind} {shorten(lost.string, 40)}"
