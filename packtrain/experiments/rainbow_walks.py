"""Walks: a toy language whose answers end where only writing them tells.

    prompt    c2 b3               two places of a walk, one in its second wording, one in its third
    answer    d1 g4 a2 END        next(b3) = d, next(d1) = g, next(g4) = a, and a is a last place

Each place can be worded in B ways, all equally good, but each leads on to another place. So nobody can know from the
prompt how long the answer will be: one has to write it, word by word. Given the word before, the next place is certain
and its wording is not; and behind a last place the end is plain to see. That is the situation of a language model that
answers a question, in two hundred words.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import datasets
import numpy as np

from packtrain.data.examples import Examples

FILLER, EOS, MASK, FIRST_PAD, PADS = 0, 1, 2, 3, 7
FIRST_WORD = FIRST_PAD + PADS


@dataclass(frozen=True, kw_only=True)
class Walks:
    """The language.

    Attributes:
        places, last_places: how many places there are, and how many of them end a walk.
        wordings: B, words for each place.
        longest: most words of an answer; longer ones are not used.
        seed: of the map.
    """

    places: int = 48
    last_places: int = 8
    wordings: int = 4
    longest: int = 15
    seed: int = 0

    @cached_property
    def next_place(self) -> np.ndarray:
        """int64 `[places, wordings]`: every wording is a permutation, so all places stay equally likely."""
        random = np.random.default_rng([self.seed, 0])
        return np.stack([random.permutation(self.places) for _ in range(self.wordings)], axis=1)

    @property
    def vocab_size(self) -> int:
        """Filler, eos, mask, pads and words."""
        return FIRST_WORD + self.places * self.wordings

    @cached_property
    def prompts(self) -> list[list[int]]:
        """Every prompt there is: two words that are not last, the second following the first."""
        pairs = [
            (word, self.after(word) * self.wordings + wording)
            for word in range((self.places - self.last_places) * self.wordings)
            for wording in range(self.wordings)
        ]
        return [[FIRST_WORD + one, FIRST_WORD + other] for one, other in pairs if not self.is_last(other)]

    def draw(self, count: int, *, seed: int) -> list[list[int]]:
        """`count` walks as words: two of prompt, and 1 to `longest` of answer."""
        random, walks = np.random.default_rng([self.seed, 1, seed]), []
        while len(walks) < count:
            words = [int(random.integers((self.places - self.last_places) * self.wordings))]
            while not self.is_last(words[-1]) and len(words) < 2 + self.longest:
                words.append(self.after(words[-1]) * self.wordings + int(random.integers(self.wordings)))
            if self.is_last(words[-1]) and len(words) > 2:
                walks.append(words)
        return walks

    def after(self, word: int) -> int:
        """The place that follows a word."""
        return int(self.next_place[divmod(word, self.wordings)])

    def examples(self, count: int, *, seed: int) -> Examples:
        """Prompts with answers, without any end."""
        rows = []
        for words in self.draw(count, seed=seed):
            ids = [FIRST_WORD + word for word in words]
            rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
        return Examples.from_dataset(datasets.Dataset.from_list(rows))

    def is_last(self, word: int) -> bool:
        return word // self.wordings >= self.places - self.last_places

    def follow(self, prompt: list[int], tokens: list[int]) -> tuple[int, int | None]:
        """How far `tokens` are a walk from `prompt`, and behind which token a last place ends it (None: nowhere)."""
        word, right, ends = prompt[-1] - FIRST_WORD, 0, None
        for number, token in enumerate(tokens):
            if token < FIRST_WORD:
                break
            place = (token - FIRST_WORD) // self.wordings
            if right == number and place == self.after(word):
                right = number + 1
            word = token - FIRST_WORD
            if self.is_last(word):
                ends = number + 1
                break
        return right, ends
