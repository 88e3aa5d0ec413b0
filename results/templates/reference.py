"""What is right, by slow and literal means that share nothing with packtrain: no marks, no offsets of a tokenizer.

The text of a row is one of the renderings of its messages, in the first of the usual forms that its ids spell out byte by
byte. What is learnt in it comes from

    markers       the template's own `{% generation %}`, or those of TRL's training variant where it renders the same text
    prefixes      render(messages[:i], add_generation_prompt=True) and render(messages[:i + 1]), where both begin the text
    twins         else: a conversation that differs only in its strings, each of them unique. A turn begins behind what the
                  text before its first string has in common with the generation prompt, and ends with what the text behind
                  its last string has in common with the rendering that stops there
    containment   where even that is unclear: the learnt text holds the words of the turns, and none of another role

Four differences from a training variant's markers are meant, and applied to them by rule before anything is compared:

    prompt   what the generation prompt already contains is not learnt: a span begins behind what it has in common with the
             prompt, tags left whole (`<|start|>assistant`, `<think>\\n`)
    next     what the next message begins with is not learnt, even where a model stops at it (GLM's `<|user|>`)
    void     a turn of which the template renders no word is not learnt, its end included
    stop     what the template still renders when the conversation stops at the turn is learnt, if it is no more than the
             template's own markup (`<|tool_response>`, the newline behind `<|im_end|>`)
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from results.templates.conversations import TURN_KEYS

REASONING = ("reasoning_content", "reasoning", "thinking")
Spans = list[tuple[int, int]]


# ------------------------------------------------------------------------------------------------- text and tokens


def byte_of_gpt2() -> dict[str, int]:
    """GPT-2's table: the character that stands for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTES = byte_of_gpt2()


def spell(token: str, *, added: bool, sentencepiece: bool) -> bytes:
    """The bytes that a token stands for."""
    if added:
        return token.encode()
    if not sentencepiece:
        return bytes(_BYTES[character] for character in token)
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def align(tokenizer: PreTrainedTokenizerFast, ids: list[int], text: str) -> list[tuple[int, int]] | None:
    """The bytes of the text that each token stands for, found by walking along it; None where the ids spell another text."""
    decoder = tokenizer.added_tokens_decoder
    sentencepiece = tokenizer.backend_tokenizer.token_to_id("<0x00>") is not None
    whole, at, found = text.encode(), 0, []
    for number, token in enumerate(tokenizer.convert_ids_to_tokens(ids)):
        piece = spell(token, added=ids[number] in decoder, sentencepiece=sentencepiece)
        after_added = number == 0 or ids[number - 1] in decoder
        if sentencepiece and after_added and piece.startswith(b" ") and not whole.startswith(b" ", at):
            piece = piece[1:]  # the blank that is put before every text; alone it goes with what it is put before
        if not whole.startswith(piece, at):
            return None
        found.append((at, at + max(len(piece), 1)))
        at += len(piece)
        if ids[number] in decoder and decoder[ids[number]].rstrip:
            at = len(whole) - len(whole[at:].lstrip())
    return found if at == len(whole) else None


def tokens_in(spans: Spans, text: str, places: list[tuple[int, int]]) -> np.ndarray:
    """Which tokens have a byte in the spans, bool `[L]`; the first has no prediction."""
    character = [n for n, c in enumerate(text) for _ in c.encode()]
    inside = {n for start, end in spans for n in range(start, end)}
    mask = np.array([any(character[byte] in inside for byte in range(*place)) for place in places])
    mask[:1] = False
    return mask


# ------------------------------------------------------------------------------------------------- renderings


@dataclass
class Renderer:
    """A template with the special tokens of a tokenizer; `render` returns None where the template fails."""

    tokenizer: PreTrainedTokenizerFast
    template: str
    tools: list | None
    options: dict = field(default_factory=dict)

    def render(self, messages: list[dict], **options: object) -> str | None:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=self.tools, chat_template=self.template, tokenize=False, **self.options, **options
            )
        except Exception:
            return None

    def marked(self, messages: list[dict]) -> tuple[str, Spans] | None:
        """The text and what the template marks with `{% generation %}`."""
        try:
            (text,), (spans,) = render_jinja_template(
                [messages],
                tools=self.tools,
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map | self.options,
            )
        except Exception:
            return None
        return text, [tuple(span) for span in spans]


def forms(row: dict) -> Iterator[list[dict]]:
    """The messages as templates take them: arguments as an object or as text, a content that is missing, empty or null.

    Text of arguments is the row's, or the same object with its signs as they are.
    """
    for arguments, content in itertools.product(("object", "text", "plain text"), ("missing", "", None)):
        messages = []
        for given in row["messages"]:
            message = {key: value for key, value in given.items() if value is not None and key not in TURN_KEYS}
            thought = next((given[name] for name in REASONING if given.get(name)), None)
            message |= {} if thought is None else dict.fromkeys(REASONING, thought)
            if "content" not in message and content != "missing":
                message["content"] = content
            if "tool_calls" in message and arguments != "text":
                message["tool_calls"] = [_in_form(one, arguments) for one in message["tool_calls"]]
            messages.append(message)
        yield messages


def _in_form(one: dict, arguments: str) -> dict:
    given = json.loads(one["function"]["arguments"])
    given = given if arguments == "object" else json.dumps(given, ensure_ascii=False)
    return one | {"function": one["function"] | {"arguments": given}}


# ------------------------------------------------------------------------------------------------- words


def words_of(message: dict) -> list[tuple[str, str]]:
    """(kind, string) of all that a message says."""
    found = [("reasoning", message[name].strip()) for name in REASONING if message.get(name)]
    content = message.get("content") or ""
    if message["role"] == "assistant" and (
        inner := re.fullmatch(r"(?:\s*<think>)?(.*?)</think>(.*)", content, re.DOTALL)
    ):
        found += [(kind, s.strip()) for kind, s in (("reasoning", inner[1]), ("content", inner[2])) if s.strip()]
    elif content.strip():
        found.append(("content", content.strip()))
    for one in message.get("tool_calls") or []:
        arguments = one["function"]["arguments"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        found += [("tool call", one["function"]["name"])]
        found += [("tool call", string) for string in strings_in(arguments)]
    return found


def strings_in(value: object) -> list[str]:
    """Keys and texts of a JSON value, in order."""
    if isinstance(value, dict):
        return [string for name, inner in value.items() for string in (name, *strings_in(inner))]
    if isinstance(value, list):
        return [string for inner in value for string in strings_in(inner)]
    return [value] if isinstance(value, str) else []


def written(string: str) -> list[str]:
    """A string as templates write it: as it is, as JSON does, or as Python does (LFM2)."""
    json_forms = [json.dumps(string, ensure_ascii=ascii)[1:-1] for ascii in (False, True)]
    return list(dict.fromkeys([string, *json_forms, repr(string)[1:-1]]))


def missing_from(text: str, strings: list[str]) -> list[str]:
    """Strings that a text does not contain in this order and number, each written as it is or as JSON writes it.

    Where they aren't in order (a system prompt in the last question), each must at least be there as often as it is said.
    """
    at = 0
    for string in strings:
        places = [text.find(form, at) for form in written(string)]
        if max(places) < 0:
            break
        at = min(place for place in places if place >= 0) + len(string)
    else:
        return []
    counts = {string: strings.count(string) for string in strings}
    return [string for string, count in counts.items() if max(text.count(form) for form in written(string)) < count]


# ------------------------------------------------------------------------------------------------- what is learnt


@dataclass
class Expected:
    """What is to be learnt of a text.

    Attributes:
        spans: of the characters; None where only containment applies.
        by: `own markers`, `training markers`, `prefixes`, `twins` or `containment`.
        rules: of the meant differences, those that changed the spans.
    """

    spans: Spans | None
    by: str
    rules: tuple[str, ...] = ()


def expect(own: Renderer, training: Renderer | None, messages: list[dict], text: str) -> Expected:
    """Finds what is to be learnt, by the first reference that applies."""
    marked = own.marked(messages) if "generation" in own.template else None
    if marked is not None and marked[0] == text and marked[1]:
        return Expected(marked[1], "own markers")
    marked = training.marked(messages) if training else None
    turns = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    if marked is not None and marked[0] == text and marked[1]:
        spans, rules = [span for span in marked[1] if span[0] < span[1]], []
        for turn in turns:
            for name, rule in RULES.items():
                changed = rule(own, messages, turn, text, spans)
                if changed != spans:
                    rules.append(name)
                    spans = changed
        return Expected(spans, "training markers", tuple(dict.fromkeys(rules)))
    spans = []
    for turn in turns:
        before = own.render(messages[:turn], add_generation_prompt=True)
        until = text if turn == len(messages) - 1 else own.render(messages[: turn + 1])
        if before is None or until is None or not text.startswith(before) or not text.startswith(until):
            break
        spans.append((len(before), len(until)))
    else:
        return Expected(spans, "prefixes")
    spans = _by_twins(own, messages, text)
    return Expected(spans, "containment" if spans is None else "twins")


def _by_twins(own: Renderer, messages: list[dict], text: str) -> Spans | None:
    """Finds the turns of a conversation in that of its twin; None where the two texts differ in more than strings."""
    twin, words = _twin(messages)
    other, header = own.render(twin), _header(own)
    if other is None or not header:
        return None
    pieces = re.split(f"({'|'.join(words)})", other) if words else [other]
    if "".join(words.get(piece, piece) for piece in pieces) != text:
        return None
    moved, at = [], 0  # for every character of the twin's text, where it is in the text
    for piece in pieces:
        moved += [at] * len(piece) if piece in words else range(at, at + len(piece))
        at += len(words.get(piece, piece))
    moved.append(at)
    spans: Spans = []
    for turn, message in enumerate(twin):
        if message["role"] != "assistant":
            continue
        said = [word for word in words if word in json.dumps(message) and word in other]
        until = own.render(twin[: turn + 1])
        if not said or until is None or any(word not in until for word in said):
            return None
        first = min(other.find(word) for word in said)
        last = max(other.rfind(word) + len(word) for word in said)
        begins = other.rfind(re.match(r"<[^<>\s]*>|\S*\s?", header)[0], 0, first)
        if begins < 0 or any(word in other[begins:first] for word in words):
            return None
        start = begins + _shared(header, other[begins:first])
        tail = until[max(until.rfind(word) + len(word) for word in said) :]
        end = len(other) if turn == len(twin) - 1 else last + _shared(tail, other[last:])
        spans.append((moved[start], moved[end]))
    return spans


def _twin(messages: list[dict]) -> tuple[list[dict], dict[str, str]]:
    """The conversation with a word of its own for every string, and word -> string."""
    words: dict[str, str] = {}

    def replaced(string: str) -> str:
        core = string.strip()
        if not core:
            return string
        word = f"Twin{len(words):02d}word"
        words[word] = core
        return string.replace(core, word)

    twin = []
    for message in messages:
        done = dict(message)
        thought = next((replaced(message[name]) for name in REASONING if message.get(name)), None)
        done |= {name: thought for name in REASONING if message.get(name)}
        content = message.get("content") or ""
        inner = re.fullmatch(r"(\s*<think>|)(.*?)(</think>)(.*)", content, re.DOTALL)
        if inner and message["role"] == "assistant":
            done["content"] = inner[1] + replaced(inner[2]) + inner[3] + replaced(inner[4])
        elif content:
            done["content"] = replaced(content)
        if message.get("tool_calls"):
            done["tool_calls"] = [_twin_call(one, replaced) for one in message["tool_calls"]]
        twin.append(done)
    return twin, words


def _twin_call(one: dict, replaced: Callable[[str], str]) -> dict:
    arguments = one["function"]["arguments"]
    given = json.loads(arguments) if isinstance(arguments, str) else arguments
    given = {name: replaced(value) if isinstance(value, str) else value for name, value in given.items()}
    given = json.dumps(given) if isinstance(arguments, str) else given
    return one | {"function": one["function"] | {"arguments": given}}


def _header(own: Renderer) -> str:
    """What the generation prompt adds to a question; nothing where that can't be told."""
    question = [{"role": "user", "content": "Where?"}]
    asked, prompted = own.render(question), own.render(question, add_generation_prompt=True)
    if asked is None or prompted is None:
        return ""
    shared = _shared(asked, prompted)
    return prompted[shared:] if "Where?" in prompted[:shared] else ""


def _shared(one: str, other: str) -> int:
    """The length of the common beginning; where they part inside a tag, up to it."""
    length = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    for text in (one, other):
        for tag in re.finditer(r"<[^<>\s]*>", text):
            length = tag.start() if tag.start() < length < tag.end() else length
    return length


def merged(spans: Spans) -> Spans:
    """The spans without empty ones, adjoining ones joined."""
    found: Spans = []
    for start, end in sorted(span for span in spans if span[0] < span[1]):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def _without_prompt(own: Renderer, messages: list[dict], turn: int, text: str, spans: Spans) -> Spans:
    """Takes the prompt of a turn from the beginning of its span."""
    before = own.render(messages[:turn], add_generation_prompt=True)
    if before is not None and text.startswith(before):
        cut = len(before)
        return [(cut, end) if start < cut < end else (start, end) for start, end in spans]
    return [_behind(_header(own), text, span) for span in spans]


def _behind(header: str, text: str, span: tuple[int, int]) -> tuple[int, int]:
    """Lets a span begin behind what it, and the text before it, have in common with a header; tags left whole."""
    start, end = span
    for length in range(len(header), -1, -1):
        if text[:start].endswith(header[:length]) or not length:
            at = start
            while length < len(header) and at < end and text[at] == header[length]:
                at, length = at + 1, length + 1
            for tag in re.finditer(r"<[^<>\s]*>", text):
                at = tag.start() if tag.start() < at < tag.end() else at
            return max(at, start), end
    return span


def _with_stop(own: Renderer, messages: list[dict], turn: int, text: str, spans: Spans) -> Spans:
    """Extends a turn's span to what is still rendered when the conversation stops there, if that is markup only."""
    until = text if turn == len(messages) - 1 else own.render(messages[: turn + 1])
    before = own.render(messages[:turn], add_generation_prompt=True)
    if until is None or before is None or not text.startswith(until) or not text.startswith(before):
        return spans
    inside = [span for span in spans if len(before) <= span[0] and span[1] <= len(until)]
    if not inside or words_outside(own.template, text[inside[-1][1] : len(until)]):
        return spans
    return sorted([*spans, (inside[-1][1], len(until))]) if inside[-1][1] < len(until) else spans


def _without_next(own: Renderer, messages: list[dict], turn: int, text: str, spans: Spans) -> Spans:
    """Cuts a span at the end of what is rendered when the conversation stops at the turn, if the rest is markup only."""
    until = own.render(messages[: turn + 1])
    if until is None or not text.startswith(until):
        return spans
    cut = len(until)
    return [
        (start, cut) if start < cut < end and not words_outside(own.template, text[cut:end]) else (start, end)
        for start, end in spans
    ]


def _without_void(own: Renderer, messages: list[dict], turn: int, text: str, spans: Spans) -> Spans:
    """Takes away spans that say nothing, where the words of the turn are in no span."""
    if any(string in text[start:end] for _, string in words_of(messages[turn]) for start, end in spans):
        return spans
    return [(start, end) for start, end in spans if re.sub(r"<[^<>\s]*>|\s", "", text[start:end])]


RULES = {"void": _without_void, "prompt": _without_prompt, "next": _without_next, "stop": _with_stop}


def words_outside(template: str, text: str) -> list[str]:
    """Words of a text that are not the template's own."""
    return [word for word in re.findall(r"\w+", text) if word not in template]
