"""Prompts as a model was trained on them: the user's turns of a conversation, or plain text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from packtrain.data.encoder import added_in_front
from packtrain.data.formats import OF_CONVERSATIONS, WORDINGS
from packtrain.data.messages import read_messages
from packtrain.data.report import BadRow
from packtrain.errors import DataError
from packtrain.generation.trained import is_chat

Messages = list[dict[str, Any]]
# columns of a row that hold what is asked, the first of them that it has
_COLUMNS = ("prompt", "messages", "question", "instruction")
_OTHER_FORMATS = (".json", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".bz2", ".xz", ".zst", ".zip")  # of data files


def read_prompts(path: str | Path, roles: Mapping[str, str] | None = None) -> list[str | Messages]:
    """Reads prompts: a line each of a text file, or of a `.jsonl` file a row with `prompt` or `messages`, or a row of data
    with `question` or `instruction`.

    Lines end with a newline and with nothing else: a prompt may hold form feeds and Unicode's line separators. The last
    turn of the assistant at the end of `messages` is what the model is asked for, and is left out. A `prompt` may be a list
    of messages. Messages are read as rows of data are, with their names of speakers.

    Args:
        roles: further names of speakers, see `data.roles`.

    Raises:
        DataError: the file can't be read, is empty or of another format, or a row has no prompt, messages that are none, or
            a column that a prompt would be asked without.
    """
    suffix = Path(path).suffix.lower()
    if suffix in _OTHER_FORMATS:
        fix = "write a .jsonl file with a `prompt` per row, or a text file with a prompt per line"
        raise DataError("is no file of prompts", key="--prompts", value=str(path), fix=fix)
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"can't be read: {error}", key="--prompts", value=str(path), fix="name a UTF-8 file") from None
    if suffix != ".jsonl":
        found: list[str | Messages] = [line for line in lines if line.strip()]
    else:
        found = [
            _prompt(line, f"{path}, line {number}", roles or {}) for number, line in enumerate(lines, 1) if line.strip()
        ]
    if not found:
        raise DataError("holds no prompts", key="--prompts", value=str(path), fix="write one prompt per line")
    return found


def _prompt(line: str, where: str, roles: Mapping[str, str]) -> str | Messages:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"is not JSON: {error}", where=where, fix="write one JSON object per line") from None
    column = next((name for name in _COLUMNS if isinstance(row, dict) and name in row), "messages")
    prompt = row.get(column) if isinstance(row, dict) else None
    kinds = str if column in ("question", "instruction") else str | list
    if isinstance(prompt, list) and prompt and kinds is not str:
        try:
            prompt = [message.body for message in read_messages(row, column, roles)]
        except BadRow as bad:
            raise DataError(str(bad), where=where, fix="write messages as rows of data have them") from None
        prompt = prompt[:-1] if prompt[-1]["role"] == "assistant" else prompt
    if not prompt or not isinstance(prompt, kinds):
        fix = 'write for example {"prompt": "What is 2+2?"}'
        what = "has no `prompt` (text or messages), `messages`, `question` or `instruction`"
        raise DataError(what, where=where, fix=fix)
    beside = ("input", "history") if column == "instruction" else ()  # of alpaca
    if given := [name for name in (*OF_CONVERSATIONS, *beside) if row.get(name) not in (None, "", [], {})]:
        fix = "write a system message as the first of `messages`, and leave other columns out"
        raise DataError(f"has a column `{given[0]}`, and would be asked without it", where=where, fix=fix)
    try:
        json.dumps(prompt, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        what, fix = "contains a lone surrogate, which is not a valid character", "correct the row"
        raise DataError(what, where=where, fix=fix) from None
    return prompt


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str | Messages], rows: Sequence[str]
) -> list[list[int]]:
    """Turns prompts into token ids, as the rows were that the model was trained on.

    Text becomes the user's turn of a conversation with the generation prompt behind it. Where the model was trained on plain
    text it stays plain, in the wording of their format, with what the tokenizer puts in front and nothing behind.

    Args:
        rows: how they were written out, see `DataReport.prompts`.

    Raises:
        DataError: messages for a tokenizer without a chat template.
    """
    chat, encoded = is_chat(tokenizer, rows), []
    prefix, wording = added_in_front(tokenizer), wording_of(rows)
    for prompt in prompts:
        if isinstance(prompt, str) and not chat:
            ids: Any = tokenizer(wording(prompt), add_special_tokens=False)["input_ids"]
            encoded.append(ids if ids[: len(prefix)] == prefix else prefix + ids)
            continue
        if not tokenizer.chat_template:
            fix = "give the prompts as text"
            raise DataError("the tokenizer has no chat template to render messages with", key="--prompts", fix=fix)
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            rendered: Any = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
        except Exception as error:  # whatever a template may raise for turns that it does not know
            what, fix = f"the chat template refuses it: {error}", "write its turns as those of the training data"
            raise DataError(what, key=f"prompt {len(encoded) + 1}", fix=fix) from None
        encoded.append(rendered["input_ids"])
    return encoded


def wording_of(rows: Sequence[str]) -> Callable[[str], str]:
    """Returns what makes a text the prompt of such rows, where they were not conversations."""
    return WORDINGS.get(rows[0], str) if len(rows) == 1 else str


def how_asked(tokenizer: PreTrainedTokenizerBase, rows: Sequence[str]) -> str:
    """Says in a line as what the model is given a prompt, and why.

    Args:
        rows: as `encode_prompts`.
    """
    chat = is_chat(tokenizer, rows)
    plain = f"text in the wording of `{rows[0]}`" if wording_of(rows) is not str else "plain text"
    asked = "a prompt is a user's turn of a conversation" if chat else f"a prompt is {plain}"
    if not rows:
        has = "has a chat template" if chat else "has no chat template"
        return f"{asked}: nothing says what rows the model was trained on, and its tokenizer {has}"
    if rows == ("input_ids",):
        return f"{asked}: the rows that the model was trained on were token ids"
    if chat and len(rows) > 1:
        return f"{asked}: the model was trained on conversations, and on plain text as well"
    return f"{asked}, as in the rows that the model was trained on"
