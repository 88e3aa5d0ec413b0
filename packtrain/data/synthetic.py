"""`packtrain:arithmetic`: seeded word problems with worked answers that can be checked, lengths long-tailed.

    prompt      Mia has 12 coins. Mia finds 7 more. Mia loses 5. How many coins does Mia have now?
    completion  12 + 7 = 19
                19 - 5 = 14
                #### 14

No download, no licence, and a model of a million weights learns the form of it in a minute. The number of steps
follows a log-normal law (median 4, sigma 1.2), so that lengths look like real fine-tuning data: under a BPE of
1,000-2,000 entries the median is about 60 tokens and the 99th percentile beyond 600. The last line is GSM8K's.

`packtrain:trend` tells the same stories with a class, `more`, `fewer` or `same`, for sequence classification, and
`packtrain:preference` with two answers, the one that is right and one that is wrong or shows no working.

Row i of a seed is drawn from its own generator, by integers alone: it is the same on every platform,
whatever the number of rows, and read in any order.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import Any

import numpy as np

PATH, TREND, PREFERENCE = "packtrain:arithmetic", "packtrain:trend", "packtrain:preference"
DEFAULT_ROWS = 20_000
SPLITS = {"train": 0, "test": 1}  # disjoint streams
HIGHEST = 99  # no total on the way is larger, none is negative
_VERSION = 1  # raise it when the same seed gives other rows

# Quantiles of the number of steps, exp(ln 4 + 1.2 z) cut at 110: (of 10,000 rows this many have less, steps).
_QUANTILES = [
    (0, 1),
    (1500, 1),
    (3000, 2),
    (4000, 3),
    (5000, 4),
    (6000, 5),
    (7000, 7),
    (8000, 11),
    (9000, 18),
    (9500, 29),
    (9800, 47),
    (9900, 65),
    (9950, 88),
    (9975, 110),
    (10000, 110),
]
_NAMES = tuple("Ada Ben Cleo Dan Eve Finn Gina Hugo Ines Jack Kim Lea Max Mia Nils Olga Paul Rosa Sam Tom".split())
_THINGS = tuple(
    "apples beads books bricks cards coins cups eggs keys leaves marbles nuts pears pens plums rings shells "
    "stamps stones tickets".split()
)
# What happens, and the line that works it out; by operation.
_SENTENCES = {
    "+": ("{name} finds {n} more.", "{name} gets {n} from a friend.", "{name} buys {n}."),
    "-": ("{name} loses {n}.", "{name} gives {n} away.", "{name} sells {n}."),
    "*": ("{name} doubles them.",),
    "/": ("{name} gives half of them away.",),
}
_NUMBER = re.compile(r"\d+")
_FINAL = re.compile(r"####\s*(-?\d+)")


class ArithmeticReader:
    """Rows with `prompt` and `completion`, made when they are read.

    Args:
        num_rows: how many there are.
        seed: rows of different seeds have nothing to do with each other.
        split: `train` or `test`.
    """

    label = PATH

    def __init__(self, num_rows: int = DEFAULT_ROWS, *, seed: int = 0, split: str = "train"):
        self.num_rows, self.seed, self.split = num_rows, seed, split
        self.fingerprint = f"{PATH} {_VERSION} {seed} {split} {num_rows}"

    def __len__(self) -> int:
        return self.num_rows

    def read(self, start: int, stop: int) -> list[Any]:
        return [arithmetic_row(self.seed, row, self.split) for row in range(start, min(stop, self.num_rows))]

    def where(self, row: int) -> str:
        return f"{self.label}, row {row}"


def arithmetic_row(seed: int, row: int, split: str = "train") -> dict[str, object]:
    """Makes row `row` of a seed: a dict with the strings `prompt` and `completion`."""
    random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, SPLITS[split], row])))
    steps = _number_of_steps(int(random.integers(10_000)))
    draws = iter(random.integers(2**31, size=4 + 3 * steps).tolist())
    name, thing = _NAMES[next(draws) % len(_NAMES)], _THINGS[next(draws) % len(_THINGS)]
    total = 2 + next(draws) % 49
    told, worked = [f"{name} has {total} {thing}."], []
    for _ in range(steps):
        operation, n = _choose(total, next(draws), next(draws))
        sentences = _SENTENCES[operation]
        told.append(sentences[next(draws) % len(sentences)].format(name=name, n=n))
        result = {"+": total + n, "-": total - n, "*": total * n, "/": total // n}[operation]
        worked.append(f"{total} {operation} {n} = {result}")
        total = result
    told.append(f"How many {thing} does {name} have now?")
    return {"prompt": " ".join(told) + "\n", "completion": "\n".join([*worked, f"#### {total}"])}


class TrendReader(ArithmeticReader):
    """The same stories as rows with `text` and `label`: are there `more`, `fewer` or `same` in the end?"""

    label = TREND

    def __init__(self, num_rows: int = DEFAULT_ROWS, *, seed: int = 0, split: str = "train"):
        super().__init__(num_rows, seed=seed, split=split)
        self.fingerprint = f"{TREND} {_VERSION} {seed} {split} {num_rows}"

    def read(self, start: int, stop: int) -> list[Any]:
        return [trend_row(row) for row in super().read(start, stop)]


def trend_row(row: dict[str, object]) -> dict[str, object]:
    """Turns an arithmetic row into one to classify.

    >>> trend_row({"prompt": "Mia has 12 coins. Mia loses 5. How many coins does Mia have now?\\n", "completion": "#### 7"})
    {'text': 'Mia has 12 coins. Mia loses 5.', 'label': 'fewer'}
    """
    story = str(row["prompt"])[: str(row["prompt"]).rindex(" How many ")]
    first, last = int(_NUMBER.findall(story)[0]), int(_FINAL.findall(str(row["completion"]))[0])
    return {"text": story, "label": "more" if last > first else "fewer" if last < first else "same"}


class PreferenceReader(ArithmeticReader):
    """The same problems as rows with `prompt`, `chosen` and `rejected`."""

    label = PREFERENCE

    def __init__(self, num_rows: int = DEFAULT_ROWS, *, seed: int = 0, split: str = "train"):
        super().__init__(num_rows, seed=seed, split=split)
        self.fingerprint = f"{PREFERENCE} {_VERSION} {seed} {split} {num_rows}"

    def read(self, start: int, stop: int) -> list[Any]:
        return [preference_row(row, number) for number, row in enumerate(super().read(start, stop), start)]


def preference_row(row: dict[str, object], number: int) -> dict[str, object]:
    """Turns an arithmetic row into a pair: the rejected answer is off by one and, of odd rows, shows no working.

    >>> preference_row({"prompt": "6 + 1?\\n", "completion": "6 + 1 = 7\\n#### 7"}, 0)
    {'prompt': '6 + 1?\\n', 'chosen': '6 + 1 = 7\\n#### 7', 'rejected': '6 + 1 = 7\\n#### 8'}
    """
    working, _, last = str(row["completion"]).rpartition("\n")
    wrong = f"#### {int(_FINAL.findall(last)[0]) + 1}"
    return {
        "prompt": row["prompt"],
        "chosen": row["completion"],
        "rejected": wrong if number % 2 else f"{working}\n{wrong}",
    }


READERS = {PATH: ArithmeticReader, TREND: TrendReader, PREFERENCE: PreferenceReader}


def check_answer(row: dict[str, object], text: str) -> bool:
    """Returns whether `text` (what a model wrote) gives the right final answer to a row's prompt.

    Only the first `#### number` counts; what follows it is no longer the answer.
    """
    right, given = _FINAL.findall(str(row["completion"])), _FINAL.search(text)
    return given is not None and int(given[1]) == int(right[0])


def _number_of_steps(percentile: int) -> int:
    """Interpolates between the quantiles; `percentile` in [0, 10000)."""
    place = bisect_right(_QUANTILES, (percentile, HIGHEST * HIGHEST))
    (low, few), (high, many) = _QUANTILES[place - 1], _QUANTILES[place]
    return few + (many - few) * (percentile - low) // (high - low)


def _choose(total: int, which: int, how_many: int) -> tuple[str, int]:
    """Chooses an operation that keeps the total between 0 and `HIGHEST`, and its operand."""
    possible = [(sign, 1 + how_many % 9) for sign in "+-"]
    possible = [(sign, n) for sign, n in possible if 0 <= (total + n if sign == "+" else total - n) <= HIGHEST]
    if 0 < total <= HIGHEST // 2:
        possible.append(("*", 2))
    if total and total % 2 == 0:
        possible.append(("/", 2))
    return possible[which % len(possible)]
