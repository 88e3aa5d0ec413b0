"""The fields of TrainingArguments and LoraConfig, read off the installed source without importing it.

Why: a recipe takes any field of these classes, so their names must be known before a run starts; copying
them would go stale with the next release, and importing transformers and peft costs seconds. Parsing the
class bodies (and those of their bases and enums) takes milliseconds.

A type is checked where its annotation is simple (numbers, text, flags, lists, mappings, literals, enums of
strings); anything else is left to the library.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional, Union

from packtrain.recipe.values import AnyText, Flag, Mapping, Number, Whole

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
    name: str
    is_package: bool
    classes: dict[str, ast.ClassDef]
    imports: dict[str, ast.ImportFrom]  # imported name -> the `from ... import` that brings it


def library_fields(qualified_name: str) -> dict[str, Any]:
    """Field name -> type to check (see `values`) of a dataclass such as `peft.tuners.lora.config.LoraConfig`.

    Empty where the library isn't installed or has moved the class: then names go unchecked here, and the
    library itself complains at the start of the run.
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
    """The type to check for an annotation; `Any` where it isn't simple."""
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
    """`Literal` of an enum's string values, or None where `name` isn't such an enum."""
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
    """The class of that name in a module, followed through `from ... import` within its package."""
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
    """`from ..utils import x` inside `peft.tuners.lora.config` -> `peft.tuners.utils`."""
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
    """The statements of a module, and those under its `if` and `try`."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _statements(node.body + node.orelse)
