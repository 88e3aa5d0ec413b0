"""Checkpoints that a killed run, a full drive or a flipped bit can't spoil.

Trainer writes `checkpoint-N`; `Checkpoints` gives it a manifest as the last thing (see `sealing`), and only then
removes older ones. `choose_checkpoint` takes the newest one whose manifest and bytes hold, says which it skipped
and why, and refuses one that is of another run:

    skipped checkpoint-40: is damaged: optimizer.pt is missing
    resuming after step 30 from checkpoint-30

`changes` finds what differs between the run that wrote a checkpoint and the one that would resume it. Differences that
leave examples and updates alone can be accepted.
"""

from __future__ import annotations

import errno
import functools
import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedConfig, Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from packtrain.errors import HIDDEN, CheckpointError, PacktrainError, hidden, shorten
from packtrain.modeling.stored_weights import base_weights
from packtrain.packing.plan import AnyPlan
from packtrain.recipe.recipe import DEFAULTS, Recipe
from packtrain.training.resharding import added_later, optimizer_steps
from packtrain.training.schedule import continue_schedule
from packtrain.training.sealing import MANIFEST, UNFINISHED, begin, is_sealed, read_manifest, seal, verify
from packtrain.training.summary import package_versions

logger = logging.getLogger(__name__)
FULL = 2**16  # bytes; a drive that has fewer is full
_WITHOUT_BEST = (
    "restore it, or end with the last weights: resume with allow_changes=True and `load_best_model_at_end: false`"
)
PREVIOUS = ".previous"  # of a checkpoint that is being written anew, until that is complete

Say = Callable[[str], None]


def facts_of(
    recipe: Recipe | None, plan: AnyPlan, examples: Any, config: PreTrainedConfig | None = None
) -> dict[str, Any]:
    """Returns what identifies a run: written into manifests, and compared when one is resumed.

    Args:
        recipe: the settings of the run; None for one put together in Python.
        examples: those that it trains on; only their `fingerprint` is read.
        config: that of the model, to identify the weights that the recipe names.
    """
    return {
        "base_weights": base_weights(recipe.model, config) if recipe and config else None,
        "recipe_hash": recipe and recipe.hash,
        "recipe": recipe and redacted(recipe.to_dict()),
        "plan_hash": plan.hash,
        "data_fingerprint": examples.fingerprint,
    }


class Checkpoints(TrainerCallback):
    """Seals what Trainer has saved, then removes the oldest beyond `keep`.

    Args:
        trainer: on every rank; each process that Trainer lets save on its drive seals and removes there.
        facts: makes what identifies the run, see `facts_of`; called once, when it is first needed.
        keep: sealed checkpoints to leave, at least one; None or 0 for all.
        progress: returns further entries of a manifest, called on every rank when a checkpoint is sealed.
    """

    def __init__(
        self,
        trainer: Trainer,
        facts: Callable[[], dict[str, Any]],
        keep: int | None,
        progress: Callable[[], Mapping[str, Any]] = dict,
    ):
        self.trainer, self.keep, self.progress = trainer, keep, progress
        self.facts = functools.cache(facts)
        self.saving: Path | None = None  # the directory that is being written
        self.chosen: Path | None = None  # by `choose_checkpoint`: verified, so it may be read
        self.jump: str | None = None  # of the learning rate, where the resumed run has another length now
        self.begun = False  # all that the trainer is made of is there; what fails now is no setting
        self.reading = ExitStack()  # what holds until a checkpoint is read

    def admit(self, resume: str | bool) -> str:
        """Returns the checkpoint to read, on every rank: what was chosen before, or what `choose_checkpoint` chooses.

        Harmless changes of the recipe are accepted here; the command line asks before it comes so far.

        Raises:
            CheckpointError: it is damaged, not ours, or of another run.
        """
        if isinstance(resume, str) and Path(resume) == self.chosen:
            return resume
        output_dir = Path(str(self.trainer.args.output_dir))
        chosen = choose_checkpoint(
            resume, output_dir=output_dir, facts=self.facts, allow_changes=True, say=logger.warning
        )
        assert chosen is not None, "asked for a checkpoint"
        self.chosen = Path(chosen)
        return chosen

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun = True
        self.reading.close()
        if self.chosen is not None:
            state.best_model_checkpoint = self._best_so_far(self.chosen)
            if state.global_step < state.max_steps:
                self.jump = continue_schedule(self.trainer)
        state.compute_steps(args, state.max_steps)  # a resumed state has those of the run that it is of

    def _best_so_far(self, resumed: Path) -> str | None:
        """Returns the best checkpoint that a resumed one names, where it lies now: a run may have been moved.

        Raises:
            CheckpointError: it is gone, and the run is to end with its weights.
        """
        named = json.loads((resumed / TRAINER_STATE_NAME).read_text(encoding="utf-8")).get("best_model_checkpoint")
        if not named:
            return None
        folders = (Path(str(self.trainer.args.output_dir)), resumed.parent, Path(named).parent)
        for path in (folder / Path(named).name for folder in folders):
            if is_sealed(path):
                return str(path)
        if self.trainer.args.load_best_model_at_end:
            what = f"names {named} as the best checkpoint so far, which is gone"
            raise CheckpointError(what, where=str(resumed), key="training.load_best_model_at_end", fix=_WITHOUT_BEST)
        return None

    def best_step(self) -> int | None:
        """Returns the step of the checkpoint that Trainer has loaded as the best one; None where it has loaded none."""
        best = self.trainer.state.best_model_checkpoint
        return read_manifest(Path(best))["step"] if self.trainer.args.load_best_model_at_end and best else None

    def verify_best(self) -> None:
        """Verifies the checkpoint that Trainer has loaded as the best one, after training; on every rank.

        Raises:
            CheckpointError: it is damaged or gone, so these are not the best weights.
        """
        best = self.trainer.state.best_model_checkpoint
        if not (self.trainer.args.load_best_model_at_end and best):
            return
        answer: list[Any] = [None]
        if PartialState().is_main_process:
            try:
                verify(Path(best), read_manifest(Path(best)), later=added_later(Path(best)))
            except CheckpointError as error:
                what = f"the best checkpoint, with whose weights the run was to end, {error.what}"
                key = "training.load_best_model_at_end"
                answer = [CheckpointError(what, where=best, key=key, fix=_WITHOUT_BEST)]
        broadcast_object_list(answer)
        if answer[0] is not None:
            raise answer[0]

    def begin(self, directory: Path) -> None:
        """Makes an empty, marked directory, before Trainer's first file; what stands there already is moved aside."""
        self.saving = directory
        if self.trainer.args.should_save:
            if directory.is_symlink() or directory.exists():
                _make_room(directory)
            begin(directory)
        self.trainer.accelerator.wait_for_everyone()

    def on_save(self, args, state, control, **kwargs):
        """Seals the checkpoint, after Trainer's last file, on every rank."""
        directory = self.saving
        assert directory is not None, "Trainer saves a checkpoint through save_model"
        self.trainer.accelerator.wait_for_everyone()  # until every rank has written its files
        progress = self.progress()
        if args.should_save:
            about = {"step": state.global_step, "sealed_at": _after(directory), "world_size": args.world_size}
            about |= {"save_only_model": args.save_only_model}
            about |= {**progress, "optimizer_steps": optimizer_steps(self.trainer)}
            seal(directory, about | self.facts() | {"versions": package_versions()})
            self._remove_old(directory, best=state.best_model_checkpoint)
        self.trainer.accelerator.wait_for_everyone()
        self.saving = None

    def failed(self, error: Exception) -> CheckpointError | None:
        """Explains an error that left training, if it broke a save, and removes the half-written directory."""
        directory, self.saving = self.saving, None
        if directory is None:
            return None
        free = shutil.disk_usage(next(path for path in directory.parents if path.exists())).free
        full = free < FULL or getattr(error, "errno", None) == errno.ENOSPC  # torch's writer tells of positions only
        if self.trainer.args.should_save and (directory / UNFINISHED).exists():
            shutil.rmtree(directory, ignore_errors=True)
        fix = f"fix the cause ({free / 2**20:,.0f} MiB are free) and use resume=True; older checkpoints are intact"
        return CheckpointError(
            f"could not be saved: {'the drive is full: ' if full else ''}{error}", where=str(directory), fix=fix
        )

    def _remove_old(self, newest: Path, best: str | None) -> None:
        """Removes the oldest: only real directories next to `newest` with our manifest, or our mark of a save cut short."""
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
    resume: str | bool,
    *,
    output_dir: Path,
    facts: Callable[[], Mapping[str, Any]],
    allow_changes: bool = False,
    say: Say = print,
    command: str | None = None,
) -> str | None:
    """Returns the directory to resume from, verified and of this run, the same on all ranks; None to start afresh.

    Args:
        resume: a checkpoint directory, True for the newest good one in `output_dir`, False for none.
        facts: makes what identifies this run, see `facts_of`; called on rank 0.
        allow_changes: resume although the recipe differs, in keys that leave examples and updates alone.
        say: where rank 0 names the checkpoints that it skips, and the one it takes.
        command: the command line that accepts changes, for the error that asks to.

    Raises:
        CheckpointError: there is none, the one named is damaged, or it is of another run.
    """
    if resume is False:
        return None
    answer: list[Any] = [None]
    if PartialState().is_main_process:
        try:
            answer = [_choose(resume, output_dir, facts, allow_changes, say, command)]
        except PacktrainError as error:
            answer = [error]
    broadcast_object_list(answer)
    if isinstance(answer[0], PacktrainError):
        raise answer[0]
    return answer[0]


def find_last_checkpoint(output_dir: Path, say: Say = print) -> tuple[Path, dict[str, Any]]:
    """Finds the checkpoint sealed last of those whose bytes hold, with its manifest; tells which it skips.

    Raises:
        CheckpointError: there is none.
    """
    passed = []
    for path in sorted(output_dir.glob("checkpoint-*")):
        try:
            if path.is_dir():
                read_manifest(path)
        except CheckpointError as error:
            passed.append(f"skipped {path.name}: {error.what}")
            say(passed[-1])
    for path, manifest in _sealed_in(output_dir):
        try:
            _verify(path, manifest)
            return path, manifest
        except CheckpointError as error:
            passed.append(f"skipped {path.name}: {error.what}")
            say(passed[-1])
    raise CheckpointError(
        "there is no valid checkpoint to resume from" + "".join(f"\n    {line}" for line in passed),
        key="training.output_dir",
        value=str(output_dir),
        fix="name a checkpoint directory, or start without resume=True (with overwrite=True where a run has finished)",
    )


def _choose(
    resume: str | bool,
    output_dir: Path,
    facts: Callable[[], Mapping[str, Any]],
    allow_changes: bool,
    say: Say,
    command: str | None,
) -> str:
    if isinstance(resume, bool):
        path, manifest = find_last_checkpoint(output_dir, say)
    else:
        path = Path(resume)
        manifest = read_manifest(path)
        _verify(path, manifest)
    found = changes(manifest, facts())
    if found:
        lines = "".join(f"\n    {change}" for change in found)
        if not all(change.safe for change in found):
            fix = "undo these changes, or start a new run from the saved model (model.model_name_or_path)"
            raise CheckpointError(f"was saved by a run with different settings:{lines}", where=str(path), fix=fix)
        if not allow_changes:
            raise CheckpointError(
                f"was saved by a run with different settings:{lines}",
                where=str(path),
                fix="undo these changes, or accept them with allow_changes=True" + (f": {command}" if command else ""),
            )
        say(f"resuming with changes:{lines}")
    then = manifest.get("versions") or {}
    other = [
        f"{name} {then[name]} is now {found}"
        for name, found in package_versions().items()
        if name in then and then[name] != found
    ]
    if other:
        say(f"resuming with other packages, which may round differently: {', '.join(other)}")
    say(f"resuming after step {manifest['step']} from {path.name}")
    return str(path)


def _verify(path: Path, manifest: Mapping[str, Any]) -> None:
    """Raises CheckpointError if it is damaged, or not enough to go on from."""
    if manifest.get("save_only_model"):
        fix = "start a new run from its weights (model.model_name_or_path); training.save_only_model: false saves the rest"
        raise CheckpointError("has no optimizer state", where=str(path), fix=fix)
    verify(path, manifest, later=added_later(path))


def _sealed_in(output_dir: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Finds its real directories that have our manifest, whatever their names, the one sealed last first."""
    found = [path for path in output_dir.iterdir() if path.is_dir() and is_sealed(path)] if output_dir.is_dir() else []
    pairs = [(path, read_manifest(path)) for path in found]
    return sorted(pairs, key=lambda pair: (pair[1]["sealed_at"], pair[1]["step"]), reverse=True)


def _after(directory: Path) -> int:
    """Returns the time in ns, later than the seals of all checkpoints next to `directory`: a clock may be set back."""
    sealed = [manifest["sealed_at"] for _, manifest in _sealed_in(directory.parent)]
    return max(time.time_ns(), *(at + 1 for at in sealed)) if sealed else time.time_ns()


def _make_room(directory: Path) -> None:
    """Moves what stands in the place of a new checkpoint aside; what a save of ours left half-written is removed."""
    if not directory.is_symlink() and (directory / UNFINISHED).is_file() and not (directory / MANIFEST).exists():
        shutil.rmtree(directory)
        return
    aside = directory.with_name(directory.name + PREVIOUS)
    if is_sealed(directory):
        _remove(aside)
    else:
        aside = directory.with_name(f"{directory.name}.foreign-{time.time_ns()}")
        logger.warning("%s has no manifest of packtrain and was moved to %s", directory, aside.name)
    directory.rename(aside)


def _remove(directory: Path) -> None:
    """Removes a sealed directory; half removed, it counts as unfinished."""
    if is_sealed(directory):
        (directory / UNFINISHED).touch()
        (directory / MANIFEST).unlink()
        shutil.rmtree(directory)


# Keys that change neither which examples an update sees nor, but for the order of summation, what it learns from them;
# and the length of the run, which changes the learning rate from here on. An engine that can't read the states of another
# says so itself (`resharding.py`).
_SAFE = re.compile(
    r"""training\.(run_name|project|report_to|disable_tqdm|max_steps|num_train_epochs|use_cpu|deepspeed|fsdp|fsdp_config
        |gradient_accumulation_steps|gradient_checkpointing|gradient_checkpointing_kwargs|ddp_timeout|push_to_hub
        |load_best_model_at_end|metric_for_best_model|greater_is_better
        |(logging|log|save|eval|dataloader|hub|trackio|early_stopping|sample)_\w+)
    |data\.(num_proc|worker_timeout|eval_path|eval_split)
    |batching\.(strategy|max_tokens|probe_memory|on_nonfinite|max_skipped_updates|allow_contamination)
    |model\.attn_implementation""",
    re.VERBOSE,
)
_ONCE_ERRORS = ("data.overflow", "data.on_bad_row")  # no row has met one, or the run would have ended there
_PLACE = "training.output_dir"  # where a run lies is no part of it: it may be moved
_SECRET = re.compile(r"(?i)(.*_)?(hub_token|password|passwd|secret|api_key|access_key)")
_ABSENT = object()


@dataclass(frozen=True, kw_only=True)
class Change:
    """One difference; `safe` ones may be accepted with `allow_changes`."""

    key: str
    then: Any
    now: Any
    safe: bool

    def __str__(self) -> str:
        return f"{self.key}: was {_shown(self.then)}, is now {_shown(self.now)}"


def changes(manifest: Mapping[str, Any], facts: Mapping[str, Any]) -> list[Change]:
    """Finds the differences between a checkpoint's manifest and the facts of this run (see `facts_of`)."""
    found = []
    if manifest.get("recipe") and facts.get("recipe"):
        then, now = dict(_leaves(manifest["recipe"])), dict(_leaves(facts["recipe"]))
        for key in sorted(then.keys() | now.keys()):
            # A key that came with a later release has its default's effect where it is absent.
            pair = then.get(key, DEFAULTS.get(key, _ABSENT)), now.get(key, DEFAULTS.get(key, _ABSENT))
            if pair[0] != pair[1] and key != _PLACE:
                safe = _SAFE.fullmatch(key) is not None or (key in _ONCE_ERRORS and pair[0] == "error")
                found.append(Change(key=key, then=pair[0], now=pair[1], safe=safe))
    words = {
        "data_fingerprint": "the tokenised examples (by the changes above, or in the files)",
        "plan_hash": "the plan (which examples share a step)",
    }
    if manifest.get("base_weights") and (facts.get("recipe") or {}).get("lora"):  # else a checkpoint has all weights
        words["base_weights"] = "the weights of model.model_name_or_path, on which the adapter was trained"
    for name, what in words.items():
        if manifest.get(name) != facts.get(name):
            then, now = (str(source.get(name))[:12] for source in (manifest, facts))
            found.append(Change(key=what, then=then, now=now, safe=False))
    return found


def redacted(tree: Any) -> Any:
    """Returns plain data without secrets: values of keys like `hub_token`, and what looks like one, become `***`."""
    if isinstance(tree, Mapping):
        return {
            key: HIDDEN if value and _SECRET.fullmatch(str(key)) else redacted(value) for key, value in tree.items()
        }
    if isinstance(tree, list | tuple):
        return [redacted(value) for value in tree]
    return hidden(tree) if isinstance(tree, str) else tree


def _leaves(recipe: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields `section.key` -> value; a section that is absent has no leaves."""
    for section, values in recipe.items():
        if isinstance(values, Mapping):
            yield from ((f"{section}.{key}", value) for key, value in values.items())


def _shown(value: Any) -> str:
    return "unset" if value is _ABSENT else hidden(shorten(value))
