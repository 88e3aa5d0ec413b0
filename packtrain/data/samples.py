"""What a row says, before it is tokenised: text, a conversation (`messages.Chat`), ids, answers to one prompt, or words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from packtrain.data.messages import Chat


@dataclass(frozen=True, kw_only=True)
class Text:
    """Plain text: a completion, after a prompt if there is one."""

    prompt: str = ""
    completion: str


@dataclass(frozen=True, kw_only=True)
class Ids:
    """Token ids `[L]` and labels `[L]`, both int64, as the row gives them."""

    input_ids: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two answers to one prompt, of which the first is preferred.

    Attributes:
        chosen, rejected: the prompt with either answer; both of one kind.
        implicit: the prompt of plain text is not set apart: it is the tokens that both begin with.
    """

    chosen: Text | Chat
    rejected: Text | Chat
    implicit: bool = False


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Answers to one prompt, each with it; all of one kind."""

    answers: Sequence[Text | Chat]


@dataclass(frozen=True, kw_only=True)
class Words:
    """Text as words.

    Attributes:
        text: the words with blanks between them.
        spans: first character and one behind the last of each word, ascending.
    """

    text: str
    spans: Sequence[tuple[int, int]]
