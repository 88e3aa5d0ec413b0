"""Reads YAML strictly and with the place of every key: text -> plain data, and the line of each key.

Why not `yaml.safe_load`: it lets the last of two equal keys win without a word, reads `1e-4` as a string,
`yes` as a boolean and `12:30` as 750, and forgets line numbers. Here scalars follow YAML 1.2's core
schema, duplicate keys and aliases are refused, and nothing but plain data can come out (no tags, hence no
objects), however the text was made.
Why not ruamel.yaml: it stops at the first duplicate key, and reads aliases, merges, dates, tags, numbers as keys,
`1_000` as a number, lone surrogates and a `%YAML 1.1` header; 500 levels of nesting end in a RecursionError.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError

from packtrain.errors import PacktrainError, RecipeError

KeyPath = tuple[str, ...]  # ("training", "learning_rate")

MAX_DEPTH = 32  # of nesting; a recipe needs 4


class _Composer(yaml.SafeLoader):
    """Builds YAML's node tree under the 1.2 core schema; never constructs objects from it."""

    yaml_implicit_resolvers: dict = {}
    depth = 0

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise ComposerError(None, None, "an alias (`*name`); write the value out", mark)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            mark = self.peek_event().start_mark
            raise ComposerError(None, None, f"nested deeper than {MAX_DEPTH} levels", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


# https://yaml.org/spec/1.2.2/#103-core-schema, with `1e-4` (no dot needed) a float
_CORE_SCHEMA = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
for _kind, _pattern in _CORE_SCHEMA.items():
    _Composer.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), None)


def _scalar(kind: str, text: str) -> object:
    """Returns the value of a scalar. Raises ValueError where the text has none."""
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if kind == "float":
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    text.encode()  # a lone surrogate ("\ud800") can be neither stored nor printed
    return text


class Source:
    """A recipe's data with the place of each key, and the problems met so far.

    Attributes:
        tree: the recipe as plain dicts, lists and scalars.
        name: the file, for messages.
        places: key path -> `recipes/sft.yaml:12` or the override that set it.
        problems: what is wrong with the text itself; reading goes on past them.
    """

    def __init__(self, text: str, name: str):
        self.name = name
        self.places: dict[KeyPath, str] = {}
        self.problems: list[PacktrainError] = []
        self.tree: Any = self._read(text, name)

    @classmethod
    def from_file(cls, path: str | Path) -> Source:
        """Reads a file. Raises RecipeError where it cannot be read as UTF-8 text."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:  # ValueError: bad UTF-8, or a NUL in the name
            reason = error.strerror if isinstance(error, OSError) else str(error)
            fix = "give the path of a UTF-8 YAML file, for example recipes/quickstart.yaml"
            if isinstance(error, IsADirectoryError) and (of_run := Path(path) / "recipe.yaml").is_file():
                fix = f"name the recipe of this run: {of_run}"
            problem = PacktrainError(
                f"cannot read the recipe: {reason}",
                where=str(path),
                fix=fix,
            )
            raise RecipeError([problem]) from None
        return cls(text, str(path))

    def where(self, path: KeyPath) -> str:
        """Returns the place of a key, or of the nearest section around it where the key itself is missing."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return self.name

    def override(self, path: KeyPath, text: str, place: str) -> None:
        """Sets the key at `path` to the YAML value `text`; null takes a whole section away."""
        value = self._read(text, place, path)
        if len(path) == 1 and value is None:
            self.tree.pop(path[0], None)
            return
        parent = self.tree
        for depth, name in enumerate(path[:-1], start=1):
            if parent.get(name) is None:
                parent[name] = {}
            parent = parent[name]
            if not isinstance(parent, dict):
                return self._problem("is a value, not a mapping of keys", place, path[:depth], value=parent)
        parent[path[-1]] = value
        self.places = {known: at for known, at in self.places.items() if known[: len(path)] != path}
        self.places[path] = place

    def _read(self, text: str, name: str, path: KeyPath = ()) -> object:
        """Returns the plain data of `text`, the value at `path` of the recipe; places of a whole file have lines."""

        def place(mark: yaml.Mark) -> str:
            return name if path else f"{name}:{mark.line + 1}"

        try:
            root = yaml.compose(text, Loader=_Composer)
        except (yaml.YAMLError, ValueError, OverflowError) as error:  # the latter on escapes such as "\UFFFFFFFF"
            mark = getattr(error, "problem_mark", None)
            reason = getattr(error, "problem", None) or str(error).splitlines()[0]
            fix = "quote text that holds `: `, `#`, `[` or `{`; indent with spaces"
            self._problem(f"cannot be read as YAML: {reason}", place(mark) if mark else name, path, fix=fix)
            return None
        return None if root is None else self._plain(root, path, place)

    def _plain(self, node: yaml.Node, path: KeyPath, place: Callable[[yaml.Mark], str]) -> object:
        """Returns the node as plain data, and notes the place of every key and every problem on the way."""
        here = place(node.start_mark)
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self._plain(item, (*path, str(i)), place) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and kind in (*_CORE_SCHEMA, "str"):
            try:
                return _scalar(kind, node.value)
            except ValueError as error:
                return self._problem(f"cannot be read as {kind}: {error}", here, path)
        if not isinstance(node, yaml.MappingNode) or kind != "map":
            fix = "a recipe holds plain values only"
            return self._problem(f"has the YAML tag {node.tag!r}", here, path, fix=fix)

        result: dict[str, object] = {}
        for key_node, value_node in node.value:
            name, here = key_node.value, place(key_node.start_mark)
            if key_node.tag != "tag:yaml.org,2002:str" or not name.isprintable():
                self._problem("a key must be a plain word", here, path, value=name)
                continue
            below = (*path, name)
            value = self._plain(value_node, below, place)
            if name in result:
                fix = f"keep one; the other is at {self.places[below]}"
                self._problem("is given twice", here, below, value=value, fix=fix)
                continue
            result[name] = value
            self.places[below] = here
        return result

    def _problem(self, what: str, where: str, path: KeyPath, **details: Any) -> None:
        self.problems.append(PacktrainError(what, where=where, key=".".join(path) or None, **details))
