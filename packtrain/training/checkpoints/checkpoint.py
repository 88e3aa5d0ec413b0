"""Checkpoints that a killed run, a full drive or a flipped bit can't spoil.

Trainer writes `checkpoint-N`; `Checkpoints` gives it a manifest as the last thing (see `sealing`), and only then
removes older ones. `choose_checkpoint` takes the newest one whose manifest and bytes hold, says which it passed over
and why, and refuses one that is of another run:

    checkpoint-40 passed over: is damaged: optimizer.pt is missing
    resuming after step 30 from checkpoint-30
"""

from __future__ import annotations

import errno
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from packtrain.errors import CheckpointError, PacktrainError
from packtrain.recipe import Recipe
from packtrain.training.checkpoints.changes import changes, redacted
from packtrain.training.checkpoints.resharding import added_later, optimizer_steps
from packtrain.training.checkpoints.sealing import MANIFEST, UNFINISHED, begin, is_sealed, read_manifest, seal, verify
from packtrain.training.summary import package_versions

if TYPE_CHECKING:
    from packtrain.training.trainer import PackTrainer

logger = logging.getLogger(__name__)
FULL = 2**16  # bytes; a drive that has fewer is full
PREVIOUS = ".previous"  # of a checkpoint that is being written anew, until that is complete

Say = Callable[[str], None]


def facts_of(trainer: PackTrainer, recipe: Recipe | None) -> dict[str, Any]:
    """What identifies a run: written into manifests, and compared when one is resumed."""
    return {
        "recipe_hash": recipe and recipe.hash,
        "recipe": recipe and redacted(recipe.to_dict()),
        "plan_hash": trainer.plan.hash,
        "data_fingerprint": trainer.train_dataset.fingerprint,
    }


class Checkpoints(TrainerCallback):
    """Seals what Trainer has saved, then removes the oldest beyond `keep`.

    Args:
        trainer: on every rank; each process that Trainer lets save on its drive seals and removes there.
        recipe: what the run was asked for; None for one put together in Python.
        keep: sealed checkpoints to leave, at least one; None or 0 for all.
    """

    def __init__(self, trainer: PackTrainer, recipe: Recipe | None, keep: int | None):
        self.trainer, self.recipe, self.keep = trainer, recipe, keep
        self.saving: Path | None = None  # the directory that is being written
        self.chosen: Path | None = None  # by `choose_checkpoint`: verified, so it may be read
        self.begun = False  # all that the trainer is made of is there; what fails now is no setting
        self.reading = ExitStack()  # what holds until a checkpoint is read
        self._facts: dict[str, Any] | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """Of `facts_of`; the plan is hashed once."""
        if self._facts is None:
            self._facts = facts_of(self.trainer, self.recipe)
        return self._facts

    def admit(self, resume: str | bool) -> str:
        """The checkpoint to read, on every rank: what `choose_checkpoint` has chosen, or would choose.

        Harmless changes of the recipe are accepted here; the command line asks before it comes so far.

        Raises:
            CheckpointError: it is damaged, not ours, or of another run.
        """
        if resume is True or Path(resume) != self.chosen:
            resume = choose_checkpoint(self.trainer, resume, allow_changes=True, say=logger.warning)
        return str(resume)

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun = True
        self.reading.close()
        state.compute_steps(args, state.max_steps)  # a resumed state has those of the run that it is of

    def begin(self, directory: Path) -> None:
        """Before Trainer's first file: an empty, marked directory; what stands there already is moved aside."""
        self.saving = directory
        if self.trainer.args.should_save:
            if directory.is_symlink() or directory.exists():
                _make_room(directory)
            begin(directory)
        self.trainer.accelerator.wait_for_everyone()

    def on_save(self, args, state, control, **kwargs):
        """After Trainer's last file, on every rank."""
        directory = self.saving
        assert directory is not None, "Trainer saves a checkpoint through save_model"
        self.trainer.accelerator.wait_for_everyone()  # until every rank has written its files
        if args.should_save:
            about = {"step": state.global_step, "sealed_at": time.time_ns(), "world_size": args.world_size}
            about |= {"save_only_model": args.save_only_model}
            about |= {"skipped_updates": self.trainer.finite.skipped, "optimizer_steps": optimizer_steps(self.trainer)}
            seal(directory, about | self.facts | {"versions": package_versions()})
            self._remove_old(directory, best=state.best_model_checkpoint)
        self.trainer.accelerator.wait_for_everyone()
        self.saving = None

    def failed(self, error: Exception) -> CheckpointError | None:
        """An error that left training: if it broke a save, remove the half directory and tell what happened."""
        directory, self.saving = self.saving, None
        if directory is None:
            return None
        free = shutil.disk_usage(next(path for path in directory.parents if path.exists())).free
        full = free < FULL or getattr(error, "errno", None) == errno.ENOSPC  # torch's writer tells of positions only
        if self.trainer.args.should_save and (directory / UNFINISHED).exists():
            shutil.rmtree(directory, ignore_errors=True)
        fix = f"mend it ({free / 2**20:,.0f} MiB are free there) and go on with --resume; older checkpoints are intact"
        return CheckpointError(
            f"could not be saved: {'the drive is full: ' if full else ''}{error}", where=str(directory), fix=fix
        )

    def _remove_old(self, newest: Path, best: str | None) -> None:
        """Nothing but real directories beside `newest` that bear our manifest, or our mark of a save cut short."""
        for path in newest.parent.glob("checkpoint-*"):
            if path.is_symlink() or not (path / UNFINISHED).is_file():
                continue
            if (path / MANIFEST).exists():  # killed just after its manifest was written, or before it was taken away
                (path / UNFINISHED).unlink()
            else:
                shutil.rmtree(path)
        _remove(newest.with_name(newest.name + PREVIOUS))
        if not self.keep:
            return
        kept = {newest.name, *([Path(best).name] if best else [])}
        sealed = _sealed_in(newest.parent)  # newest first
        older = [path for path, _ in sealed if path.name not in kept]
        for path in older[max(self.keep - (len(sealed) - len(older)), 0) :]:
            _remove(path)


def choose_checkpoint(
    trainer: PackTrainer, resume: str | bool, *, allow_changes: bool = False, say: Say = print
) -> str | None:
    """The directory to resume from, verified and of this run, the same on all ranks; None to start afresh.

    Args:
        trainer: ready to train.
        resume: a checkpoint directory, True for the newest good one in `output_dir`, False for none.
        allow_changes: resume although the recipe differs, in keys that leave examples and updates alone.
        say: where rank 0 tells what it passed over, and what it took.

    Raises:
        CheckpointError: there is none, the one named is damaged, or it is of another run.
    """
    if resume is False:
        return None
    answer: list[Any] = [None]
    if trainer.is_world_process_zero():
        try:
            answer = [_choose(trainer, resume, allow_changes, say)]
        except PacktrainError as error:
            answer = [error]
    broadcast_object_list(answer)
    if isinstance(answer[0], PacktrainError):
        raise answer[0]
    trainer.checkpoints.chosen = Path(answer[0])
    return answer[0]


def find_last_checkpoint(output_dir: Path, say: Say = print) -> tuple[Path, dict[str, Any]]:
    """The checkpoint sealed last of those whose bytes hold, with its manifest; tells of those it passes over.

    Raises:
        CheckpointError: there is none.
    """
    passed = []
    for path in sorted(output_dir.glob("checkpoint-*")):
        try:
            if path.is_dir():
                read_manifest(path)
        except CheckpointError as error:
            passed.append(f"{path.name} passed over: {error.what}")
            say(passed[-1])
    for path, manifest in _sealed_in(output_dir):
        try:
            _verify(path, manifest)
            return path, manifest
        except CheckpointError as error:
            passed.append(f"{path.name} passed over: {error.what}")
            say(passed[-1])
    raise CheckpointError(
        "there is no checkpoint to resume from" + "".join(f"\n    {line}" for line in passed),
        key="training.output_dir",
        value=str(output_dir),
        fix="name a checkpoint directory, or start without --resume",
    )


def _choose(trainer: PackTrainer, resume: str | bool, allow_changes: bool, say: Say) -> str:
    if resume is True:
        path, manifest = find_last_checkpoint(Path(trainer.args.output_dir), say)
    else:
        path = Path(resume)
        manifest = read_manifest(path)
        _verify(path, manifest)
    found = changes(manifest, trainer.checkpoints.facts)
    if found:
        lines = "".join(f"\n    {change}" for change in found)
        if not all(change.safe for change in found):
            fix = "undo these changes, or start a new run from the saved model (model.model_name_or_path)"
            raise CheckpointError(f"is of another run:{lines}", where=str(path), fix=fix)
        if not allow_changes:
            raise CheckpointError(
                f"is of a run that was asked for otherwise:{lines}",
                where=str(path),
                fix="undo these changes, or accept them with --allow-changes",
            )
        say(f"resuming with changes:{lines}")
    say(f"resuming after step {manifest['step']} from {path.name}")
    return str(path)


def _verify(path: Path, manifest: Mapping[str, Any]) -> None:
    """Raises CheckpointError: it is damaged, or not enough to go on from."""
    if manifest.get("save_only_model"):
        fix = "start a new run from its weights (model.model_name_or_path); training.save_only_model: false keeps the rest"
        raise CheckpointError("has no optimizer state", where=str(path), fix=fix)
    verify(path, manifest, later=added_later(path))


def _sealed_in(output_dir: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Real directories of it that bear our manifest, whatever their names, the one sealed last first."""
    found = [path for path in output_dir.iterdir() if path.is_dir() and is_sealed(path)] if output_dir.is_dir() else []
    pairs = [(path, read_manifest(path)) for path in found]
    return sorted(pairs, key=lambda pair: (pair[1]["sealed_at"], pair[1]["step"]), reverse=True)


def _make_room(directory: Path) -> None:
    """Move what stands in the place of a new checkpoint aside; what a save of ours left half-written is removed."""
    if not directory.is_symlink() and (directory / UNFINISHED).is_file() and not (directory / MANIFEST).exists():
        shutil.rmtree(directory)
        return
    aside = directory.with_name(directory.name + PREVIOUS)
    if is_sealed(directory):
        _remove(aside)
    else:
        aside = directory.with_name(f"{directory.name}.foreign-{time.time_ns()}")
        logger.warning("%s bears no manifest of packtrain; moved to %s", directory, aside.name)
    directory.rename(aside)


def _remove(directory: Path) -> None:
    """Remove a sealed directory; half removed, it counts as unfinished."""
    if is_sealed(directory):
        (directory / UNFINISHED).touch()
        (directory / MANIFEST).unlink()
        shutil.rmtree(directory)
