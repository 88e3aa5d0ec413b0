"""What a recipe's values may be: the types of settings, how they are named to people, and one check.

The same types serve our own keys and the fields of TrainingArguments and LoraConfig, so that
`max_tokens: many` and `learning_rate: fast` get the same answer.
"""

from __future__ import annotations

import difflib
import functools
import re
import types
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    AllowInfNan,
    BeforeValidator,
    Field,
    Strict,
    StringConstraints,
    TypeAdapter,
    ValidationError,
)

_NUMBER = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?")


def _number(value: object) -> object:
    """A number, or text that is nothing but a number (`"1e-4"`); `True` is not one."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = int(value) if value.lstrip("+-").isdigit() else float(value)
    return value


def _whole(value: object) -> object:
    """As `_number`; `1e4` is whole."""
    value = _number(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


# The words in an annotation are what people read in "must be ...".
Whole = Annotated[int, Strict(), BeforeValidator(_whole), "a whole number"]
Real = Annotated[float, Strict(), AllowInfNan(False)]
Number = Annotated[Annotated[int, Strict()] | Real, BeforeValidator(_number), "a number"]
Flag = Annotated[bool, Strict(), "true or false"]
Text = Annotated[str, Strict(), StringConstraints(min_length=1, pattern=r"\S"), "text"]
AnyText = Annotated[str, Strict(), "text"]
Mapping = Annotated[dict[str, Any], "a mapping"]
Positive = Annotated[Whole, Field(gt=0), "a whole number above 0"]
Amount = Annotated[
    Annotated[int, Strict(), Field(ge=0)] | Annotated[float, Strict(), Field(ge=0, lt=1)],
    BeforeValidator(_number),
    "a whole number of rows or a share below 1",
]


def describe(expected: Any) -> str:
    """How to name a type to people: `a whole number or auto`, `one of token, example`."""
    if get_origin(expected) is Annotated:
        words = [extra for extra in expected.__metadata__ if isinstance(extra, str)]
        return words[-1] if words else describe(get_args(expected)[0])
    if get_origin(expected) in (Union, types.UnionType):
        parts = [describe(part) for part in get_args(expected) if part is not type(None)]
        return " or ".join(dict.fromkeys(parts))
    if get_origin(expected) is Literal:
        members = [str(member) for member in get_args(expected)]
        return members[0] if len(members) == 1 else "one of " + ", ".join(members)
    if (get_origin(expected) or expected) is list:
        items = get_args(expected)
        return f"a list of {describe(items[0])}" if items and items[0] is not Any else "a list"
    return "a mapping" if (get_origin(expected) or expected) is dict else "a value"


@functools.cache
def _adapter(expected: Any) -> TypeAdapter:
    return TypeAdapter(expected)


def check(expected: Any, value: object) -> tuple[object, str | None, str | None]:
    """Returns `(converted value, None, None)`, or `(None, what is wrong, how to mend it or None)`."""
    try:
        return _adapter(expected).validate_python(value), None, None
    except ValidationError as error:
        first = error.errors()[0]
    if first["type"] in ("string_too_short", "string_pattern_mismatch"):
        return None, "must not be empty", None
    return None, f"must be {describe(expected)}", _mend(expected, value)


def _mend(expected: Any, value: object) -> str | None:
    wanted = describe(expected)
    if isinstance(value, str):
        if "true or false" in wanted and value.lower() in ("yes", "no", "on", "off", "y", "n"):
            return f"write {'true' if value.lower() in ('yes', 'on', 'y') else 'false'}"
        digits = re.sub(r"[_, ](?=\d{3})", "", value)
        if "number" in wanted and digits != value and _NUMBER.fullmatch(digits):
            return f"write {digits}"
        near = did_you_mean(value, _literals(expected))
        return f"did you mean {near}?" if near else None
    if "text" in wanted and isinstance(value, int | float) and not isinstance(value, bool):
        return f'put it in quotes: "{value}"'
    return None


def _literals(expected: Any) -> list[str]:
    if get_origin(expected) is Literal:
        return [member for member in get_args(expected) if isinstance(member, str)]
    return [literal for part in get_args(expected) for literal in _literals(part)]


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """The known word nearest to `word`, if any is near."""
    by_lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[near[0]] if near else None
