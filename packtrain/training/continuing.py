"""How a run goes on: what is left of it, the command for more, and what is on record where nothing is left."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from packtrain.errors import CheckpointError, hidden
from packtrain.packing.plan import AnyPlan
from packtrain.recipe.recipe import Recipe
from packtrain.training.agreement import check_agreement
from packtrain.training.checkpoints import redacted
from packtrain.training.early_stopping import evaluations_without_better
from packtrain.training.launch import LAUNCHED_BY
from packtrain.training.resharding import check_engine
from packtrain.training.sealing import read_manifest

Say = Callable[[str], None]
AT_THE_END = ("output_dir", "load_best_model_at_end")  # keys of `training:` that act when no update is left, too


def resume_command(recipe: Recipe, *overrides: str) -> str | None:
    """Returns the command that goes on with a changed recipe, by the same launch file; None where it was read from no file.

    Args:
        overrides: `section.key=value`; those of the recipe with the same key are left out.
    """
    if recipe.sources is None:
        return None
    keys = {override.partition("=")[0] for override in overrides}
    replaced = keys | {key.partition(".")[2] for key in keys}
    kept = [given for given in recipe.sources.overrides if given.partition("=")[0].strip() not in replaced]
    sets = [word for override in (*kept, *overrides) for word in ("--set", override)]
    name = os.environ.get(LAUNCHED_BY)
    launched = ["--launch", name] if name else []
    words = ["packtrain", "train", recipe.sources.path, *sets, *launched, "--resume", "--allow-changes"]
    return hidden(shlex.join(words))


def check_what_is_left(checkpoint: Path, plan: AnyPlan, recipe: Recipe, say: Say, *, deepspeed: bool) -> bool:
    """Returns whether a run that resumes from `checkpoint` has an update left; says how it goes on where it has none.

    Args:
        deepspeed: whether the run has DeepSpeed, as what is said would be of no use to an engine that can't read it.

    Raises:
        CheckpointError: it has made more updates than the recipe asks for.
        LaunchError: an engine of another kind wrote it.
    """
    check_engine(checkpoint, deepspeed=deepspeed)
    made, state = read_manifest(checkpoint)["step"], _state_of(checkpoint)
    if made >= plan.total_steps:
        limited = recipe.schedule.max_steps > 0
        epochs = math.floor(max(state["epoch"] or 0, recipe.schedule.num_epochs)) + 1
        command = resume_command(
            recipe, f"training.max_steps={2 * made}" if limited else f"training.num_train_epochs={epochs}"
        )
        if made > plan.total_steps:
            what = f"is of a run with {made:,} updates made, and these settings ask for {plan.total_steps:,}"
            key = "training.max_steps" if limited else "training.num_train_epochs"
            value = recipe.schedule.max_steps if limited else recipe.schedule.num_epochs
            more = f"ask for more{f': {command}' if command else ''}"
            fix = f"{more}; or resume from an earlier checkpoint by its path"
            raise CheckpointError(what, where=str(checkpoint), key=key, value=value, fix=fix)
        say(f"all {made:,} updates of this run are made" + (f"; more of them: {command}" if command else ""))
        return False
    patience, waited = recipe.training.get("early_stopping_patience"), evaluations_without_better(state)
    if patience is None or waited < patience:
        return True
    command = resume_command(recipe, f"training.early_stopping_patience={patience + waited}")
    go_on = f"to go on raise training.early_stopping_patience{f': {command}' if command else ''}"
    say(f"this run stopped early after update {made:,}; nothing to do; {go_on}")
    return False


def _state_of(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))


def recipe_of_record(checkpoint: Path, recipe: Recipe, say: Say) -> Recipe:
    """Returns the recipe that a run without an update left was trained with, as its checkpoint has it.

    What only acts at the end (`AT_THE_END`) is as it is now. Says so where other settings have changed.
    """
    trained: Mapping[str, Any] | None = read_manifest(checkpoint).get("recipe")
    if not trained:
        return recipe
    now = {key: recipe.training[key] for key in AT_THE_END if key in recipe.training}
    record = Recipe.model_validate({**trained, "training": {**trained["training"], **now}})
    record._sources = recipe.sources
    if record.to_dict() != redacted(recipe.to_dict()):
        say("no update is made with the changed settings: the run's record keeps those it was trained with")
    return record


def find_place(plan: AnyPlan, checkpoint: str, manifest: Mapping[str, Any]) -> None:
    """Goes on where a checkpoint stands, and checks that the rows before are those that its run has read; collective.

    Raises:
        CheckpointError: they are others.
        LaunchError: on some ranks they are.
    """
    plan.go_on_from(manifest)
    found = json.loads(json.dumps(plan.state_after(manifest["step"])))
    check_agreement({"the rows read so far": found})
    if found != {name: manifest.get(name) for name in found}:
        what = "was saved by a run that has read other rows than there are now"
        fix = "restore the rows, or start a new run from the saved model (model.model_name_or_path)"
        raise CheckpointError(what, where=checkpoint, key="data.path", fix=fix)
