"""Walks: a toy language whose texts end where only writing them tells.

    words     d3 g1 a2 ...        the place d in its third wording, then g in its first, then a in its second
    rule      next(d, 3) = g, next(g, 1) = a: place and wording of a word say which place comes next
    prompt    a walk that is under way
    answer    how it goes on, up to the first word of a last place, and there it ends

Each place can be worded in B ways, all equally good, and each leads elsewhere. So a reader of the words so far is
certain of the next place, not of its wording, and sees plainly that a walk is over; but nobody knows in advance where it
will end. That is the situation of a language model that has several good ways to begin an answer, only more so.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import datasets
import numpy as np

from packtrain.data.examples import Examples

FILLER, EOS, MASK, FIRST_PAD, PADS = 0, 1, 2, 3, 7
FIRST_WORD = FIRST_PAD + PADS


class Course(NamedTuple):
    """How an answer goes: words up to and with the first of a last place (None without one), and whether all of these
    words follow the rule."""

    length: int | None
    right: bool


@dataclass(frozen=True, kw_only=True)
class Walks:
    """The language.

    Attributes:
        places, last_places: how many places there are, and how many of them end a walk.
        wordings: B, words for each place.
        prompt: words of every prompt.
        longest: words of an answer at most.
        seed: of the rule.
    """

    places: int = 8
    last_places: int = 1
    wordings: int = 3
    prompt: int = 6
    longest: int = 15
    seed: int = 0

    @cached_property
    def next_place(self) -> np.ndarray:
        """int64 `[places, wordings]`: every wording is a permutation, so all places stay about as likely."""
        random = np.random.default_rng([self.seed, 0])
        return np.stack([random.permutation(self.places) for _ in range(self.wordings)], axis=1)

    @property
    def vocab_size(self) -> int:
        """Filler, eos, mask, pads and words."""
        return FIRST_WORD + self.places * self.wordings

    def draw(self, count: int, *, seed: int) -> tuple[list[list[int]], list[list[int]]]:
        """`count` prompts and answers, words as tokens.

        Wordings are drawn evenly, so about one walk in `places / last_places` ends at each step, and how far it has
        come says nothing of how far it still goes. Walks longer than `longest`, or over in the prompt, are left out.
        """
        random = np.random.default_rng([self.seed, 1, seed])
        prompts, answers = [], []
        while len(prompts) < count:
            place, words = int(random.integers(self.places)), []
            for wording in random.integers(self.wordings, size=self.prompt + self.longest).tolist():
                words.append(FIRST_WORD + place * self.wordings + wording)
                if self.is_last(place):
                    break
                place = int(self.next_place[place, wording])
            if self.is_last(self.place_of(words[-1])) and len(words) > self.prompt:
                prompts.append(words[: self.prompt])
                answers.append(words[self.prompt :])
        return prompts, answers

    def examples(self, count: int, *, seed: int) -> Examples:
        """The same as training data, without any end."""
        rows = [
            {"input_ids": [*prompt, *answer], "labels": [-100] * len(prompt) + answer}
            for prompt, answer in zip(*self.draw(count, seed=seed), strict=True)
        ]
        return Examples.from_dataset(datasets.Dataset.from_list(rows))

    def follow(self, prompt: list[int], answer: list[int]) -> Course:
        """Read an answer, any tokens."""
        expected, right = self.next_of(prompt[-1]), True
        for number, token in enumerate(answer, start=1):
            right = right and self.place_of(token) == expected
            if self.is_last(self.place_of(token)):
                return Course(number, right)
            expected = self.next_of(token)
        return Course(None, right)

    def next_of(self, word: int) -> int:
        """The place that comes after a word; -1 after other tokens."""
        return int(self.next_place.flat[word - FIRST_WORD]) if word >= FIRST_WORD else -1

    def place_of(self, word: int) -> int:
        """The place that a token is a word for; -1 for other tokens."""
        return (word - FIRST_WORD) // self.wordings if word >= FIRST_WORD else -1

    def is_last(self, place: int) -> bool:
        return place >= self.places - self.last_places
