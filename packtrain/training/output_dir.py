"""The directory of a run: made before anything is loaded, and cleared of an earlier run only when that is asked for."""

from __future__ import annotations

import shutil
import tempfile
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


def refuse_to_replace(output_dir: Path) -> None:
    """Raises PacktrainError where there is a finished run, or one with checkpoints."""
    finished = (output_dir / "summary.json").exists()
    if finished or any(map(is_sealed, output_dir.glob("checkpoint-*"))):
        what = "contains a finished run" if finished else "contains the checkpoints of a run"
        fix = "continue it with --resume, replace it with --overwrite, or choose another training.output_dir"
        raise PacktrainError(what, key="training.output_dir", value=str(output_dir), fix=fix)


def clear(output_dir: Path, *, overwrite: bool) -> None:
    """Removes the records of an earlier run and, to overwrite it, its checkpoints and model; nothing else."""
    for name in RECORDS:
        (output_dir / name).unlink(missing_ok=True)
    for directory in (*filter(is_sealed, output_dir.glob("checkpoint-*")), output_dir / "model") if overwrite else ():
        shutil.rmtree(directory, ignore_errors=True)
