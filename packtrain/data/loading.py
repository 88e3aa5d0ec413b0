"""A recipe's `data:` -> examples to train and to evaluate on, of one source or of a mixture.

    rows = open_section(data, seed=42)
    train, held_out = prepare_examples(data, rows, tokenizer, seed=42)
    train, held_out = stream_examples(data, open_source(data, seed=42), tokenizer, seed=42, examples_per_step=64)
    train, why = find_examples(data, key, seed=42)      # the same without rows and tokenizer, if they were loaded before

Every source of a mixture is tokenised and cached by itself, so that changing a weight tokenises nothing.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from packtrain.data import store
from packtrain.data.blocks import Blocks
from packtrain.data.encoding import make_encoder
from packtrain.data.examples import CHOICES, TOKENS, Examples, build_examples, request_of
from packtrain.data.files import find_places, is_local
from packtrain.data.formats import FORMATS, Kind, Reading, find_format, rename_columns
from packtrain.data.mixture import mix, sections_of
from packtrain.data.pruning import prune
from packtrain.data.report import join_row_errors
from packtrain.data.selection import select
from packtrain.data.sources import (
    CORPUS_ROWS,
    LOOKED_AT,
    Rows,
    describe_request,
    open_rows,
    refuse_unreadable,
    texts,
)
from packtrain.data.streamed_examples import StreamedExamples
from packtrain.data.streams import Source, open_stream
from packtrain.errors import DataError, RowsError
from packtrain.recipe.sections import BUFFER_SIZE, DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def open_section(section: DataSection, *, seed: int) -> Rows:
    """Opens the rows of a recipe's `data:`; of a mixture the rows of all sources, each in `Rows.parts`.

    Raises:
        DataError: as `open_rows`.
    """
    if section.mixture is None:
        return open_rows(section.paths, **_place(section, seed))
    parts = []
    for number, own in enumerate(sections_of(section)):
        with _of_source(number):
            parts.append(open_rows(own.paths, **_place(own, seed)))
    return Rows.join(parts)


def section_texts(section: DataSection, rows: Rows, *, kind: Kind = "example") -> Iterator[str]:
    """Yields the texts of the rows of `open_section`, each source in its own format, to train a tokenizer on."""
    for number, (own, part) in enumerate(zip(_sections(section), rows.parts, strict=True)):
        with _of_source(number if section.mixture else None):
            yield from texts(part, own.format, _reading(own), kind=kind)


def _reading(section: DataSection) -> Reading:
    return Reading(roles=section.roles or {}, columns=section.columns or {})


def prepare_examples(
    section: DataSection,
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    completions_only: bool = False,
    kind: Kind = "example",
    tokenizer_key: str | None = None,
) -> tuple[Examples, Examples | None]:
    """Tokenises a recipe's rows, or finds them tokenised, holds rows out, mixes or prunes: (training, held out or None).

    Args:
        section: the recipe's `data:`.
        rows: of `open_section`.
        seed: of the rows that are held out, and of the examples that a mixture or a random pruning chooses.
        completions_only: learn completions only wherever rows have any, unless the section says otherwise.
        kind: of the rows, see `packtrain.data.formats.KINDS`.
        tokenizer_key: how `find_examples` will name this tokenizer, see `store.tokenizer_key`.

    Raises:
        DataError: with file and row, or key and value, and the fix.
    """
    # First: what is wrong with it is said before rows are tokenised.
    evaluation = _open_evaluation(section, seed) if section.eval_path or section.eval_split else None
    key = tokenizer_key and _key_of_sources(section, tokenizer_key, seed)
    parts, evaluated, refused = [], None, []  # the rows that are wrong are listed once, those of all sources
    for number, (own, these) in enumerate(zip(_sections(section), rows.parts, strict=True)):
        with _of_source(number if section.mixture else None), _collect(refused):
            parts.append(_build(own, these, tokenizer, completions_only, kind, key))
    if evaluation is not None:
        with _collect(refused):
            evaluated = _build(section, evaluation, tokenizer, completions_only, kind, tokenizer_key)
    if refused:
        raise join_row_errors(refused)
    train, held_out = _arrange(section, parts, seed)
    return train, held_out if evaluation is None else evaluated


def open_source(section: DataSection, *, seed: int) -> Source:
    """Opens the rows of a recipe's `data:` to be streamed.

    Raises:
        DataError: as `open_rows`, and for files that can't be read in order.
    """
    return open_stream(section.paths, **_place(section, seed))


def source_texts(section: DataSection, source: Source, *, kind: Kind = "example") -> Iterator[str]:
    """Yields the texts of the first rows of a source, to train a tokenizer on: those that `section_texts` yields."""
    yield from texts(Rows([source.head(CORPUS_ROWS)]), section.format, _reading(section), kind=kind)


def stream_examples(
    section: DataSection,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    examples_per_step: int,
    completions_only: bool = False,
    kind: Kind = "example",
    tokenizer_key: str | None = None,
) -> tuple[StreamedExamples, Examples | None]:
    """Reads the first block of a recipe's streamed rows, and the rows to evaluate on: (training, held out or None).

    Args:
        source: of `open_source`.
        examples_per_step: of an update; a block is whole updates.
        seed, completions_only, kind, tokenizer_key: as `prepare_examples`.

    Raises:
        DataError: with file and row, or key and value, and the fix.
    """
    evaluation = _open_evaluation(section, seed) if section.eval_path or section.eval_split else None
    first = Rows([source.head(LOOKED_AT)])
    refuse_unreadable(first, section.shown)
    encoder, notes = make_encoder(
        first.columns,
        tokenizer,
        completion_only_loss=_completion_only(section, first, completions_only, kind),
        kind=kind,
        **section.model_dump(include=TOKENS - {"completion_only_loss"}),
    )
    blocks = Blocks(
        source,
        encoder,
        notes=notes,
        buffer_size=section.buffer_size or BUFFER_SIZE,
        examples_per_step=examples_per_step,
        **section.model_dump(include=CHOICES - TOKENS),
    )
    train, held_out = StreamedExamples(blocks, section.max_length), None
    if evaluation is not None:
        held_out = _build(section, evaluation, tokenizer, completions_only, kind, tokenizer_key)
    return train, held_out


def _build(
    section: DataSection,
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    completions_only: bool,
    kind: Kind,
    tokenizer_key: str | None,
) -> Examples:
    return build_examples(
        rows,
        tokenizer,
        completion_only_loss=_completion_only(section, rows, completions_only, kind),
        kind=kind,
        num_proc=section.num_proc,
        tokenizer_key=tokenizer_key,
        **section.model_dump(include=CHOICES - {"completion_only_loss"}),
    )


def _open_evaluation(section: DataSection, seed: int) -> Rows:
    path, split = section.eval_path or section.paths, section.eval_split or section.split
    paths = [path] if isinstance(path, str) else path
    local = section.eval_path and all(map(is_local, paths))
    try:
        return open_rows(path, name=None if local else section.name, split=split, seed=seed)
    except DataError as error:
        for own, of_evaluation in (("data.path", section.eval_path), ("data.split", section.eval_split)):
            if error.key == own and of_evaluation:
                error.key = own.replace("data.", "data.eval_")
        raise


def find_examples(section: DataSection, tokenizer_key: str, *, seed: int) -> tuple[Examples | None, str]:
    """Finds a recipe's training examples (without those held out) as `prepare_examples` tokenised them before.

    Reads no rows and loads no tokenizer. Local files must have the size and time they had then; a Hub dataset is taken to
    be unchanged.

    Returns:
        The examples and "", or None and why there are none.

    Raises:
        DataError: as `prepare_examples`, for what can be known without tokenising.
    """
    key, parts, refused = _key_of_sources(section, tokenizer_key, seed), [], []
    for number, own in enumerate(_sections(section)):
        with _of_source(number if section.mixture else None), _collect(refused):
            found = _find(own, key, seed)
            if isinstance(found, str):
                return None, found
            parts.append(found)
    if refused:
        raise join_row_errors(refused)
    return _arrange(section, parts, seed)[0], ""


def _find(section: DataSection, tokenizer_key: str, seed: int) -> Examples | str:
    """Finds the examples of one source as tokenised before, or says why there are none."""
    places = find_places(section.paths, section.split)
    found = store.recall(
        request_of(
            describe_request(section.paths, **_place(section, seed)), tokenizer_key, section.model_dump(include=CHOICES)
        ),
        store.stat_files([file for place in places for file in place.files]),
    )
    if isinstance(found, str):
        return found
    documents, counts = found
    reopen = functools.cache(lambda: open_rows(section.paths, **_place(section, seed)))
    view, report = select(
        documents,
        max_length=section.max_length,
        overflow=section.overflow,
        on_bad_row=section.on_bad_row,
        where=lambda row: reopen().where(row),  # read only where a message has to name a row
    )
    not_read = tuple(each for place in places for each in place.not_read)
    notes = (*(note for place in places for note in place.notes), *report.notes)
    return Examples(documents, view, replace(report, files=counts, not_read=not_read, notes=notes))


def _arrange(section: DataSection, parts: list[Examples], seed: int) -> tuple[Examples, Examples | None]:
    """Holds rows out, and mixes or prunes: the examples of each source -> (training, held out or None)."""
    if section.mixture is not None:
        return mix(section, parts, seed=seed)
    (examples,) = parts
    train, held_out = examples.hold_out(section.eval_size, seed) if section.eval_size else (examples, None)
    return train if section.keep is None else prune(section.keep, train, seed=seed), held_out


def _sections(section: DataSection) -> list[DataSection]:
    """Returns the section of each source: this one alone, where there is no mixture."""
    return [section] if section.mixture is None else sections_of(section)


def _place(section: DataSection, seed: int) -> dict[str, Any]:
    """Returns the arguments of `open_rows` and `describe_request` next to the path."""
    return dict(name=section.name, split=section.split, num_rows=section.num_rows, seed=seed)


def _key_of_sources(section: DataSection, tokenizer_key: str, seed: int) -> str:
    """Returns the key of the tokenizer of a mixture, which may have been trained on the rows of all its sources."""
    if section.mixture is None:
        return tokenizer_key
    requests = [
        describe_request(own.paths, **_place(own, seed)) | {"format": own.format} for own in sections_of(section)
    ]
    return store.hash_of(tokenizer_key, requests)


@contextlib.contextmanager
def _collect(refused: list[RowsError]) -> Iterator[None]:
    """Keeps the rows that a source was refused for, so that those of the next can be listed with them."""
    try:
        yield
    except RowsError as error:
        refused.append(error)


@contextlib.contextmanager
def _of_source(number: int | None) -> Iterator[None]:
    """Names the source of a mixture, counted from 0, in the errors that its rows raise."""
    try:
        yield
    except DataError as error:
        section, _, name = (error.key or "").partition(".")
        if number is not None and section == "data" and name in ("path", "name", "split", "format", "num_rows"):
            error.key = f"data.mixture.{number}.{name}"
        raise


def _completion_only(section: DataSection, rows: Rows, completions_only: bool, kind: Kind) -> bool | None:
    """Returns `data.completion_only_loss`; unset, and where an objective wants completions only, True if rows have any.

    A causal model may learn the words of a user next to those of the assistant. For a diffusion model they are the
    prompt, which stands there in clear when it answers, so they are no part of the canvas.
    """
    if not completions_only or section.completion_only_loss is not None or section.assistant_only_loss:
        return section.completion_only_loss
    format, _ = find_format(rename_columns(rows.columns, section.columns or {}), section.format, kind=kind)
    return None if FORMATS[format].completion_only is None else True
