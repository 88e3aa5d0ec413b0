"""`packtrain init`: write a commented recipe, and next to it the schema by which editors check and complete it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from packtrain.errors import PacktrainError


def init(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="The recipe is written to NAME.yaml.")] = "recipe",
) -> None:
    """Write a commented recipe, and the schema by which editors check and complete it."""
    from packtrain.recipe.keys import SCHEMA_FILE, schema_text
    from packtrain.recipe.shipped import SHARE

    target = Path(name if name.endswith((".yaml", ".yml")) else f"{name}.yaml")
    if target.exists():
        raise PacktrainError("exists already", key="NAME", value=str(target), fix="choose another name")
    text = (SHARE / "recipes" / "start.yaml").read_text(encoding="utf-8")
    try:
        target.write_text(text.replace("{file}", str(target)), encoding="utf-8", errors="backslashreplace")
        target.with_name(SCHEMA_FILE).write_text(schema_text(), encoding="utf-8")
    except OSError as error:
        fix = "choose a writable directory"
        raise PacktrainError(f"cannot be written: {error.strerror}", key="NAME", value=str(target), fix=fix) from None
    Console().print(f"wrote {target}: set `data.path` to your rows, then run `packtrain plan {target}`", soft_wrap=True)
