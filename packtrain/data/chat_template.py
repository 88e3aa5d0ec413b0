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
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from packtrain.data.marks import MARKED, MOST_STRINGS, Lost, Marked, contains, mark_strings, unmark
from packtrain.data.messages import REASONING, Chat
from packtrain.data.offsets import Span
from packtrain.data.report import BadRow
from packtrain.data.tool_calls import FORMS, PROBE, PROBE_TOOL, QUESTION, as_objects
from packtrain.errors import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_BEGIN, _END = "\ufdd0", "\ufdd1"  # for the markers of a template; Unicode keeps them for inner use
_PRINT_MARKERS = (  # a call block cuts blanks and keeps variables as the markers do; the newline behind it is cut
    "{% macro packtrain_generation() %}" + _BEGIN + "{{ caller() }}" + _END + "{% endmacro %}\n"
)
_SHORT = 8  # characters; a shorter string may stand in a text by chance
_REMEMBERED = 4096  # turns' ends


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A conversation as text.

    Attributes:
        chat: the conversation in the form that the template takes (see `FORMS`).
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
        return any(_GENERATION.search(_COMMENT.sub("", text)) for text in templates)

    def render(self, chat: Chat, turns: Iterable[int] = ()) -> Rendered:
        """Renders a conversation and locates messages.

        Args:
            turns: numbers of the messages to be located.

        Raises:
            BadRow: the template fails, or a message cannot be located.
        """
        chat, text = self._text(chat)
        turns = list(turns)
        if not turns and _says_all(chat, text, self.tokenizer.get_chat_template(None, chat.tools)):
            return Rendered(chat=chat, text=text, turns={})
        marked = mark_strings(chat)
        places = self._places(marked, text)
        if places is None:  # the marks changed what the template does
            lost = [s for s in marked.strings if not contains(text, s.string)]
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

        The markers are made to print where they stand. transformers counts what was printed before them instead, which is
        somewhere else inside a macro or a `{% set %}`.

        Raises:
            BadRow: it cannot be said, as the template changes what stands between the markers afterwards.
        """
        chat = rendered.chat
        template = self.tokenizer.get_chat_template(None, chat.tools)
        marked = self._apply(chat, chat_template=_PRINT_MARKERS + _GENERATION.sub(_as_call, template))
        pieces = re.split(f"([{_BEGIN}{_END}])", marked)  # text, marker, text, marker, ..., text
        texts, markers = pieces[::2], "".join(pieces[1::2])
        if "".join(texts) != rendered.text or markers != (_BEGIN + _END) * (len(markers) // 2):
            turn = next((n for n, message in enumerate(chat.messages) if message["role"] == "assistant"), 0)
            raise BadRow(
                f"{_name(chat, turn)} cannot be located in what the chat template "
                "renders: it changes what it marks with {% generation %} afterwards"
            )
        bounds = list(accumulate(map(len, texts)))
        return [(start, end, 1.0) for start, end in zip(bounds[::2], bounds[1::2], strict=False)]

    # ------------------------------------------------------------------------------------------- rendering

    def _text(self, chat: Chat) -> tuple[Chat, str]:
        """Returns the conversation in the form that the template takes, and its text."""
        failure = None
        for form in (self._form, *FORMS) if any(message.get("tool_calls") for message in chat.messages) else FORMS[:1]:
            try:
                given = chat
                if form is not as_objects:
                    given = replace(chat, messages=[form(message) for message in chat.messages])
                return given, self._apply(given)
            except BadRow as error:
                failure = failure or error
        fix = "rewrite the row as the template wants it, or name another template in `model.chat_template`"
        raise BadRow(f"{self._where_it_fails(chat)}{failure} ({fix})")

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
        for form in FORMS:
            messages = [form(message) for message in PROBE]
            try:
                text = self._apply(Chat(messages=messages, prompt_messages=3, tools=[PROBE_TOOL]))
            except BadRow:
                continue
            behind = text.partition(QUESTION)[2]
            if "probed_place" in behind and not re.search(r"""\\"probed_|'probed_|None""", behind):
                return form
        return FORMS[0]

    def _apply(self, chat: Chat, **options: Any) -> str:
        messages = [_with_reasoning(message) for message in chat.messages]
        try:
            options |= {"tools": chat.tools, "tokenize": False}
            text: Any = self.tokenizer.apply_chat_template(messages, **chat.template_kwargs, **options)
            return text
        except Exception as error:  # a template is foreign code: whatever it raises is about this row
            raise BadRow(f"the chat template failed: {type(error).__name__}: {error}") from None

    # ------------------------------------------------------------------------------------------- turns

    def _places(self, marked: Marked, text: str) -> dict[int, list[tuple[int, int]]] | None:
        """Returns string number -> where it stands in the text; None where the marks change the text."""
        if MARKED.search(text) or len(marked.strings) > MOST_STRINGS:
            return None
        try:
            found, bare = unmark(self._apply(marked.chat))
        except BadRow:
            return None
        return found if bare == text else None

    def _extent(self, marked: Marked, places: dict, text: str, turn: int) -> tuple[int, int] | None:
        """Returns the characters of a turn: its words, extended to what is generated; None where no word is rendered."""
        own = [places[number][0] for number in marked.of_message(turn) if number in places]
        if not own:
            return None
        first, last = min(own)[0], max(end for _, end in own)
        self._refuse_others_inside(marked, places, turn, first, last)
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
            return start, right
        end = last + self._remember(
            ("end", text[last:right], _key(marked.chat, turn)), lambda: self._ended(marked, turn, text[last:right])
        )
        return start, end

    def _refuse_others_inside(self, marked: Marked, places: dict, turn: int, first: int, last: int) -> None:
        """Refuses a turn with the words of another message between its own (Gemma 4 moves what a tool answers)."""
        for number, found in places.items():
            other = marked.strings[number].message
            if other not in (turn, None) and any(first <= start < last for start, _ in found):
                raise BadRow(
                    f"{_name(marked.chat, turn)}: the chat template renders {_name(marked.chat, other)} between what this "
                    "turn says, so it cannot be learnt as one; leave out its words or its tool calls"
                )

    def _behind_header(self, between: str) -> int:
        """Returns how much of the text before a turn's words the generation prompt accounts for, by itself."""
        pieces = list(self._pieces(self._header))
        for count in range(len(pieces), 0, -1):
            begin = "".join(pieces[:count])
            if begin.strip() and begin in between:
                at = between.rfind(begin)
                return at + self._common(self._header, between[at:])
        return 0

    def _prompted(self, marked: Marked, turn: int, between: str) -> int:
        """Returns how much of the text before a turn's words is the prompt, as the model is prompted for this turn."""
        header = self._behind_header(between)
        if turn == 0:
            return header or len(between)
        try:
            before = replace(marked.chat, messages=marked.chat.messages[:turn])
            found, bare = unmark(self._apply(before, add_generation_prompt=True))
        except BadRow:
            return header or len(between)
        last = max((end for places in found.values() for _, end in places), default=0)
        return max(header, self._common(bare[last:], between))

    def _ended(self, marked: Marked, turn: int, behind: str) -> int:
        """Returns how much of the text behind a turn's words is still this turn's.

        Where a conversation may stop with another token than the one that ends a turn inside it (gpt-oss), the latter is
        what stands before the next generation prompt.
        """
        upto = replace(marked.chat, messages=marked.chat.messages[: turn + 1])
        lengths = [0]
        for options in ({}, {"add_generation_prompt": True}):
            try:
                found, bare = unmark(self._apply(upto, **options))
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
        question = Chat(messages=[{"role": "user", "content": QUESTION}], prompt_messages=1)
        try:
            without, prompted = self._apply(question), self._apply(question, add_generation_prompt=True)
        except BadRow:
            return ""
        shared = self._common(without, prompted)  # not all, where an eos ends what stops without the prompt (Phi-3)
        return prompted[shared:] if QUESTION in prompted[:shared] else ""

    def _by_prefixes(self, chat: Chat, text: str, turn: int) -> tuple[int, int]:
        """Locates a turn where marks change what the template does: by what it renders without and with the turn."""
        messages = chat.messages
        assistant = messages[turn]["role"] == "assistant"
        before = ""
        try:
            if turn:
                before = self._apply(replace(chat, messages=messages[:turn]), add_generation_prompt=assistant)
            until = self._apply(replace(chat, messages=messages[: turn + 1]))
        except BadRow:
            until = ""
        end = len(text) if turn == len(messages) - 1 else self._common(until, text)
        words = str(messages[turn].get("content") or "").strip()
        if not until or not text.startswith(before) or not contains(text[len(before) : end], words):
            raise BadRow(
                f"{_name(chat, turn)} cannot be located in what the chat template "
                "renders: it renders the messages before it otherwise when this one follows; name another template in "
                "`model.chat_template`, one with {% generation %} markers"
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


def _as_call(marker: re.Match[str]) -> str:
    """Writes a `{% generation %}` or `{% endgeneration %}` as a call of `_PRINT_MARKERS`."""
    opened, end, closed = marker.groups()
    return opened + ("endcall" if end else "call packtrain_generation()") + closed


def _name(chat: Chat, message: int) -> str:
    return chat.names[message] if chat.names else f"message {message}"


def _key(chat: Chat, turn: int) -> tuple:
    """Returns what the template's text around a message may depend on, but for the strings."""
    message = chat.messages[turn]
    kwargs = json.dumps(chat.template_kwargs, sort_keys=True, default=str)
    return kwargs, bool(chat.tools), message["role"], bool(message.get("tool_calls")), "content" in message


def _common_prefix(one: str, other: str) -> str:
    length = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]


def _with_reasoning(message: dict) -> dict:
    """Gives a message's reasoning under every name by which templates read it."""
    given = next((message[name] for name in REASONING if message.get(name)), None)
    return message if given is None else message | dict.fromkeys(REASONING, given)


def _says_all(chat: Chat, text: str, template: str) -> bool:
    """Whether a text surely contains every string of a plain conversation: in order, and none by chance.

    By chance it might be in the template's own words, a default system prompt for example.
    """
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
        if len(content) < _SHORT or "</think>" in content or content.partition("\n")[0] in template:
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
