"""Is an answer right? By its final answer or its words, or by a function of the user's."""

from __future__ import annotations

import inspect
import math
import re
import traceback
from collections.abc import Callable
from typing import Any

from packtrain.errors import PacktrainError
from packtrain.imports import import_module

FINAL = re.compile(r"####\s*(-?[\d.,]+)")  # how GSM8K and packtrain:arithmetic mark a final answer
Score = Callable[[str, str], float]


def exact(answer: str, reference: str) -> float:
    """Returns 1 for a right answer and 0 for another: by the number behind `####` where the reference has one, else by all
    words.

    >>> exact("5 + 7 = 12. #### 12", "7 + 5 = 12 #### 12.")
    1.0
    """
    if right := FINAL.search(reference):
        given = FINAL.search(answer)
        return float(given is not None and number(given[1]) == number(right[1]))
    return float(answer.split() == reference.split())


def number(text: str) -> str:
    """Returns a number as it is compared: without the commas of thousands, and the full stop behind it."""
    return text.replace(",", "").rstrip(".")


def find_score(name: str | None) -> Score:
    """Returns `exact`, or the function of (answer, reference) that `my_module:function` names.

    Raises:
        PacktrainError: it can't be imported, or does not take two texts.
    """
    if name is None:
        return exact
    module, _, attribute = name.partition(":")
    fix = "name a function of (answer, reference) as my_package.my_module:function"
    if not module or not attribute:
        near = f", for example {name.removesuffix('.py')}:score" if name.removesuffix(".py").isidentifier() else ""
        raise PacktrainError("names no function of a module", key="--score", value=name, fix=fix + near)
    try:
        function = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise PacktrainError(f"can't be imported: {error}", key="--score", value=name, fix=fix) from error
    try:
        inspect.signature(function).bind("", "")
    except (TypeError, ValueError):
        raise PacktrainError("is not a function of (answer, reference)", key="--score", value=name, fix=fix) from None
    return function


def apply_score(score: Score, answer: str, reference: str) -> float:
    """Returns the score of one answer.

    Raises:
        PacktrainError: the user's function fails, or returns something else than a finite number.
    """
    about: dict[str, Any] = {"key": "--score", "value": getattr(score, "__name__", score)}
    given = f"for the answer {_short(answer)} and the reference {_short(reference)}"
    try:
        value = score(answer, reference)
    except Exception as error:  # the user's own function
        last = traceback.extract_tb(error.__traceback__)[-1]
        what = f"failed {given}: {type(error).__name__}: {error} ({last.filename}, line {last.lineno})"
        raise PacktrainError(what, fix="let it return a number for every text, an empty one too", **about) from error
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        what = f"must return a finite number, and returned {value!r} {given}"
        raise PacktrainError(what, fix="return 1.0 for a right answer and 0.0 for another, or a share", **about)
    return number


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
