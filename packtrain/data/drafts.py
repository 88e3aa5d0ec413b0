"""Examples under way: the tokens of one document, and of several that answer one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from packtrain.data.formats import IGNORED
from packtrain.data.offsets import Span


@dataclass(kw_only=True)
class Draft:
    """One example under way. `text` and `prompt` are still to be tokenised; None where there is nothing to do."""

    text: str | None = None
    prompt: str | None = None
    plain: bool = False
    ids: np.ndarray = field(default_factory=partial(np.empty, 0, np.int32))  # [L]
    labels: np.ndarray = field(default_factory=partial(np.empty, 0, np.int32))  # [L]
    spans: list[Span] | None = None  # what is learnt of the text; None where the prompt says it
    words: Sequence[tuple[int, int]] | None = None  # characters of the words whose first tokens have a label
    factors: np.ndarray = field(default_factory=partial(np.empty, 0, np.float32))  # runs of them, see `Encoder`
    remarks: list[str] = field(default_factory=list)
    flags: int = 0
    problem: str | None = None
    parts: dict[str, Draft] = field(default_factory=dict)  # answers to one prompt, tokenised one by one, then joined
    implicit: bool = False  # the prompt of the answers is what both begin with
    distinct: bool = False  # the answers must not be the same
    turns: bool = False  # the answers have a prompt each, what was said before


def check(draft: Draft) -> None:
    """Makes a draft a bad row where nothing can be learnt from it."""
    if (draft.labels != IGNORED).any():
        return
    if len(draft.ids) < 2:
        draft.problem = f"has {len(draft.ids)} token{'s' if len(draft.ids) != 1 else ''}, and nothing to predict"
    else:
        why = f" ({'; '.join(draft.remarks)})" if draft.remarks else ""
        draft.problem = f"none of its {len(draft.ids)} tokens is supervised{why}"
    draft.ids, draft.labels, draft.factors, draft.flags, draft.remarks = *(draft.ids[:0],) * 3, 0, []


def join_parts(draft: Draft) -> None:
    """Makes one draft of the documents of its parts, or a bad row; all have the same prompt, if they aren't `turns`."""
    names, parts = [*draft.parts], [*draft.parts.values()]
    for name, part in draft.parts.items():
        if part.problem is not None:
            draft.problem = f"'{name}': {part.problem}"
            return
        if draft.implicit:
            part.labels[: _shared_tokens(parts[0].ids, parts[1].ids)] = IGNORED
    starts = [int((part.labels != IGNORED).argmax()) for part in parts]
    first, start = parts[0], starts[0]
    for name, part, own in zip(names, parts, starts, strict=True):
        if not draft.turns and not _shared_tokens(first.ids, part.ids):
            draft.problem = (
                f"'{names[0]}' and '{name}' begin with different tokens, so there is no prompt that both answer"
            )
        elif not draft.turns and (own != start or not np.array_equal(first.ids[:start], part.ids[:start])):
            draft.problem = f"the prompt of '{names[0]}' and that of '{name}' are not the same tokens"
        elif (part.labels[own:] == IGNORED).any():
            draft.problem = f"'{name}': a token within the answer is not supervised"
        elif draft.distinct and part is not first and np.array_equal(first.ids, part.ids):
            draft.problem = f"'{names[0]}' and '{name}' are the same tokens, so neither is preferred"
        if draft.problem is not None:
            return
    draft.ids = np.concatenate([part.ids for part in parts])
    draft.labels = np.concatenate([part.labels for part in parts])
    for part in parts:
        draft.flags |= part.flags
    draft.remarks = list(dict.fromkeys([*draft.remarks, *(remark for part in parts for remark in part.remarks)]))


def _shared_tokens(one: np.ndarray, other: np.ndarray) -> int:
    """Counts the tokens that two documents begin with."""
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    return int(differ.argmax()) if differ.any() else length
