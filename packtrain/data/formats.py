"""Row formats: which columns they need, and what a row of each says.

    format             columns                        becomes
    input_ids          input_ids (+ labels)           Ids, used as they are
    messages           messages                       Chat
    prompt_completion  prompt, completion             Text; Chat where both are lists of messages
    sharegpt           conversations                  Chat
    alpaca             instruction, output (+ input)  Chat; Text where the tokenizer has no chat template
    question_answer    question, answer               the same
    text               text                           Text without a prompt
    preference         prompt, chosen, rejected       Pair of Texts; of Chats where all are lists of messages
    preference_implicit  chosen, rejected             the same; the prompt is what both begin with
    prompt_completions  prompt, completions           Answers, with the prompt each: Texts, or Chats
    tokens             tokens                         Words, which have a label each

Conversations also read `system`, `tools` (or `functions`) and `chat_template_kwargs`; Alpaca's also `history`. A format is
found by its columns, the first of this table that fits, or named by the user, among those of the kind that the objective
learns from (`KINDS`). Where it learns from answers, a conversation of `messages` or `sharegpt` is as many as the assistant
has turns (`messages.turns_of`). Parsers check types and raise `BadRow` with the reason; they know nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from packtrain.data.messages import (
    Chat,
    Message,
    kind_of,
    make_chat,
    make_message,
    read_json,
    read_messages,
    read_tools,
)
from packtrain.data.report import BadRow
from packtrain.data.samples import Answers, Ids, Pair, Text, Words
from packtrain.errors import DataError, shorten
from packtrain.recipe.fields import did_you_mean

IGNORED = -100  # the label of a token that is not supervised
MASKS = ("completion_mask", "assistant_masks")  # columns that say what is learnt: where all of them are not 0

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
WORDINGS: dict[str, Callable[[str], str]] = {  # format -> the prompt of a text, where there is no chat template
    "alpaca": lambda text: ALPACA_PROMPT.format(instruction=text),
    "question_answer": lambda text: QUESTION_PROMPT.format(question=text),
}


Row = dict[str, Any]
Sample = Text | Chat | Ids | Pair | Answers | Words
Kind = Literal["example", "pair", "answers", "words"]


class _Said(NamedTuple):
    """What rows of a kind are, and which objectives learn from them."""

    rows: str
    objectives: str


KINDS: dict[Kind, _Said] = {
    "example": _Said("single examples", "`causal_lm` and others"),
    "pair": _Said("pairs of answers", "`preference`, `reward`"),
    "answers": _Said("several answers to one prompt", "`several_answers`"),
    "words": _Said("words with labels", "`token_classification`"),
}


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How rows are read.

    Attributes:
        has_template: whether there is a chat template to render conversations with.
        roles: names of speakers -> one of `messages.ROLES`, beyond those that are known.
        columns: name of a column that a format reads -> the rows' own name of it; None to leave it out.
    """

    has_template: bool = True
    roles: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Format:
    """A row format: `parse(row, reading)` reads a row.

    Attributes:
        columns: what a row must have.
        optional: what is read where it is there.
        completion_only: whether only completions are learnt unless the user says otherwise; None where a row has no
            completion to single out.
        kinds: what a row is to an objective, one of these.
    """

    columns: tuple[str, ...]
    parse: Callable[[Row, Reading], Sample]
    completion_only: bool | None
    optional: tuple[str, ...] = ()
    kinds: tuple[Kind, ...] = ("example",)


def read_row(row: Row, format: str, reading: Reading) -> Sample:
    """Reads a row of a format; a conversation as a whole, whatever learns from it.

    Raises:
        BadRow: with the reason.
    """
    if reading.columns:
        mapped = set(reading.columns) | set(reading.columns.values())
        renamed = {ours: row[theirs] for ours, theirs in reading.columns.items() if theirs in row}
        row = {name: value for name, value in row.items() if name not in mapped} | renamed
    return FORMATS[format].parse(row, reading)


def rename_columns(columns: Sequence[str], mapping: Mapping[str, str | None]) -> list[str]:
    """Returns the columns as formats know them.

    Raises:
        DataError: the mapping names a column that no format reads, or one that the rows don't have.
    """
    known = dict.fromkeys(name for fmt in FORMATS.values() for name in (*fmt.columns, *fmt.optional))
    for ours, theirs in mapping.items():
        if ours not in known:
            near = did_you_mean(ours, known)
            fix = f"did you mean `{near}`?" if near else f"the columns that formats read are {', '.join(known)}"
            raise DataError(f"`{ours}` is not a column that a format reads", key="data.columns", value=ours, fix=fix)
        if theirs is not None and theirs not in columns:
            what = f"the rows have no column `{theirs}`"
            raise DataError(what, key="data.columns", value=theirs, fix=f"the columns are {', '.join(columns)}")
    mapped = set(mapping) | set(mapping.values())
    return [*(name for name in columns if name not in mapped), *(ours for ours, theirs in mapping.items() if theirs)]


def find_format(columns: Sequence[str], name: str = "auto", *, kind: Kind = "example") -> tuple[str, list[str]]:
    """Returns the format's name, and the other formats that the columns fit as well.

    Args:
        columns: columns of the rows.
        name: a key of `FORMATS`, or `auto`.
        kind: look among the formats of this kind, and not among the others.

    Raises:
        DataError: unknown name, missing columns, or columns that fit no format.
    """
    usable = {key: fmt for key, fmt in FORMATS.items() if kind in fmt.kinds}
    known = "; ".join(f"{key} ({', '.join(fmt.columns)})" for key, fmt in usable.items())
    if name != "auto" and name not in FORMATS:
        near = did_you_mean(name, FORMATS)
        fix = f"did you mean `{near}`?" if near else f"formats and the columns they need: {known}"
        raise DataError("is not a row format", key="data.format", value=name, fix=fix)
    if name != "auto" and name not in usable:
        rows, objectives = KINDS[FORMATS[name].kinds[0]]
        what = f"has rows that are {rows}, which the objective does not learn from"
        fix = f"choose an objective that learns from {rows} ({objectives}), or another format: {known}"
        raise DataError(what, key="data.format", value=name, fix=fix)
    fitting = [key for key, fmt in usable.items() if set(fmt.columns) <= set(columns)]
    if name != "auto":
        missing = [column for column in FORMATS[name].columns if column not in columns]
        if missing:
            what = f"the rows have no column {', '.join(map(repr, missing))}, which format `{name}` needs"
            fix = f"the columns are {', '.join(columns)}; the formats are {known}"
            raise DataError(what, key="data.format", value=name, fix=fix)
        return name, []
    if not fitting:
        mapping = ", ".join(f"{column}: theirs" for column in _MAPPED[kind])
        others = [key for key, fmt in FORMATS.items() if kind not in fmt.kinds and set(fmt.columns) <= set(columns)]
        if others:
            rows, objectives = KINDS[FORMATS[others[0]].kinds[0]]
            what = f"the rows (format `{others[0]}`) are {rows}, and the objective learns from {KINDS[kind].rows}"
            fix = f"choose an objective for {rows} ({objectives}), or map columns with `data.columns: {{{mapping}}}`"
            fix += f"; formats: {known}"
            raise DataError(what, key="objective.name", fix=fix)
        fix = f"map them with `data.columns: {{{mapping}}}`, or rename them; formats: {known}"
        raise DataError(f"no format fits the columns {', '.join(columns) or '(none)'}", key="data.format", fix=fix)
    return fitting[0], fitting[1:] if kind != "pair" else []  # a prompt that has a column is no part of the answers


def _parse_text(row: Row, reading: Reading) -> Text:
    return Text(completion=_text(row, "text"))


def _parse_prompt_completion(row: Row, reading: Reading) -> Text | Chat:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        before = read_messages(row, "prompt", reading.roles)
        return _chat(row, before + read_messages(row, "completion", reading.roles), prompt_messages=len(before))
    if isinstance(prompt, list) != isinstance(completion, list) and prompt is not None and completion is not None:
        raise BadRow("'prompt' and 'completion' must both be text or both be lists of messages")
    _refuse(row, OF_CONVERSATIONS, "prompt and completion are plain text")
    return Text(prompt="" if prompt == "" else _text(row, "prompt"), completion=_text(row, "completion"))


def _parse_preference(row: Row, reading: Reading) -> Pair:
    kinds = {name: isinstance(row.get(name), list) for name in ("prompt", "chosen", "rejected")}
    if len(set(kinds.values())) > 1 and all(row.get(name) is not None for name in kinds):
        lists = ", ".join(repr(name) for name, is_list in kinds.items() if is_list)
        raise BadRow(
            f"'prompt', 'chosen' and 'rejected' must all be text or all be lists of messages, and only {lists} "
            f"{'are' if sum(kinds.values()) > 1 else 'is'} (where the answers begin with the prompt, "
            "`data.format: preference_implicit` does without 'prompt')"
        )
    if not kinds["prompt"]:
        _refuse(row, OF_CONVERSATIONS, "prompt and answers are plain text")
        prompt = _text(row, "prompt")
        return _pair(*(Text(prompt=prompt, completion=_text(row, name)) for name in ("chosen", "rejected")))
    before = read_messages(row, "prompt", reading.roles)
    answers = [read_messages(row, name, reading.roles) for name in ("chosen", "rejected")]
    if _shared_messages(before, answers[0]) == len(before):
        raise BadRow(
            "'chosen' begins with the messages of 'prompt' again (`data.format: preference_implicit` does without 'prompt')"
        )
    return _pair(*(_chat(row, before + answer, prompt_messages=len(before)) for answer in answers))


def _parse_prompt_completions(row: Row, reading: Reading) -> Answers:
    completions = row.get("completions")
    if not isinstance(completions, list) or not completions:
        how = "missing" if "completions" not in row else "null" if completions is None else "empty"
        if completions is not None and completions != []:
            raise BadRow(f"'completions' is {kind_of(completions)}, not a list of answers: {shorten(completions, 40)}")
        raise BadRow(f"'completions' is {how}")
    named = {f"completions[{number}]": answer for number, answer in enumerate(completions)}
    is_list = isinstance(row.get("prompt"), list)
    for name, answer in named.items():
        if row.get("prompt") is not None and answer is not None and isinstance(answer, list) != is_list:
            raise BadRow(f"'prompt' and '{name}' must both be text or both be lists of messages")
    if not is_list:
        _refuse(row, OF_CONVERSATIONS, "prompt and completions are plain text")
        prompt = _text(row, "prompt")
        return Answers(answers=[Text(prompt=prompt, completion=_text(named, name)) for name in named])
    before = read_messages(row, "prompt", reading.roles)
    answers = [before + read_messages(named, name, reading.roles) for name in named]
    return Answers(answers=[_chat(row, answer, prompt_messages=len(before)) for answer in answers])


def _parse_implicit(row: Row, reading: Reading) -> Pair:
    """Reads a pair whose prompt is what both answers begin with, as TRL's `extract_prompt` does."""
    kinds = {isinstance(row.get(name), list) for name in ("chosen", "rejected")}
    if len(kinds) > 1 and None not in (row.get("chosen"), row.get("rejected")):
        raise BadRow("'chosen' and 'rejected' must both be text or both be lists of messages")
    missing = "so there is no prompt that both answer; set it apart in a column 'prompt'"
    if True not in kinds:
        _refuse(row, OF_CONVERSATIONS, "chosen and rejected are plain text")
        chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
        shared = next((n for n, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
        pair = _pair(Text(completion=chosen), Text(completion=rejected), implicit=True)
        if shared == 0:
            raise BadRow(f"'chosen' and 'rejected' begin differently, {missing}")
        if shared is None:
            shorter = "chosen" if len(chosen) < len(rejected) else "rejected"
            raise BadRow(f"'{shorter}' has no answer: it is the beginning of the other one")
        return pair
    answers = [read_messages(row, name, reading.roles) for name in ("chosen", "rejected")]
    shared = _shared_messages(*answers)
    if not shared:
        raise BadRow(f"'chosen' and 'rejected' begin with different messages, {missing}")
    pair = _pair(*(_chat(row, answer, prompt_messages=shared) for answer in answers))
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if len(answer) == shared:
            raise BadRow(f"'{name}' has no answer: all its messages are in the other one, too")
    return pair


def _shared_messages(one: Sequence[Message], other: Sequence[Message]) -> int:
    """Counts the messages that two conversations begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a.body != b.body), min(len(one), len(other)))


def _pair(chosen: Text | Chat, rejected: Text | Chat, *, implicit: bool = False) -> Pair:
    compared = [one.messages if isinstance(one, Chat) else one for one in (chosen, rejected)]
    if compared[0] == compared[1]:
        raise BadRow("'chosen' and 'rejected' are the same, so neither is preferred")
    return Pair(chosen=chosen, rejected=rejected, implicit=implicit)


def _parse_tokens(row: Row, reading: Reading) -> Words:
    words = row.get("tokens")
    if isinstance(words, str):
        words = words.split()
    elif words is not None and not isinstance(words, list):
        raise BadRow(f"'tokens' is {kind_of(words)}, not a list of words or text: {shorten(words, 40)}")
    if not words:
        how = "missing" if "tokens" not in row else "null" if row["tokens"] is None else "empty"
        raise BadRow(f"'tokens' is {how}")
    spans, start = [], 0
    for number, word in enumerate(words):
        if not isinstance(word, str):
            raise BadRow(f"tokens[{number}] is {kind_of(word)}, not text: {shorten(word, 40)}")
        if not word.strip() or word != word.strip():
            how = "begins or ends with white space" if word.strip() else "is empty"
            raise BadRow(f"tokens[{number}] {how}, and words are put together with a blank: {shorten(word, 40)}")
        spans.append((start, start + len(word)))
        start += len(word) + 1
    return Words(text=" ".join(words), spans=spans)


def _parse_messages(row: Row, reading: Reading) -> Chat:
    return _chat(row, read_messages(row, "messages", reading.roles))


def _parse_sharegpt(row: Row, reading: Reading) -> Chat:
    return _chat(row, read_messages(row, "conversations", reading.roles))


def _parse_alpaca(row: Row, reading: Reading) -> Text | Chat:
    instruction, output = _text(row, "instruction"), _text(row, "output")
    context = _text(row, "input") if row.get("input") not in (None, "") else ""
    if reading.has_template:
        return _one_turn(
            row, ("instruction", f"{instruction}\n\n{context}" if context else instruction), "output", output
        )
    _refuse(row, ("history", *OF_CONVERSATIONS), "the tokenizer has no chat template")
    template = ALPACA_PROMPT_WITH_INPUT if context else ALPACA_PROMPT
    return Text(prompt=template.format(instruction=instruction, input=context), completion=output)


def _parse_question_answer(row: Row, reading: Reading) -> Text | Chat:
    question, answer = _text(row, "question"), _text(row, "answer")
    if reading.has_template:
        return _one_turn(row, ("question", question), "answer", answer)
    _refuse(row, OF_CONVERSATIONS, "the tokenizer has no chat template")
    return Text(prompt=QUESTION_PROMPT.format(question=question), completion=" " + answer)


def _parse_input_ids(row: Row, reading: Reading) -> Ids:
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


# columns that they read where they are there
OF_CONVERSATIONS = ("system", "tools", "functions", "chat_template_kwargs")


def _conversations(column: str, parse: Callable[[Row, Reading], Sample]) -> Format:
    """Returns a format of whole conversations, which may also be learnt as one answer for each turn."""
    kinds: tuple[Kind, ...] = ("example", "answers")
    return Format(columns=(column,), parse=parse, completion_only=False, optional=OF_CONVERSATIONS, kinds=kinds)


FORMATS: dict[str, Format] = {
    "input_ids": Format(
        columns=("input_ids",),
        parse=_parse_input_ids,
        completion_only=None,
        optional=("labels", *MASKS, "attention_mask"),
    ),
    "messages": _conversations("messages", _parse_messages),
    "prompt_completion": Format(
        columns=("prompt", "completion"),
        parse=_parse_prompt_completion,
        completion_only=True,
        optional=OF_CONVERSATIONS,
    ),
    "sharegpt": _conversations("conversations", _parse_sharegpt),
    "alpaca": Format(
        columns=("instruction", "output"),
        parse=_parse_alpaca,
        completion_only=True,
        optional=("input", "history", *OF_CONVERSATIONS),
    ),
    "question_answer": Format(
        columns=("question", "answer"), parse=_parse_question_answer, completion_only=True, optional=OF_CONVERSATIONS
    ),
    "text": Format(columns=("text",), parse=_parse_text, completion_only=None),
    "preference": Format(
        columns=("prompt", "chosen", "rejected"),
        parse=_parse_preference,
        completion_only=True,
        optional=OF_CONVERSATIONS,
        kinds=("pair",),
    ),
    "preference_implicit": Format(
        columns=("chosen", "rejected"),
        parse=_parse_implicit,
        completion_only=True,
        optional=OF_CONVERSATIONS,
        kinds=("pair",),
    ),
    "prompt_completions": Format(
        columns=("prompt", "completions"),
        parse=_parse_prompt_completions,
        completion_only=True,
        optional=OF_CONVERSATIONS,
        kinds=("answers",),
    ),
    "tokens": Format(columns=("tokens",), parse=_parse_tokens, completion_only=None, kinds=("words",)),
}
# Columns by which an error shows how others are mapped to them.
_MAPPED: dict[Kind, tuple[str, ...]] = {
    "example": ("prompt", "completion"),
    "pair": ("prompt", "chosen", "rejected"),
    "answers": ("prompt", "completions"),
    "words": ("tokens",),
}


def _chat(row: Row, messages: list[Message], *, prompt_messages: int | None = None) -> Chat:
    """Makes the conversation of a row, with its `system`, `tools` and `chat_template_kwargs`."""
    system = row.get("system")
    if system not in (None, ""):
        if messages[0].body["role"] in ("system", "developer"):
            raise BadRow("has a column 'system' and a system message; keep one of them")
        messages = [make_message("system", _text(row, "system"), "system"), *messages]
        prompt_messages = None if prompt_messages is None else prompt_messages + 1
    kwargs = row.get("chat_template_kwargs")
    if isinstance(kwargs, str):
        kwargs = read_json(kwargs, "'chat_template_kwargs'") if kwargs.strip() else None
    if not isinstance(kwargs, dict | None):
        raise BadRow(f"'chat_template_kwargs' is {kind_of(kwargs)}, not an object: {shorten(kwargs, 40)}")
    kwargs = {key: value for key, value in (kwargs or {}).items() if value is not None}
    if taken := sorted(kwargs.keys() & _OF_THE_RENDERER):
        raise BadRow(f"'chat_template_kwargs' contains '{taken[0]}', which is not an argument of the template")
    tools = read_tools(row)
    return make_chat(messages, prompt_messages=prompt_messages, tools=tools, template_kwargs=kwargs)


_OF_THE_RENDERER = {
    "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message",
    "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs", "sanitize_control_tokens",
}  # fmt: skip


def _one_turn(row: Row, user: tuple[str, str], column: str, answer: str) -> Chat:
    """Makes a conversation of `history`, a question, and its answer; the columns name them in messages."""
    messages, history = [], row.get("history") or []
    if not isinstance(history, list):
        raise BadRow(f"'history' is {kind_of(history)}, not a list of pairs: {shorten(history, 40)}")
    for number, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise BadRow(f"history[{number}] is not a pair of texts: {shorten(pair, 40)}")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append(make_message(role, text, f"history[{number}]"))
    return _chat(row, [*messages, make_message("user", user[1], user[0]), make_message("assistant", answer, column)])


def _refuse(row: Row, columns: Sequence[str], why: str) -> None:
    """Refuses a row with a value in one of these columns: it could not be trained on."""
    for column in columns:
        if row.get(column) not in (None, "", [], {}):
            raise BadRow(
                f"'{column}' needs a conversation, and {why} (`data.columns: {{{column}: null}}` leaves it out)"
            )


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if value is None:
        raise BadRow(f"'{column}' is missing" if column not in row else f"'{column}' is null")
    if not isinstance(value, str):
        raise BadRow(f"'{column}' is {kind_of(value)}, not text: {shorten(value, 40)}")
    if not value.strip():
        raise BadRow(f"'{column}' is empty")
    return value


def _integers(row: Row, column: str, length: int | None = None) -> np.ndarray:
    """Returns a row's list as int64 `[L]`."""
    value = row.get(column)
    if value is None:
        raise BadRow(f"'{column}' is missing" if column not in row else f"'{column}' is null")
    if not isinstance(value, list):
        raise BadRow(f"'{column}' is {kind_of(value)}, not a list of integers: {shorten(value, 40)}")
    if odd := set(map(type, value)) - ({int, bool} if column in (*MASKS, "attention_mask") else {int}):
        example = next(item for item in value if type(item) in odd)
        raise BadRow(f"'{column}' contains {shorten(example, 40)}, which is not an integer")
    if length is not None and len(value) != length:
        raise BadRow(f"'{column}' has {len(value)} entries for {length} input_ids")
    try:
        return np.array(value, dtype=np.int64)
    except OverflowError:
        raise BadRow(f"'{column}' contains an integer that does not fit into 64 bits") from None
