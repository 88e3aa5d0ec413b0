"""One batch of rows in, one Arrow table of tokens and masks out.

What a chat template renders is the template's own affair, its BOS and its end of turn included. Plain text gets
the tokenizer's BOS (if it puts one) in front and one eos behind, neither ever twice:

    prompt_completion   <s> What is 2+2? | It is 4. </s>
    learnt               0   0   0  0  0   1  1  1   1       completion_only
    learnt               0   1   1  1  1   1  1  1   1       otherwise; the first token has no prediction

Where a prompt ends. The whole is tokenised at once, the prompt alone as well (for chats: rendered with the
generation prompt), and then

1. the prompt's ids are a prefix of the whole's: the completion starts after them (nearly always so);
2. the prompt's text is a prefix of the whole's, but tokens merge over the boundary: prompt and rest are
   tokenised apart, so that training sees the prompt as inference will (counted as "merged");
3. the template renders the prompt otherwise when an answer follows (some drop a thinking header, some show the system
   prompt only in the last question): the completion starts where its turn does (counted as "unlike").

Answers to one prompt, two of a pair or several, become documents end to end, prompt and chosen, prompt and rejected, so that
everything about them can be read off the mask: where one begins to be learnt its prompt ends, and where that ends the
document does.

    preference           <s> What? | Four. </s> <s> What? | Five. </s>
    learnt                0   0       1    1     0   0       1    1

So do the turns of a conversation of which every one is an answer, each with all that was said before it.

Assistant turns and turns with a switch are located in the text (see `packtrain.data.chat_template`), and a token is learnt
if any of its characters is. The mask goes by position, never by token id, so a pad token that is also the eos hides
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from packtrain.data.chat_template import ChatTemplate, Rendered, describe_lost
from packtrain.data.drafts import Draft, check, join_parts
from packtrain.data.formats import FORMATS, IGNORED, WORDINGS, Kind, Reading, Row, read_row
from packtrain.data.limits import Endless, Limits
from packtrain.data.messages import SWITCHES, Chat, turns_of
from packtrain.data.offsets import OffsetTokenizer, Span, factors_of, intersect, outside
from packtrain.data.report import BadRow
from packtrain.data.room import check_room
from packtrain.data.samples import Answers, Ids, Pair, Text, Words
from packtrain.errors import DataError, shorten

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase


_AT_ONCE = 1 << 24  # characters that are tokenised in one call
_BYTES_PER_CHARACTER = 200  # that a fast tokenizer takes meanwhile
MERGED, UNLIKE, NO_EOS, RENDERED = 1, 2, 4, 8  # flags of a row, in the column `flags`
_PLURALS = {
    "content": "what messages say",
    "reasoning": "the reasoning of turns that are learnt",
    "tool call": "tool calls",
    "tools": "tools",
    "tool answer": "answers of tools",
}
_CONVERSATIONS = ("messages", "sharegpt", "prompt_completion")  # formats whose messages may have switches


class Encoder:
    """Turns rows into examples with one tokenizer under one set of options; can be pickled.

    Args:
        tokenizer: a transformers tokenizer.
        format: a key of `FORMATS`.
        completion_only: learn from completions only; None is the format's own default.
        assistant_only: learn from assistant turns only; of completions, where both are set.
        on_lost_content: what becomes of a conversation of which the chat template leaves something out: "error" or "warn".
        reading: how rows are read.
        kind: what a row is, one of the format's kinds; None is its first.

    Raises:
        DataError: the options don't go with the format or the tokenizer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        format: str,
        *,
        completion_only: bool | None = None,
        assistant_only: bool = False,
        on_lost_content: str = "error",
        reading: Reading | None = None,
        kind: Kind | None = None,
    ):
        self.tokenizer, self.format, self.kind = tokenizer, format, kind or FORMATS[format].kinds[0]
        self.reading = reading or Reading(has_template=bool(tokenizer.chat_template))
        self.template, self.offsets = ChatTemplate(tokenizer), OffsetTokenizer(tokenizer)
        self.assistant_only, self.on_lost_content = assistant_only, on_lost_content
        self.completion_only = bool(FORMATS[format].completion_only if completion_only is None else completion_only)
        self._check_options()
        self.prefix = added_in_front(tokenizer)
        # what ends plain text: an encoder's tokenizer (BERT's) has a separator there
        self.end = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        self.vocabulary = 1 + max(tokenizer.get_vocab().values(), default=-1) if format == "input_ids" else None

    @property
    def learns_all_turns(self) -> bool:
        """Whether turns of all roles are learnt where the rows don't say otherwise."""
        return not (self.completion_only or self.assistant_only)

    @property
    def all_learnt(self) -> bool:
        """Whether every label but the first of each example is its token, whatever the rows say."""
        formats = ("input_ids", "tokens", *_CONVERSATIONS)
        return not (self.completion_only or self.assistant_only or self.format in formats)

    def __call__(self, rows: Sequence[Row | BadRow], where: Callable[[int], str] = "row {}".format) -> pa.Table:
        """Tokenises a batch: a table with one row for each row.

        Columns: `input_ids` list<int32>; `labels` list<int32> or `learnt` list<uint8> (neither where all is
        learnt); `factors` list<float32>, see `_runs`; `supervised` int32; `blanks` int32, tokens of nothing but white space
        behind an eos at the end (of ChatML, a newline); `flags` uint8; `remarks` string, lines for the report, or null;
        `problem` string, null for good rows; bad rows are empty.

        Args:
            where: names a row of the batch.

        Raises:
            DataError: the chat template goes on without end, or a tokenizer cannot do what the options ask for.
        """
        with Limits() as limits:
            drafts = [self._draft(row, limits, partial(where, number)) for number, row in enumerate(rows)]
        single = [part for draft in drafts for part in draft.parts.values() or (draft,)]
        for some in _by_size([draft for draft in single if draft.text is not None]):
            self._tokenise(some)
        for draft in drafts:
            if draft.parts:
                join_parts(draft)
        return self._table(drafts)

    def _check_options(self) -> None:
        if self.completion_only and FORMATS[self.format].completion_only is None:
            what = f"needs rows with completions, and rows of format `{self.format}` have none"
            raise DataError(what, key="data.completion_only_loss", value=True, fix="leave it out")
        if self.kind in ("pair", "answers") and (self.assistant_only or not self.completion_only):
            key, fix = "assistant_only_loss" if self.assistant_only else "completion_only_loss", "leave it out"
            what = f"has no effect on rows of format `{self.format}`, of which whole answers are learnt from"
            raise DataError(what, key=f"data.{key}", value=self.assistant_only, fix=fix)
        if self.assistant_only and self.format in ("input_ids", "text", "tokens"):
            what = f"needs conversations, and rows of format `{self.format}` are not conversations"
            raise DataError(what, key="data.assistant_only_loss", value=True, fix="leave it out")
        if not self.reading.has_template and (self.assistant_only or self.format in ("messages", "sharegpt")):
            what = "the tokenizer has no chat template to render conversations with"
            fix = "use the tokenizer of a chat model, or name a template file in `model.chat_template`"
            raise DataError(what, key="model.chat_template", fix=fix)

    def _draft(self, row: Row | BadRow, limits: Limits, where: Callable[[], str]) -> Draft:
        try:
            if isinstance(row, BadRow):
                raise row
            match read_row(row, self.format, self.reading):
                case Text() as sample:
                    draft = self._draft_text(sample)
                case Chat() as sample if self.kind == "answers":
                    turns = turns_of(sample)
                    left_out = len([*turns.values()][-1].messages) < len(sample.messages)
                    remarks = ["the messages behind the last answer are left out"] if left_out else []
                    draft = Draft(parts=limits.call(self._draft_answers, turns), turns=True, remarks=remarks)
                case Chat() as sample:
                    draft = limits.call(self._draft_chat, sample)
                case Ids() as sample:
                    draft = self._draft_ids(sample)
                case Pair() as sample:
                    answers = {"chosen": sample.chosen, "rejected": sample.rejected}
                    parts = limits.call(self._draft_answers, answers)
                    draft = Draft(parts=parts, implicit=sample.implicit, distinct=True)
                case Answers() as sample:
                    named = {f"completions[{number}]": one for number, one in enumerate(sample.answers)}
                    draft = Draft(parts=limits.call(self._draft_answers, named))
                case Words() as sample:
                    self._check_end()
                    draft = Draft(text=sample.text, words=sample.spans, plain=True)
            for part in draft.parts.values() or (draft,):
                if part.text is not None:
                    part.text.encode("utf-8")
                    check_room(len(part.text) * _BYTES_PER_CHARACTER, f"tokenising its {len(part.text):,} characters")
            return draft
        except BadRow as bad:
            return Draft(problem=str(bad))
        except Endless as over:
            template = shorten(str(self.tokenizer.chat_template), 60)
            fix = "correct its loops, or name another template in `model.chat_template`"
            what = f"the chat template takes {over} for one row, and is not done"
            raise DataError(what, where=where(), key="model.chat_template", value=template, fix=fix) from None
        except UnicodeEncodeError:
            return Draft(problem="the text contains a lone surrogate, which is not a valid character")

    def _draft_text(self, sample: Text) -> Draft:
        if self.assistant_only:
            raise BadRow("the row is plain text, and `data.assistant_only_loss` needs a conversation")
        self._check_end()
        prompt = sample.prompt if self.completion_only else None
        return Draft(text=sample.prompt + sample.completion, prompt=prompt, plain=True)

    def _check_end(self) -> None:
        if self.end is None:
            fix = "set the tokenizer's eos_token: without one the model never learns to stop"
            raise DataError("the tokenizer has no eos_token to end plain text with", key="model", fix=fix)

    def _draft_chat(self, chat: Chat) -> Draft:
        if not self.reading.has_template:
            raise BadRow("the row is a conversation, and the tokenizer has no chat template")
        roles = [message["role"] for message in chat.messages]
        if self.completion_only:
            if roles[-1] != "assistant":
                raise BadRow(f"the last message has the role {roles[-1]!r}, and a completion must be the assistant's")
            if chat.prompt_messages == 0:
                raise BadRow("the completion has no prompt before it")
        asked = set(chat.switches)
        if self.assistant_only and not self.template.has_markers:
            asked |= {n for n, role in enumerate(roles) if role == "assistant"}
        rendered = self.template.render(chat, sorted(asked))
        draft = Draft(text=rendered.text, remarks=self._remarks(chat, rendered), flags=RENDERED)
        if self.completion_only:
            completion = range(chat.prompt_messages, len(roles))
            if rendered.lost and not self.template.render(chat, completion).turns:
                raise BadRow(f"the chat template renders nothing of {chat.names[chat.prompt_messages]}")
            draft.prompt = self.template.prompt(rendered)
            if not draft.text.startswith(draft.prompt):
                draft.flags |= UNLIKE
                first = self.template.render(chat, [chat.prompt_messages]).turns.get(chat.prompt_messages)
                if first is None:
                    raise BadRow(f"the chat template renders nothing of {chat.names[chat.prompt_messages]}")
                draft.prompt, draft.spans = None, [(first[0], len(draft.text), 1.0)]
        if self.assistant_only or any(factor != 1 for factor in chat.switches.values()):
            draft.spans = self._spans(chat, rendered, draft)
            draft.prompt = None
        return draft

    def _spans(self, chat: Chat, rendered: Rendered, draft: Draft) -> list[Span]:
        """Returns what is learnt of a conversation's text: as the options say, and then as the switches of its turns do."""
        everything = [(0, len(rendered.text), 1.0)]
        bounds = draft.spans or ([(len(draft.prompt), len(rendered.text), 1.0)] if draft.prompt else everything)
        spans, turns = bounds, rendered.turns
        if self.assistant_only:
            roles = {n: chat.messages[n]["role"] for n in rendered.turns}
            own = {n for n, role in roles.items() if role == "assistant" and not self.template.has_markers}
            switched_on = {
                n for n, factor in chat.switches.items() if factor and roles.get(n, "assistant") != "assistant"
            }
            located = [(*rendered.turns[n], 1.0) for n in sorted(own | switched_on)]
            marked = self.template.generated(rendered) if self.template.has_markers else []
            spans = intersect(bounds, sorted(marked + located))
            turns = {n: _widened(turn, marked) for n, turn in turns.items()}
        for message, factor in chat.switches.items():
            if factor != 1 and message in turns:
                turn = (*turns[message], factor)
                rest = intersect(spans, outside([turn], len(rendered.text)))
                spans = sorted(rest + (intersect(spans, [turn]) if factor else []))
        return spans

    def _remarks(self, chat: Chat, rendered: Rendered) -> list[str]:
        """Returns what is to be said of a conversation.

        Raises:
            BadRow: the chat template leaves out what is to be learnt or answered, and that is an error.
        """
        remarks = [
            f"message key '{key}' looks like a switch, and is none ({', '.join(SWITCHES)})" for key in chat.unknown
        ]
        last_question = max((n for n, message in enumerate(chat.messages) if message["role"] == "user"), default=-1)
        for lost in rendered.lost:
            learnt = not (self.completion_only and lost.message is not None and lost.message < chat.prompt_messages)
            learnt &= chat.switches.get(lost.message, 1) != 0
            if lost.kind == "reasoning" and (not learnt or (lost.message or 0) < last_question):
                remarks.append("the chat template leaves out the reasoning of earlier turns")
            elif self.on_lost_content == "error":
                fix = f"set `model.chat_template` to a template that renders {_PLURALS[lost.kind]}"
                raise BadRow(f"{describe_lost(chat, lost)}; {fix}, or train without it (`data.on_lost_content: warn`)")
            else:
                remarks.append(f"the chat template leaves out {_PLURALS[lost.kind]}")
        return list(dict.fromkeys(remarks))

    def _draft_answers(self, answers: Mapping[str, Text | Chat]) -> dict[str, Draft]:
        """Returns a draft of the prompt with each of the answers to it, by their names."""
        parts = {}
        for name, one in answers.items():
            if isinstance(one, Chat) and one.switches:
                where = one.names[min(one.switches)]
                raise BadRow(f"{where} has a switch ({', '.join(SWITCHES)}), and whole answers are learnt from")
            try:
                parts[name] = self._draft_text(one) if isinstance(one, Text) else self._draft_chat(one)
            except BadRow as bad:
                raise BadRow(f"'{name}': {bad}") from None
        return parts

    def _draft_ids(self, sample: Ids) -> Draft:
        ids, labels = sample.input_ids, sample.labels
        for name, values in (("input_ids", ids), ("labels", labels[labels != IGNORED])):
            outside = values[(values < 0) | (values >= self.vocabulary)]
            if len(outside):
                raise BadRow(f"'{name}' contains {outside[0]}, which is outside the vocabulary of {self.vocabulary}")
        labels[0] = IGNORED
        draft = Draft(ids=ids.astype(np.int32), labels=labels.astype(np.int32))
        check(draft)
        return draft

    def _tokenise(self, drafts: list[Draft]) -> None:
        """Tokenises wholes and prompts, each in one call, and finishes the drafts in place."""
        located = [draft for draft in drafts if draft.spans is not None or draft.words is not None]
        if located and not self.offsets.has_offsets:
            fix = "use the model's fast tokenizer"
            if self.format != "tokens":
                fix += ", or leave out `assistant_only_loss` and the switches of messages"
            raise DataError("the tokenizer cannot say which characters a token stands for", key="model", fix=fix)
        if located:
            for draft, (ids, offsets) in zip(located, self.offsets([draft.text for draft in located]), strict=True):
                if draft.words is None:
                    self._finish(draft, ids.astype(np.int32), factors_of(offsets, draft.spans))
                else:
                    self._label_words(draft, ids, offsets)
        drafts = [draft for draft in drafts if draft.spans is None and draft.words is None]
        wholes = self._ids([draft.text for draft in drafts])
        prompts = iter(self._ids([draft.prompt for draft in drafts if draft.prompt]))
        for draft, whole in zip(drafts, wholes, strict=True):
            start = 0
            if draft.prompt:
                whole, start = self._join(draft, whole, next(prompts))
            if draft.plain:
                if whole[: len(self.prefix)] != self.prefix:
                    whole, start = self.prefix + whole, start + len(self.prefix)
                if whole[-1:] != [self.end]:
                    whole = whole + [self.end]
            self._finish(draft, np.array(whole, dtype=np.int32), np.arange(len(whole)) >= start)

    def _join(self, draft: Draft, whole: list[int], prompt: list[int]) -> tuple[list[int], int]:
        """Returns the ids of the whole and the position of its first completion token."""
        if whole[: len(prompt)] == prompt:
            return whole, len(prompt)
        draft.flags |= MERGED
        return prompt + self._continuation(draft.text[len(draft.prompt) :]), len(prompt)

    def _continuation(self, text: str) -> list[int]:
        """Returns the ids of a text inside a sequence: without the blank that some SentencePiece models put first."""
        newline, behind = self._ids(["\n", "\n" + text])
        return behind[len(newline) :] if behind[: len(newline)] == newline else self._ids([text])[0]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:  # transformers takes an empty list for one text
            return []
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return encoded["input_ids"]

    def _finish(self, draft: Draft, ids: np.ndarray, factors: np.ndarray) -> None:
        draft.ids, draft.labels = ids, np.where(factors > 0, ids, IGNORED)
        draft.factors = _runs(factors)
        draft.labels[:1] = IGNORED
        if not draft.plain and not (draft.labels == self.tokenizer.eos_token_id).any():
            draft.flags |= NO_EOS
        check(draft)

    def _label_words(self, draft: Draft, ids: np.ndarray, offsets: np.ndarray) -> None:
        """Finishes words: the first token of each has a label, the first of the document too where it is a word's."""
        starts, ends = np.array(draft.words).T  # [W]
        firsts = np.searchsorted(offsets[:, 1], starts, side="right")  # the first token that ends behind a word's start
        begins = np.append(offsets[:, 0], np.iinfo(np.int64).max)[firsts]
        if (lost := np.flatnonzero(begins >= ends)).size:
            draft.problem = f"tokens[{lost[0]}] becomes no token of the tokenizer"
        elif (same := np.flatnonzero(np.diff(firsts) == 0)).size:
            draft.problem = f"tokens[{same[0]}] and tokens[{same[0] + 1}] begin in one token of the tokenizer"
        else:
            end = [] if ids[-1] == self.end else [self.end]
            draft.ids = np.array([*self.prefix, *ids, *end], dtype=np.int32)
            draft.labels = np.full_like(draft.ids, IGNORED)
            draft.labels[firsts + len(self.prefix)] = draft.ids[firsts + len(self.prefix)]

    def _blanks_behind_eos(self, ids: np.ndarray) -> int:
        end = len(ids)
        while end and ids[end - 1] != self.tokenizer.eos_token_id:
            if self.tokenizer.decode(ids[end - 1 : end].tolist()).strip():
                return 0
            end -= 1
        return len(ids) - end if end else 0

    def _table(self, drafts: list[Draft]) -> pa.Table:
        import pyarrow as pa

        def column(arrays: list[np.ndarray], dtype: type = np.int32) -> pa.Array:
            offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
            values = np.concatenate([np.empty(0, dtype), *arrays], dtype=dtype)
            return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))

        columns = {"input_ids": column([draft.ids for draft in drafts])}
        if self.format == "input_ids":
            columns["labels"] = column([draft.labels for draft in drafts])
        elif not self.all_learnt:
            columns["learnt"] = column([draft.labels != IGNORED for draft in drafts], np.uint8)
            columns["factors"] = column([draft.factors for draft in drafts], np.float32)
        supervised = [np.count_nonzero(draft.labels != IGNORED) for draft in drafts]
        return pa.table(
            columns
            | {
                "supervised": pa.array(supervised, pa.int32()),
                "blanks": pa.array([self._blanks_behind_eos(draft.ids) for draft in drafts], pa.int32()),
                "flags": pa.array([draft.flags for draft in drafts], pa.uint8()),
                "remarks": pa.array(["\n".join(draft.remarks) or None for draft in drafts], pa.string()),
                "problem": pa.array([draft.problem for draft in drafts], pa.string()),
            }
        )


def _by_size(drafts: list[Draft]) -> Iterator[list[Draft]]:
    """Yields drafts in groups of `_AT_ONCE` characters or a little more, so that long rows don't add up in memory."""
    sizes = np.cumsum([len(draft.text or "") for draft in drafts])
    for some in np.split(np.arange(len(drafts)), np.flatnonzero(np.diff(sizes // _AT_ONCE)) + 1):
        if len(some):
            yield drafts[some[0] : some[-1] + 1]


def _widened(turn: tuple[int, int], marked: Sequence[Span]) -> tuple[int, int]:
    """Widens a turn to the markers that it is in: some enclose its header, which a switch turns off as well."""
    own = [(start, end) for start, end, _ in marked if start < turn[1] and turn[0] < end]
    return min([turn[0], *(start for start, _ in own)]), max([turn[1], *(end for _, end in own)])


def _runs(factors: np.ndarray) -> np.ndarray:
    """Returns [first token, one behind the last, factor] of every run with a factor other than 0 and 1, end to end."""
    if not ((factors != 0) & (factors != 1)).any():
        return np.empty(0, np.float32)
    starts = np.flatnonzero(np.diff(factors, prepend=np.nan))
    runs = np.stack([starts, np.append(starts[1:], len(factors)), factors[starts]], axis=1)
    return runs[(runs[:, 2] != 0) & (runs[:, 2] != 1)].astype(np.float32).ravel()


def added_in_front(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the ids that the tokenizer puts before a text by itself: usually `[bos]`, or nothing."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    starts = (i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare)
    return list(full[: next(starts, 0)])


def prompts_of(flags: np.ndarray, format: str) -> list[str]:
    """Says how the rows with these `flags`, uint8 `[rows]`, were written out: see `DataReport.prompts`.

    >>> prompts_of(np.array([RENDERED, RENDERED | UNLIKE, 0]), "prompt_completion")
    ['conversation', 'text']
    """
    rendered = (flags & RENDERED) != 0
    plain = format if format in (*WORDINGS, "input_ids", "tokens") else "text"
    return [*(["conversation"] if rendered.any() else []), *([] if rendered.all() else [plain])]


def count_flags(flags: np.ndarray) -> tuple[int, int, int]:
    """Counts the rows of each flag, of uint8 `[rows]`: merged, unlike, without an eos."""
    merged, unlike, no_eos = (int(np.count_nonzero(flags & flag)) for flag in (MERGED, UNLIKE, NO_EOS))
    return merged, unlike, no_eos


def notes_of(counts: tuple[int, int, int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Puts what `count_flags` has counted into words, for the report."""
    merged, unlike, no_eos = counts
    notes = []
    if merged:
        notes.append(
            f"prompts that end inside a token of the whole text: {merged:,} (tokenised separately from their completions)"
        )
    if unlike:
        notes.append(
            f"prompts that the chat template renders differently when an answer follows: {unlike:,} "
            "(the completion starts where its turn does)"
        )
    if no_eos and tokenizer.eos_token is not None:
        notes.append(
            f"conversations without a supervised eos_token ({tokenizer.eos_token}): {no_eos:,} (a model learns to stop only "
            "from the token that ends a turn: let the chat template end turns with it, or make theirs the eos_token)"
        )
    return notes
