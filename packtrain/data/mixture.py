"""Mixtures: how many examples of each source an epoch has, and which.

    sources       a: 10 examples, weight 3       b: 30 examples, weight 1
    an epoch      40 examples, as many as there are: 30 of a, 10 of b
    of a          each three times
    of b          10 of the 30, chosen by the seed

An epoch has as many examples as the sources have together, whatever the weights: changing a weight changes no number of
updates, and weights in proportion to the sources read every example exactly once. Counts follow the weights by largest
remainders, in exact arithmetic. A source smaller than its count is repeated, each example as often as any other or once
more; of a larger one some are chosen. Both choices are the seed's, and the same in every epoch, so a mixture is an
ordinary set of examples to a plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np

from packtrain.data.examples import Examples
from packtrain.data.report import Share, merge_reports
from packtrain.errors import DataError
from packtrain.recipe.sections import DataSection

_MIXED = 0x6D697864  # "mixd": keeps this draw apart from others of the same seed


def sections_of(section: DataSection) -> list[DataSection]:
    """Returns a section for each source of the mixture: `data:` as it would stand for that source alone."""
    alone = {"mixture": None, "eval_size": 0, "eval_path": None, "eval_split": None}
    return [
        section.model_copy(
            update=alone
            | {
                "path": [source.path] if isinstance(source.path, str) else source.path,  # named in full in messages
                "name": source.name,
                "split": source.split or section.split,
                "format": source.format or section.format,
                "columns": section.columns if source.columns is None else source.columns,
                "roles": section.roles if source.roles is None else source.roles,
                "num_rows": source.num_rows,
            }
        )
        for source in section.sources
    ]


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Divides a whole number in proportion to weights, by largest remainders; of equal ones the first gets more.

    >>> apportion(10, [1, 1, 1]), apportion(10, [0.7, 0.2, 0.1])
    ([4, 3, 3], [7, 2, 1])
    """
    exact = [Fraction(str(weight)) for weight in weights]  # as it is written: 0.1 is a tenth
    shares = [total * weight / sum(exact) for weight in exact]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def draw(available: int, count: int, *, seed: int, source: int) -> np.ndarray:
    """Chooses `count` of a source's examples, int64 `[count]` in ascending order: each `count // available` times, and a
    seeded choice of them once more.

    Args:
        source: its number in the mixture.
    """
    often, more = divmod(count, available)
    chosen = np.random.default_rng([_MIXED, seed, source]).permutation(available)[:more]
    return np.sort(np.concatenate([np.tile(np.arange(available), often), chosen]))


def epoch_of(section: DataSection, available: Sequence[int], *, seed: int) -> list[np.ndarray]:
    """Chooses the examples of each source that make an epoch.

    Args:
        available: examples of each source that there are to train on.

    Raises:
        DataError: a weight so small that its source gets no example.
    """
    counts = apportion(sum(available), [source.weight for source in section.sources])
    for number, (source, count) in enumerate(zip(section.sources, counts, strict=True)):
        if not count:
            what = f"gives this source none of the {sum(available):,} examples of an epoch"
            fix = "raise it, or leave the source out"
            raise DataError(what, key=f"data.mixture.{number}.weight", value=source.weight, fix=fix)
    return [
        draw(size, count, seed=seed, source=number)
        for number, (size, count) in enumerate(zip(available, counts, strict=True))
    ]


def held_out_counts(section: DataSection, rows: Sequence[int]) -> list[int]:
    """Divides `data.eval_size` among the sources: a share of the rows of each, or a number by the weights.

    Args:
        rows: of each source, those with examples.

    Raises:
        DataError: that is no row of any source.
    """
    if section.eval_size < 1:
        counts = [round(section.eval_size * count) for count in rows]
    else:
        counts = apportion(int(section.eval_size), [source.weight for source in section.sources])
    if not any(counts):
        what = f"holds out none of {sum(rows):,} rows"
        raise DataError(what, key="data.eval_size", value=section.eval_size, fix="raise it")
    return counts


def mix(section: DataSection, parts: Sequence[Examples], *, seed: int) -> tuple[Examples, Examples | None]:
    """Makes an epoch of the examples of each source, after rows were held out: (training, held out or None).

    Raises:
        DataError: a source that gets no example, or more rows to hold out than there are.
    """
    names = [_shown(source.path) for source in section.sources]
    report = merge_reports([(name, part.report) for name, part in zip(names, parts, strict=True)])
    rows, held_out = [part.report.rows for part in parts], None
    if section.eval_size:  # before rows are repeated: no row stands on both sides
        counts = held_out_counts(section, [len(np.unique(part.rows)) for part in parts])
        split = [_hold_out(*each, seed) for each in zip(names, parts, counts, strict=True)]
        parts, kept = zip(*split, strict=True)
        held_out = Examples.join(kept, report)
    chosen = epoch_of(section, [len(part) for part in parts], seed=seed)
    epoch = [part.take(ids) for part, ids in zip(parts, chosen, strict=True)]
    weights = [source.weight for source in section.sources]
    shares = tuple(
        Share(
            path=name,
            weight=weight,
            share=weight / sum(weights),
            rows=count,
            held_out=len(kept[number]) if held_out is not None else 0,
            available=len(parts[number]),
            examples=len(taken),
            tokens=taken.report.tokens,
            supervised_tokens=taken.report.supervised_tokens,
        )
        for number, (name, weight, count, taken) in enumerate(zip(names, weights, rows, epoch, strict=True))
    )
    kept_rows = sum(part.report.held_out for part in parts)
    return Examples.join(epoch, replace(report, mixture=shares, held_out=kept_rows)), held_out


def _hold_out(name: str, part: Examples, count: int, seed: int) -> tuple[Examples, Examples]:
    try:
        return part.hold_out(count, seed) if count else (part, part.take(np.empty(0, dtype=np.int64)))
    except DataError as error:
        raise DataError(f"{name}: {error.what}", key=error.key, value=count, fix="lower it") from None


def _shown(path: str | Sequence[str]) -> str:
    return path if isinstance(path, str) else ", ".join(path)
