"""Rows -> tokenised documents on disk, each row once: token ids, and which of them are learnt.

`tokenize` maps rows through an `Encoder` by `datasets.map`, in as many processes as asked for. The dataset that is mapped
holds row numbers only; every process reads and parses its own rows. The result goes to packtrain's own cache (see
`packtrain.data.store`), under a fingerprint of all that decides it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from packtrain.data import store
from packtrain.data.encoder import Encoder, count_flags, notes_of, prompts_of
from packtrain.data.formats import FORMATS, Kind, Reading, find_format, rename_columns
from packtrain.data.report import ALL_TURNS
from packtrain.data.sources import Rows
from packtrain.data.tokens import Documents, ListColumn, hash_table
from packtrain.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase


_BATCH = 1000  # rows tokenised in one call, and of one Arrow record batch


def tokenize(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    format: str = "auto",
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    on_lost_content: str = "error",
    columns: Mapping[str, str | None] | None = None,
    roles: Mapping[str, str] | None = None,
    kind: Kind = "example",
    num_proc: int | None = None,
    cache_dir: str | Path | None = None,
) -> Documents:
    """Makes one document per row, or finds them in the cache; arguments as for `build_examples`.

    Raises:
        DataError: columns, options and tokenizer don't go together. Bad rows are in `problems`.
    """
    encoder, notes = make_encoder(
        rows.columns,
        tokenizer,
        format=format,
        completion_only_loss=completion_only_loss,
        assistant_only_loss=assistant_only_loss,
        on_lost_content=on_lost_content,
        columns=columns,
        roles=roles,
        kind=kind,
    )
    fingerprint = store.hash_of(
        store.STORE_VERSION,
        rows.fingerprint,
        store.tokenizer_fingerprint(tokenizer),
        encoder.format,
        encoder.completion_only,
        encoder.assistant_only,
        on_lost_content,
        encoder.reading.columns,
        encoder.reading.roles,
        kind,
    )
    found = store.find_store(fingerprint, cache_dir)
    if found is not None:
        return found
    with store.staging(cache_dir) as directory, store.one_builder(fingerprint, cache_dir):
        found = store.find_store(fingerprint, cache_dir)  # built by another rank while this one waited
        if found is not None:
            return found
        table = _map(rows, encoder, directory, num_proc)
        if (
            changed := rows.changed()
        ) is not None:  # else other rows would be stored as those of the file that was opened
            what, fix = "changed while its rows were tokenised", "start again when nothing writes to it any more"
            raise DataError(what, where=changed, key="data.path", fix=fix)
        np.save(directory / "lengths.npy", ListColumn("input_ids", table["input_ids"]).lengths())
        np.save(directory / "supervised.npy", table["supervised"].to_numpy())
        flags = table["flags"].to_numpy()
        facts = {
            "fingerprint": fingerprint,
            "format": encoder.format,
            "contents": hash_table(table),
            "prompts": prompts_of(flags[table["problem"].is_null().to_numpy()], encoder.format),
            "problems": problems_of(table),
            "notes": [
                *rows.skipped,
                *notes,
                *notes_of(count_flags(flags), tokenizer),
                *notes_of_remarks(count_remarks(table["remarks"], rows.where)),
            ],
        }
        return replace(store.publish(directory, facts, cache_dir), found=False)


def make_encoder(
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    format: str = "auto",
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    on_lost_content: str = "error",
    columns: Mapping[str, str | None] | None = None,
    roles: Mapping[str, str] | None = None,
    kind: Kind = "example",
) -> tuple[Encoder, list[str]]:
    """Makes the encoder of rows with these columns, and what the report says of it; arguments as for `build_examples`.

    Raises:
        DataError: columns, options and tokenizer don't go together.
    """
    reading = Reading(has_template=bool(tokenizer.chat_template), roles=roles or {}, columns=columns or {})
    names = rename_columns(names, reading.columns)
    format, also = find_format(names, format, kind=kind)
    encoder = Encoder(
        tokenizer,
        format,
        completion_only=completion_only_loss,
        assistant_only=assistant_only_loss,
        on_lost_content=on_lost_content,
        reading=reading,
        kind=kind,
    )
    all_turns = FORMATS[format].completion_only is False and encoder.learns_all_turns
    return encoder, [*_notes(names, format, also), *([ALL_TURNS] if all_turns else [])]


def problems_of(table: pa.Table) -> list[tuple[int, str]]:
    """Returns (row, reason) of every bad row of an encoder's table."""
    return [(row, table["problem"][row].as_py()) for row in np.flatnonzero(table["problem"].is_valid()).tolist()]


def encode_batch(batch: dict[str, list[int]], *, rows: Rows, encoder: Encoder) -> pa.Table:
    """Tokenises rows `batch["row"]`, which follow one another; worker processes run it."""
    first, last = batch["row"][0], batch["row"][-1]
    return encoder(rows.read(first, last + 1), lambda number: rows.where(first + number))


def _map(rows: Rows, encoder: Encoder, directory: Path, num_proc: int | None) -> pa.Table:
    """Tokenises all rows into `directory/tokens*.arrow` and returns the table, one row per row."""
    import datasets
    import pyarrow as pa

    schema = encoder([]).schema
    processes = min(num_proc or 1, -(-len(rows) // _BATCH))
    try:
        mapped = datasets.Dataset.from_dict({"row": np.arange(len(rows))}).map(
            encode_batch,
            batched=True,
            batch_size=_BATCH,
            fn_kwargs={"rows": rows, "encoder": encoder},
            remove_columns=["row"],
            features=datasets.Features.from_arrow_schema(schema),
            num_proc=processes if processes > 1 else None,
            cache_file_name=str(directory / "tokens.arrow"),
            load_from_cache_file=False,
            new_fingerprint=directory.name.strip("."),  # that of `datasets` would hash all rows and the tokenizer
            desc="Tokenizing",
        )
    except RuntimeError as error:
        if processes == 1 or "abruptly died" not in str(error):
            raise
        what = f"one of {processes} processes that tokenise was killed, as the system does when memory runs out"
        raise DataError(what, key="data.num_proc", value=num_proc, fix="lower it, or free memory") from error
    files = [file["filename"] for file in mapped.cache_files]
    return pa.concat_tables(pa.ipc.open_stream(pa.memory_map(file)).read_all() for file in files)


def _notes(columns: Sequence[str], format: str, also: Sequence[str]) -> list[str]:
    notes = []
    if also:
        notes.append(f"the columns also fit the format {' and '.join(also)}; `data.format` chooses")
    used = {*FORMATS[format].columns, *FORMATS[format].optional}
    if unused := [column for column in columns if column not in used]:
        index = {name: f"{name} (pandas' index)" for name in ("Unnamed: 0", "__index_level_0__")}
        notes.append(f"columns not used: {', '.join(index.get(name, name) for name in unused)}")
    return notes


Remarks = dict[str, tuple[int, str]]  # what was said of rows -> of how many, and the first of them


def count_remarks(column: pa.ChunkedArray, where: Callable[[int], str], before: Remarks | None = None) -> Remarks:
    """Counts what was said of rows, on top of what was said before."""
    counts = dict(before or {})
    for row in np.flatnonzero(column.is_valid()).tolist():
        for remark in column[row].as_py().split("\n"):
            count, first = counts.get(remark, (0, ""))
            counts[remark] = count + 1, first or where(row)
    return counts


def notes_of_remarks(remarks: Remarks) -> list[str]:
    """Puts what `count_remarks` has counted into words, the most frequent first."""
    return [
        f"{remark}: {count:,} row{'s' if count > 1 else ''} (the first is {first})"
        for remark, (count, first) in sorted(remarks.items(), key=lambda item: -item[1][0])
    ]
