"""Rows -> tokenised documents on disk, each row once, by `datasets.map` in as many processes as asked for.

The dataset that is mapped holds row numbers only; every process reads and parses its own rows. The result goes
to packtrain's own cache (see `cache`), under a fingerprint of all that decides it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from packtrain.data import cache
from packtrain.data.encoding import Encoder, notes_of
from packtrain.data.formats import FORMATS, OPTIONAL_COLUMNS, find_format
from packtrain.data.sources import Rows
from packtrain.data.tokens import Documents, ListColumn

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
    num_proc: int | None = None,
    cache_dir: str | Path | None = None,
) -> Documents:
    """One document per row, from the cache where they are there; arguments as for `build_examples`.

    Raises:
        DataError: columns, options and tokenizer don't go together. Bad rows are in `problems`.
    """
    format, also = find_format(rows.columns, format)
    encoder = Encoder(
        tokenizer,
        format,
        completion_only=completion_only_loss,
        assistant_only=assistant_only_loss,
    )
    fingerprint = cache.hash_of(
        cache.STORE_VERSION,
        rows.fingerprint,
        cache.tokenizer_fingerprint(tokenizer),
        format,
        encoder.completion_only,
        encoder.assistant_only,
    )
    found = cache.find_store(fingerprint, cache_dir)
    if found is not None:
        return found
    with cache.staging(cache_dir) as directory, cache.one_builder(fingerprint, cache_dir):
        found = cache.find_store(fingerprint, cache_dir)  # built by another rank while this one waited
        if found is not None:
            return found
        table = _map(rows, encoder, directory, num_proc)
        np.save(directory / "lengths.npy", ListColumn("input_ids", table["input_ids"]).lengths())
        np.save(directory / "supervised.npy", table["supervised"].to_numpy())
        bad = np.flatnonzero(table["problem"].is_valid().to_numpy()).tolist()
        facts = {
            "fingerprint": fingerprint,
            "format": format,
            "problems": [(row, table["problem"][row].as_py()) for row in bad],
            "notes": _notes(rows, format, also) + notes_of(table["flags"].to_numpy(), tokenizer),
        }
        return cache.publish(directory, facts, cache_dir)


def encode_batch(batch: dict[str, list[int]], *, rows: Rows, encoder: Encoder) -> pa.Table:
    """What worker processes run: rows `batch["row"]`, which follow one another, as a table of tokens."""
    return encoder(rows.read(batch["row"][0], batch["row"][-1] + 1))


def _map(rows: Rows, encoder: Encoder, directory: Path, num_proc: int | None) -> pa.Table:
    """Tokenise all rows into `directory/tokens*.arrow` and return the table, one row per row."""
    import datasets
    import pyarrow as pa

    schema = encoder([]).schema
    processes = min(num_proc or 1, -(-len(rows) // _BATCH))
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
        new_fingerprint=directory.name.strip("."),  # theirs would hash all rows and the tokenizer
        desc="Tokenizing",
    )
    files = [file["filename"] for file in mapped.cache_files]
    return pa.concat_tables(pa.ipc.open_stream(pa.memory_map(file)).read_all() for file in files)


def _notes(rows: Rows, format: str, also: Sequence[str]) -> list[str]:
    notes = []
    if also:
        notes.append(f"the columns also fit the format {' and '.join(also)}; `data.format` chooses")
    used = set(FORMATS[format].columns + OPTIONAL_COLUMNS.get(format, ()))
    unused = [column for column in rows.columns if column not in used]
    if unused:
        notes.append(f"columns not used: {', '.join(unused)}")
    return notes
