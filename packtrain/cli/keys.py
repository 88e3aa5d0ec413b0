"""`packtrain keys`: print every key of a recipe with its type, default and meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from packtrain.cli.options import complete_section
from packtrain.errors import PacktrainError


def keys(
    section: Annotated[
        str | None,
        typer.Argument(
            metavar="[SECTION]",
            help="Section to print: model, data, batching, objective, training or lora; compare: the keys of a comparison.",
            autocompletion=complete_section,
        ),
    ] = None,
    schema: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a JSON schema for editors to FILE instead.")
    ] = None,
) -> None:
    """Print every key of a recipe with its type, default and meaning.

    `training:` and `lora:` take any field of transformers.TrainingArguments and peft.LoraConfig; name the section to list
    them.
    """
    from packtrain.recipe import keys as recipe_keys
    from packtrain.recipe.fields import did_you_mean
    from packtrain.recipe.recipe import LIBRARY_SECTIONS, SECTIONS

    if schema is not None:
        try:
            schema.write_text(recipe_keys.schema_text(), encoding="utf-8")
        except OSError as error:
            what, fix = f"can't be written: {error.strerror}", "name a file in a folder that exists and can be written"
            raise PacktrainError(what, key="--schema", value=str(schema), fix=fix) from None
        Console().print(f"wrote {schema}", soft_wrap=True)
        return
    if section == "compare":
        Console().print(_keys_of_a_comparison())
        return
    if section is not None and section not in SECTIONS:
        near = did_you_mean(section, [*SECTIONS, "compare"])
        fix = f"did you mean {near}?" if near else f"the sections are {', '.join(SECTIONS)}, and compare"
        raise PacktrainError("is not a section", key="SECTION", value=section, fix=fix)
    console = Console()
    for name in [section] if section else [name for name in SECTIONS if name not in LIBRARY_SECTIONS]:
        owner = ""
        table = _table(name)
        for key in recipe_keys.keys_of(name):
            if name == "objective" and key.owner != owner:
                owner = key.owner
                table.add_section()
                table.add_row(f"name: {owner}", style="bold")
                continue
            default = "" if key.default is None else f" ({key.default})"
            table.add_row(f"  {key.name}" if name == "objective" else key.name, f"{key.type}{default}", key.text)
        console.print(table)
    if section is None:
        for name, library in LIBRARY_SECTIONS.items():
            console.print(f"{name}: any field of {library.rpartition('.')[2]}; `packtrain keys {name}` lists them")


def _keys_of_a_comparison() -> Table:
    from packtrain.compare.experiment import DEFAULTS, KEYS, MEANINGS
    from packtrain.recipe.fields import describe

    table = _table("a comparison")
    for key, kind in KEYS.items():
        default = f" ({DEFAULTS[key]})" if key in DEFAULTS else ""
        table.add_row(key, f"{describe(kind)}{default}", MEANINGS[key])
    return table


def _table(section: str) -> Table:
    table = Table(title=f"{section}:", title_justify="left", title_style="bold", box=None, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(style="cyan", max_width=34)
    table.add_column(overflow="fold")
    return table
