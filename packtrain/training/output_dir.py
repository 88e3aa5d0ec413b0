"""The directory of a run: made before anything is loaded, and cleared of an earlier run only when that is asked for."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from packtrain.errors import PacktrainError
from packtrain.recipe.recipe import Recipe
from packtrain.training.engine import STATE_FILE
from packtrain.training.guards.nonfinite import FILE as UPDATES_FILE
from packtrain.training.samples import FILE as SAMPLES_FILE
from packtrain.training.sealing import is_sealed

RECORDS = ("summary.json", STATE_FILE, UPDATES_FILE, SAMPLES_FILE, "recipe.yaml")  # of a run, in its output_dir


def make_output_dir(recipe: Recipe) -> Path:
    """Makes the run's directory, before anything is loaded for it."""
    path = Path(recipe.training["output_dir"])
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        what, fix = f"is not a writable directory: {error.strerror}", "choose a directory on a drive with free space"
        raise PacktrainError(what, key="training.output_dir", value=str(path), fix=fix) from None
    for name in ("model", *RECORDS):
        if (path / name).is_symlink():
            what, fix = (
                "is a link, through which the run would write",
                "remove it, or choose another training.output_dir",
            )
            raise PacktrainError(what, where=str(path / name), key="training.output_dir", fix=fix)
    return path


@contextmanager
def explaining_a_full_drive(output_dir: Path) -> Iterator[None]:
    """Around a run: a drive that has filled up, wherever that is noticed, is an error that says how to go on.

    Raises:
        PacktrainError: no space, or no quota, was left for a file. safetensors has no `errno` and only says so.
    """
    try:
        yield
    except PacktrainError:
        raise
    except Exception as error:
        codes = (errno.ENOSPC, errno.EDQUOT)
        if getattr(error, "errno", None) not in codes and not any(os.strerror(code) in str(error) for code in codes):
            raise
        where = str(getattr(error, "filename", None) or output_dir)
        fix = (
            "make room and use resume=True, which goes on from the newest checkpoint; where there is none, train again"
        )
        raise PacktrainError(f"can't be written, the drive is full: {error}", where=where, fix=fix) from error


def refuse_to_replace(output_dir: Path) -> None:
    """Raises PacktrainError where there is a finished run, or one with checkpoints."""
    finished = (output_dir / "summary.json").exists()
    resumable = any(map(is_sealed, output_dir.glob("checkpoint-*")))
    if finished or resumable:
        what = "contains a finished run" if finished else "contains the checkpoints of a run"
        what += "" if resumable else ", which has kept no checkpoint to continue from"
        fix = "replace it with overwrite=True, or choose another training.output_dir"
        fix = f"continue it with resume=True, {fix}" if resumable else fix
        raise PacktrainError(what, key="training.output_dir", value=str(output_dir), fix=fix)


def clear(output_dir: Path, *, overwrite: bool) -> None:
    """Removes the records of an earlier run and, to overwrite it, its checkpoints and model; nothing else."""
    for name in RECORDS:
        (output_dir / name).unlink(missing_ok=True)
    for directory in (*filter(is_sealed, output_dir.glob("checkpoint-*")), output_dir / "model") if overwrite else ():
        shutil.rmtree(directory, ignore_errors=True)
