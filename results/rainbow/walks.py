"""Generates walks, a toy language in which only writing an answer tells where it ends.

    prompt    2 1 3 3 1 ... b     a row of keys, and a place
    answer    d3 g1 a2 END        next(b, 2) = d, next(d, 1) = g, next(g, 3) = a, and a is a last place

Where a walk ends follows from the prompt, but one has to walk there: whoever looks ahead without writing the places
between sees a few steps, and of the rest only how long walks tend to be. Each place can be worded in B ways, all equally
good. So a reader of the words so far is certain of the next place, not of its wording, and sees plainly that a walk is
over. That is the situation of a language model that answers a question step by step, in sixty words.
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
    """Describes the language, and draws from it.

    Attributes:
        places, last_places: how many places there are, and how many of them end a walk.
        keys: ways to step on from a place.
        wordings: B, words for each place.
        longest: places of an answer.
        seed: of the map.
    """

    places: int = 6
    last_places: int = 1
    keys: int = 2
    wordings: int = 3
    longest: int = 15
    seed: int = 0

    @cached_property
    def next_place(self) -> np.ndarray:
        """The map, int64 `[places, keys]`: every key is a permutation, so all places stay equally likely along a walk."""
        random = np.random.default_rng([self.seed, 0])
        return np.stack([random.permutation(self.places) for _ in range(self.keys)], axis=1)

    @property
    def first_last(self) -> int:
        return self.places - self.last_places

    @property
    def first_key(self) -> int:
        return FIRST_WORD + self.places * self.wordings

    @property
    def vocab_size(self) -> int:
        """The number of tokens: padding, eos, mask, pads, words and keys; a prompt's place is its first word."""
        return self.first_key + self.keys

    def draw(self, count: int, *, seed: int) -> tuple[list[list[int]], list[list[int]]]:
        """Draw `count` prompts (tokens, `[1 + longest]`) and the places of their answers, 1 to `longest` of them.

        Starts and keys are drawn evenly, so about one walk in `places / last_places` ends at each step, and how far it
        has come says nothing of how far it still goes. Walks that would be longer than `longest` are drawn again.
        """
        random = np.random.default_rng([self.seed, 1, seed])
        prompts, answers = [], []
        while len(prompts) < count:
            start, keys = int(random.integers(self.first_last)), random.integers(self.keys, size=self.longest).tolist()
            places = [start]
            while len(places) <= self.longest and not self.is_last(places[-1]):
                places.append(int(self.next_place[places[-1], keys[len(places) - 1]]))
            if self.is_last(places[-1]):
                prompts.append([*(self.first_key + key for key in keys), FIRST_WORD + start * self.wordings])
                answers.append(places[1:])
        return prompts, answers

    def examples(self, count: int, *, seed: int) -> Examples:
        """Draw prompts with answers in a random wording, without any end."""
        random = np.random.default_rng([self.seed, 2, seed])
        rows = []
        for prompt, places in zip(*self.draw(count, seed=seed), strict=True):
            words = FIRST_WORD + np.array(places) * self.wordings + random.integers(self.wordings, size=len(places))
            rows.append({"input_ids": [*prompt, *words.tolist()], "labels": [-100] * len(prompt) + words.tolist()})
        return Examples.from_dataset(datasets.Dataset.from_list(rows))

    def is_last(self, place: int) -> bool:
        return place >= self.first_last

    def places_of(self, tokens: list[int]) -> list[int]:
        """Read the place that each token is a word for; -1 for other tokens."""
        words = [token - FIRST_WORD if FIRST_WORD <= token < self.first_key else -1 for token in tokens]
        return [word // self.wordings if word >= 0 else -1 for word in words]
