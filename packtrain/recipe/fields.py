"""The types of a recipe's values: what each may be, how it is named to people, and the check of a value.

    check(Positive, "1e4")      (10000, None, None)
    check(Positive, "many")     (None, "must be a whole number above 0", None)
    check(Flag, "yes")          (None, "must be true or false", "write true")

The same types serve our own keys and the fields of TrainingArguments and LoraConfig, so that `max_tokens: many` and
`learning_rate: fast` get the same answer. A recipe takes any field of these classes; their names and types are read
off the installed source (see `library_fields`). A type is checked where its annotation is simple (numbers, text,
flags, lists, mappings, literals, enums of strings); anything else is left to the library.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import re
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union, get_args, get_origin

from pydantic import AllowInfNan, BeforeValidator, Field, Strict, StringConstraints, TypeAdapter, ValidationError

_NUMBER = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?")


def _number(value: object) -> object:
    """Returns the number that a text is nothing but (`"1e-4"`), and anything else as it is."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = int(value) if value.lstrip("+-").isdigit() else float(value)
    return value


def _whole(value: object) -> object:
    """Returns `1e4` as 10000, also out of text, and anything else as it is."""
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
Columns = Annotated[dict[Text, Text | None], "a mapping of names to names"]
Roles = Annotated[
    dict[Text, Literal["system", "developer", "user", "assistant", "tool"]], "a mapping of names to roles"
]
Positive = Annotated[Whole, Field(gt=0, le=2**40), "a whole number above 0"]
NotNegative = Annotated[Number, Field(ge=0), "a number from 0 on"]
Weight = Annotated[Number, Field(gt=0), "a number above 0"]
Share = Annotated[Number, Field(gt=0, lt=1), "a number above 0 and below 1"]
Paths = Text | Annotated[list[Text], Field(min_length=1)]
Amount = Annotated[
    Annotated[int, Strict(), Field(ge=0)] | Annotated[float, Strict(), Field(ge=0, lt=1)],
    BeforeValidator(_number),
    "a whole number of rows or a share below 1",
]

_FLOATS = Literal["float32", "bfloat16", "float16"]
QUANTIZATION: dict[str, Any] = {  # of BitsAndBytesConfig, whose arguments have no annotations that could be read off
    "load_in_4bit": Flag,
    "load_in_8bit": Flag,
    "bnb_4bit_quant_type": Literal["nf4", "fp4"],
    "bnb_4bit_use_double_quant": Flag,
    "bnb_4bit_compute_dtype": _FLOATS,
    "bnb_4bit_quant_storage": Literal["uint8", "int8", "float32", "bfloat16", "float16"],
    "llm_int8_threshold": Number,
    "llm_int8_skip_modules": list[Text],
    "llm_int8_has_fp16_weight": Flag,
    "llm_int8_enable_fp32_cpu_offload": Flag,
}

# The 256 bytes and the special tokens come first.
VocabSize = Annotated[Whole, Field(ge=264), "a whole number from 264 on"]
Seed = Annotated[Whole, Field(ge=0, lt=2**32), "a whole number from 0 to 2^32 - 1"]  # numpy takes no other


def describe(expected: Any) -> str:
    """Returns how a type is named to people: `a whole number or auto`, `one of token, example`."""
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
    """Returns `(converted value, None, None)`, or `(None, what is wrong, the fix or None)`.

    One value at a time: pydantic's error list of a whole section comes without the values that are right, and the rules
    between keys need those to report their problems along with these.
    """
    try:
        return _adapter(expected).validate_python(value), None, None
    except ValidationError as error:
        first = error.errors()[0]
    if first["type"] in ("string_too_short", "string_pattern_mismatch"):
        return None, "must not be empty", None
    if first["type"] == "less_than_equal":
        return None, f"must be at most {first['ctx']['le']:,}", None
    return None, f"must be {describe(expected)}", _fix(expected, value)


def _fix(expected: Any, value: object) -> str | None:
    """Returns what was probably meant by a value of another type."""
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
    """Returns the known word nearest to `word`, the first by name of several, or None if none is near.

    >>> did_you_mean("flash_atention", ["flash_attention_3", "flash_attention_2"])
    'flash_attention_2'
    """
    by_lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), by_lower, n=8, cutoff=0.6)
    ratios = {name: difflib.SequenceMatcher(None, name, word.lower()).ratio() for name in near}
    return by_lower[min(near, key=lambda name: (-ratios[name], name))] if near else None


_SIMPLE = {
    "int": Whole,
    "float": Number,
    "bool": Flag,
    "str": AnyText,
    "dict": Mapping,
    "Dict": Mapping,
    "list": list,
    "List": list,
    "tuple": list,  # YAML has no tuples
    "Tuple": list,
}


@dataclass(frozen=True)
class _Module:
    """The parsed source of a module."""

    name: str
    is_package: bool
    classes: dict[str, ast.ClassDef]
    imports: dict[str, ast.ImportFrom]  # imported name -> the `from ... import` that brings it


def library_fields(qualified_name: str) -> dict[str, Any]:
    """Returns field name -> type to check of a dataclass, such as `peft.tuners.lora.config.LoraConfig`.

    Parses the source of the class, of its bases and of their enums, which takes a tenth of a second and never goes
    stale. Not `dataclasses.fields`, cached per version: filling that cache imports torch, transformers and peft, for
    seconds, whenever a recipe is read on a fresh machine.

    Returns {} where the library isn't installed or has moved the class: then names go unchecked here, and the library
    itself complains at the start of the run.
    """
    module_name, _, class_name = qualified_name.rpartition(".")
    found = _find_class(module_name, class_name)
    return _fields(*found) if found else {}


def _fields(module: _Module, node: ast.ClassDef) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for base in reversed(node.bases):
        if isinstance(base, ast.Name) and (found := _find_class(module.name, base.id)):
            fields |= _fields(*found)
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            if not line.target.id.startswith("_") and "init=False" not in ast.unparse(line):
                fields[line.target.id] = _type(line.annotation, module)
    return fields


def _type(node: ast.expr | None, module: _Module) -> Any:
    """Returns the type to check for an annotation; `Any` where it isn't simple."""
    match node:
        case ast.Constant(value=None):
            return None
        case ast.Name(id=name) if name in _SIMPLE:
            return _SIMPLE[name]
        case ast.Name(id=name):
            return _string_enum(name, module) or Any
        case ast.BinOp(op=ast.BitOr(), left=left, right=right):
            return _union([left, right], module)
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            return Optional[_type(inner, module)]  # noqa: UP045 (the type is made at run time)
        case ast.Subscript(value=ast.Name(id="Union"), slice=ast.Tuple(elts=parts)):
            return _union(parts, module)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
            return _literal([ast.literal_eval(part) for part in getattr(inner, "elts", [inner])])
        case ast.Subscript(value=ast.Name(id="list" | "List"), slice=inner):
            return list[_type(inner, module)]
        case ast.Subscript(value=ast.Name(id=name)) if name in _SIMPLE:
            return _SIMPLE[name]
    return Any


def _union(parts: list[ast.expr], module: _Module) -> Any:
    types = [_type(part, module) for part in parts]
    if any(isinstance(part, ast.Name) and _string_enum(part.id, module) for part in parts):
        types = [kind for kind in types if kind is not AnyText]  # `IntervalStrategy | str`: a member's value
    return Any if Any in types else Union[tuple(types)]  # noqa: UP007


def _literal(members: list[object]) -> Any:
    # peft writes patterns into a Literal: 'pissa_niter_[number of iters]'
    if any(isinstance(member, str) and "[" in member for member in members):
        return AnyText
    return Literal[tuple(members)]


def _string_enum(name: str, module: _Module) -> Any:
    """Returns the `Literal` of an enum's string values, or None where `name` isn't such an enum."""
    found = _find_class(module.name, name)
    if not found or not any(ast.unparse(base).endswith("Enum") for base in found[1].bases):
        return None
    values = [
        line.value.value
        for line in found[1].body
        if isinstance(line, ast.Assign) and isinstance(line.value, ast.Constant)
    ]
    return Literal[tuple(values)] if values and all(isinstance(value, str) for value in values) else None


@functools.cache
def _find_class(module_name: str, class_name: str) -> tuple[_Module, ast.ClassDef] | None:
    """Finds the class of that name in a module, through `from ... import` within its package."""
    module = _parse(module_name)
    if module is None:
        return None
    if class_name in module.classes:
        return module, module.classes[class_name]
    if class_name in module.imports:
        source = _absolute(module.imports[class_name], module)
        if source.split(".")[0] == module_name.split(".")[0] and source != module_name:
            return _find_class(source, class_name)
    return None


def _absolute(node: ast.ImportFrom, module: _Module) -> str:
    """Returns where an import leads: `from ..utils import x` inside `peft.tuners.lora.config` -> `peft.tuners.utils`."""
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    kept = parts[: len(parts) - node.level + module.is_package]
    return ".".join([*kept, node.module] if node.module else kept)


@functools.cache
def _parse(module_name: str) -> _Module | None:
    package, *rest = module_name.split(".")
    spec = importlib.util.find_spec(package)  # not of the submodule, which would import its parents
    if spec is None or not spec.submodule_search_locations:
        return None
    base = Path(spec.submodule_search_locations[0], *rest)
    for path, is_package in ((base.with_suffix(".py"), False), (base / "__init__.py", True)):
        if path.is_file():
            nodes = list(_statements(ast.parse(path.read_text(encoding="utf-8")).body))
            classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
            imports = {
                alias.asname or alias.name: node
                for node in nodes
                if isinstance(node, ast.ImportFrom)
                for alias in node.names
            }
            return _Module(module_name, is_package, classes, imports)
    return None


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yields the statements of a module, and those under its `if` and `try`."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _statements(node.body + node.orelse)
