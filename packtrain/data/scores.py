"""Scores of training examples in a Parquet file, which says whose they are.

    row   source                 length   supervised   loss   perplexity   el2n
    0     train.jsonl, line 1       187          132   1.92         6.80   0.61
    1     train.jsonl, line 2       140           91   2.47        11.83   0.74

One line per training example, in their order. The metadata of the schema, under `packtrain`, hold the fingerprint of the
examples, so that scores of other rows, another tokenizer or another `max_length` are never taken for these.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from packtrain.data.examples import Examples
from packtrain.errors import DataError
from packtrain.recipe.sections import SCORES

_ABOUT = b"packtrain"  # key of the metadata
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class About:
    """What scores are of.

    Attributes:
        data: the fingerprint of the training examples.
        examples: how many there are.
        models: what gave them; of several, they are means.
    """

    data: str
    examples: int
    models: tuple[str, ...]


def check_target(path: Path) -> None:
    """Refuses to replace a file that holds no scores.

    Raises:
        DataError: there is one.
    """
    if path.is_dir() or (path.exists() and _about(path) is None):
        what = "is there already, and holds no scores: it would be replaced"
        raise DataError(what, key="--out", value=str(path), fix="name another file")


def write_scores(path: Path, examples: Examples, scores: Mapping[str, np.ndarray], about: About) -> None:
    """Writes scores, float64 `[n]` each, next to what is known of the examples. A reader sees all of the file or none.

    Raises:
        DataError: the file can't be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = examples.source
    columns: dict[str, pa.Array] = {
        "row": pa.array(examples.rows, pa.int64()),
        "source": pa.array(
            [None if source is None else source.where(row) for row in examples.rows.tolist()], pa.string()
        ),
        "length": pa.array(examples.lengths, pa.int32()),
        "supervised": pa.array(examples.supervised, pa.int32()),
        **{name: pa.array(values, pa.float64()) for name, values in scores.items()},
    }
    table = pa.table(columns, metadata={_ABOUT: json.dumps({"format": _FORMAT} | asdict(about))})
    aside = path.with_name(f"{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, aside)
        os.replace(aside, path)
    except OSError as error:
        fix = "choose a folder that can be written to, on a drive with free space"
        raise DataError(f"can't be written: {error.strerror}", key="--out", value=str(path), fix=fix) from None


def read_scores(path: Path, name: str, examples: Examples) -> np.ndarray:
    """Reads one score of these examples, float64 `[n]`.

    Raises:
        DataError: there is no such file or score, it is of other examples, or a value is not finite.
    """
    key, again = "data.keep.scores", "write it with `packtrain score RECIPE --out FILE`"
    if not path.is_file():
        raise DataError("there is no such file", key=key, value=str(path), fix=again)
    about = _about(path)
    if about is None:
        raise DataError("holds no scores of `packtrain score`", key=key, value=str(path), fix=again)
    if about.data != examples.fingerprint:
        what = (
            f"has the scores of {about.examples:,} other training examples, not of the {len(examples):,} of this recipe"
        )
        fix = "score these: rows, tokenizer, data.max_length and data.eval_size must be the same in both"
        raise DataError(what, key=key, value=str(path), fix=fix)
    import pyarrow.parquet as pq

    names = pq.read_schema(path).names
    if name not in names:
        known = ", ".join(each for each in SCORES if each in names) or "none"
        fix = f"choose from the scores that it has ({known}), or {again}"
        raise DataError(f"is no column of {path}", key="data.keep.by", value=name, fix=fix)
    values = pq.read_table(path, columns=[name])[name].to_numpy().astype(np.float64)
    if len(values) != len(examples):
        what = f"is damaged: it has {len(values):,} lines for {len(examples):,} examples"
        raise DataError(what, key=key, value=str(path), fix=again)
    if bad := int((~np.isfinite(values)).sum()):
        what = f"has {bad:,} values of `{name}` that are not finite, so that examples have no order"
        raise DataError(what, key=key, value=str(path), fix=f"{again}, of a model whose losses are finite")
    return values


def _about(path: Path) -> About | None:
    """Returns what the scores of a file are of; None where it holds none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        facts = json.loads((pq.read_schema(path).metadata or {})[_ABOUT])
        known = About(data=str(facts["data"]), examples=int(facts["examples"]), models=tuple(map(str, facts["models"])))
        return known if facts["format"] == _FORMAT else None
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError):  # no Parquet, or written by others
        return None
