"""The results of an experiment on disk: what a run writes, and how it is read back.

    out/compare_quickstart/
      manifest.json              what was asked: recipes, versions, machine, git commit, seeds, command
      runs/00-balanced.jsonl     round 0 of a variant, one line per update (of all ranks together)
      summary.csv  summary.md  report.html  speed.svg

A run file has one JSON object per line, told apart by `kind`:

    {"kind": "update", "update": 1, "seconds": 0.21, ..., "loss": 6.24, "grad_norm": 1.7}
    {"kind": "held_out", "update": 10, "loss": 5.93, "loss_per_example": 5.90, ...}
    {"kind": "end", "status": "finished", "peak_memory": 812345344, ...}

It is written under another name and renamed when the run has ended, so a run file is there or it is not: an
interrupted experiment continues with the runs that have none.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TextIO

from packtrain.errors import PacktrainError

MANIFEST, RUNS = "manifest.json", "runs"
PICTURED_RANKS = 4
_KNOWN = ("name", "hash", "reference", "rounds", "variants", "warmup_steps", "measure_steps")  # of a manifest


@dataclass(frozen=True, kw_only=True)
class Update:
    """One optimizer update. Seconds are wall time, tokens are of all micro-batches of the update.

    `examples` and `flops` are None where a trainer's batches don't show where documents end. `waiting_seconds` is what the
    mean rank waits for the others (see `ranks`), None for one rank.
    """

    update: int
    seconds: float
    data_seconds: float
    forward_seconds: float
    backward_seconds: float
    optimizer_seconds: float
    micro_batches: int
    real_tokens: int
    computed_tokens: int
    supervised_tokens: int
    examples: int | None
    flops: float | None
    loss: float
    grad_norm: float | None
    waiting_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Loss on the held-out examples after `update` updates: mean over supervised tokens, and mean over examples of
    their means."""

    update: int
    loss: float
    loss_per_example: float
    tokens: int


@dataclass(frozen=True, kw_only=True)
class End:
    """How a run ended.

    Attributes:
        status: `finished` or `failed`, with the `reason`.
        peak_memory, memory_before: bytes at most during the run, and before its first update, of the rank with the
            most; None if it never began.
        memory_of: `device` or `process`.
        startup_seconds: from the start of the run to its first update, without importing libraries.
        attention: the implementation in force.
        trained_parameters, frozen_parameters: how many.
        planned_updates: what the whole run would have, to the end of its data.
        tokens_dropped: tokens of the training examples that the trainer's own preparation left out.
        device: name of the accelerator, or `cpu`.
        threads: that torch computed with on the CPU, in each rank.
        dtype: of the computation.
        layout: the micro-batches of the first update as they went through the model: width, and rows of
            document lengths.
        over_ranks: the same update as the plan would deal it to `PICTURED_RANKS` ranks: for every micro-step the
            tokens of the fullest rank as width, and a row of document lengths for each rank.
    """

    status: str
    reason: str | None = None
    peak_memory: int | None = None
    memory_before: int | None = None
    memory_of: str | None = None
    startup_seconds: float | None = None
    attention: str | None = None
    trained_parameters: int | None = None
    frozen_parameters: int | None = None
    planned_updates: int | None = None
    tokens_dropped: int | None = None
    device: str | None = None
    threads: int | None = None
    dtype: str | None = None
    layout: list[dict[str, Any]] | None = None
    over_ranks: list[dict[str, Any]] | None = None


KINDS: dict[str, type] = {"update": Update, "held_out": HeldOut, "end": End}
Record = Update | HeldOut | End


@dataclass(frozen=True, kw_only=True)
class Run:
    """One variant in one round, as it was stored."""

    variant: str
    round: int
    updates: list[Update]
    held_out: list[HeldOut]
    end: End

    @property
    def failed(self) -> bool:
        return self.end.status != "finished"


# Runs


class RunWriter:
    """Writes a run line by line, and gives it its name when it has ended."""

    def __init__(self, path: Path):
        self.path = path
        self._part = _part_of(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = self._part.open("w", encoding="utf-8")

    def write(self, record: Record) -> None:
        kind = next(name for name, record_type in KINDS.items() if isinstance(record, record_type))
        self._file.write(json.dumps({"kind": kind, **asdict(record)}, separators=(",", ":")) + "\n")
        self._file.flush()

    def end(self, end: End) -> None:
        """Write the last line; from here on the run counts."""
        self.write(end)
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._part, self.path)


def add_end(path: Path, end: End) -> None:
    """End a run whose process died before it could, keeping the lines it wrote."""
    records = _complete_records(_part_of(path))
    writer = RunWriter(path)
    for record in records:
        writer.write(record)
    writer.end(end)


def updates_so_far(path: Path) -> list[Update]:
    """Read the updates of a run, also of one that is being written."""
    records = _complete_records(path if path.exists() else _part_of(path))
    return [record for record in records if isinstance(record, Update)]


def _complete_records(file: Path) -> list[Record]:
    """Read a run's file up to the first line that is not complete; nothing where there is no file."""
    records: list[Record] = []
    for line in file.read_bytes().splitlines() if file.exists() else []:
        try:
            records.append(_parse(json.loads(line)))
        except (ValueError, KeyError, TypeError):
            break  # the line that is being written, or in which its process died
    return records


def _part_of(path: Path) -> Path:
    return path.with_suffix(".part")


def read_runs(directory: Path, manifest: Mapping[str, Any]) -> list[Run]:
    """Read every run there is, by round and then in the order of the variants."""
    runs = []
    for round in range(len(manifest["rounds"])):
        for variant in manifest["variants"]:
            path = run_path(directory, round, variant["name"])
            if path.exists():
                runs.append(read_run(path, round=round, variant=variant["name"]))
    return runs


def read_run(path: Path, *, round: int, variant: str) -> Run:
    """Read a run's file.

    Raises:
        PacktrainError: the file is damaged.
    """
    records: dict[str, list] = {kind: [] for kind in KINDS}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            data = json.loads(line)
            records[data["kind"]].append(_parse(data))
        except (ValueError, KeyError, TypeError) as error:
            fix = "delete this file and run the comparison again: the other runs are kept"
            raise PacktrainError(f"is not a run's record: {error}", where=f"{path}:{number}", fix=fix) from None
    if not records["end"]:
        raise PacktrainError(
            "is incomplete: it has no end record", where=str(path), fix="delete it and run the comparison again"
        )
    return Run(
        variant=variant,
        round=round,
        updates=records["update"],
        held_out=records["held_out"],
        end=records["end"][-1],
    )


def _parse(data: dict[str, Any]) -> Record:
    """Makes a record of a line; raises KeyError or TypeError where its kind, keys or figures are not a record's."""
    record: Record = KINDS[data["kind"]](**{key: value for key, value in data.items() if key != "kind"})
    for field in () if isinstance(record, End) else fields(record):
        value = getattr(record, field.name)
        missing = value is None and "None" in str(field.type)
        if not missing and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise TypeError(f"`{field.name}` is no number: {value!r}")
    return record


def run_path(directory: Path, round: int, variant: str) -> Path:
    """Name the file of a run: `runs/00-trl-padding.jsonl`."""
    return directory / RUNS / f"{round:02d}-{slug(variant)}.jsonl"


def log_path(path: Path, rank: int | None = None) -> Path:
    """Name the file of what a run prints, or of what one of its ranks does: `runs/00-balanced.rank1.log`."""
    return path.with_suffix(".log" if rank is None else f".rank{rank}.log")


def remove_logs(path: Path) -> None:
    """Remove what a run and its ranks have printed."""
    for log in (log_path(path), *path.parent.glob(f"{path.stem}.rank*.log")):
        log.unlink(missing_ok=True)


def slug(name: str) -> str:
    """Make a variant's name part of a file name: `trl:padding` -> `trl-padding`."""
    return re.sub(r"[^A-Za-z0-9_.+]+", "-", name).strip("-")


def remove_runs(directory: Path) -> None:
    """Remove the manifest and the runs of an experiment, and nothing else."""
    for pattern in (MANIFEST, f"{RUNS}/*.jsonl", f"{RUNS}/*.part", f"{RUNS}/*.log"):
        for path in directory.glob(pattern):
            path.unlink()


# The manifest, and files in one piece


def write_manifest(directory: Path, manifest: Mapping[str, Any]) -> None:
    write_atomically(directory / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read the manifest in an experiment's directory.

    Raises:
        PacktrainError: there is no experiment.
    """
    path, fix = directory / MANIFEST, "name a directory that `packtrain compare` wrote"
    if not path.exists():
        what = f"contains no comparison: it has no {MANIFEST}" if directory.is_dir() else "there is no such directory"
        raise PacktrainError(what, where=str(directory), fix=fix)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if missing := [key for key in _KNOWN if key not in manifest]:
            raise ValueError(f"{MANIFEST} has no {', '.join(missing)}")
    except (OSError, ValueError, TypeError) as error:
        raise PacktrainError(f"contains no comparison: {error}", where=str(directory), fix=fix) from None
    return manifest


def write_atomically(path: Path, text: str) -> None:
    """Write all of `text` or nothing.

    Raises:
        PacktrainError: it can't be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        fix = "name a file in a directory with free space"
        raise PacktrainError(f"cannot be written: {error.strerror}", where=str(path), fix=fix) from None
