"""The manifest of an experiment: what was asked, of which data, with which software, on which machine.

It holds no path of this machine and no date: the report made from it is the same wherever and whenever it is made.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from packtrain.compare.experiment import Experiment, with_settings
from packtrain.compare.results import MANIFEST, read_manifest
from packtrain.errors import PacktrainError, hidden
from packtrain.modeling.cost import find_cost
from packtrain.objectives.task import find_training_examples, load_task
from packtrain.packing.recommend import recommend
from packtrain.recipe.recipe import Recipe
from packtrain.training.portable import portable, shown_path
from packtrain.training.summary import describe_machine, package_versions

BARS = 36  # of the histogram of lengths


def make_manifest(experiment: Experiment, path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Make the manifest of an experiment, and tokenise its data.

    Raises:
        PacktrainError: the data can't be read, or no strategy can take them.
    """
    return {
        "name": experiment.name,
        "hash": experiment.hash,
        "reference": experiment.reference,
        "own_strategy": experiment.own_strategy,
        "warmup_steps": experiment.warmup_steps,
        "measure_steps": experiment.measure_steps,
        "eval_every": experiment.eval_every,
        "ranks": experiment.ranks,
        "rounds": [{"seed": turn.seed, "learns": turn.learns} for turn in experiment.rounds],
        "variants": [
            {
                "name": variant.name,
                "trainer": variant.trainer,
                "keeps_updates": variant.keeps_updates_of(experiment.of_reference),
                "scores_like_reference": variant.scores_like(experiment.of_reference),
                "ends_with_reference": variant.ends_with(experiment.of_reference),
                "recipe": portable(variant.recipe),
            }
            for variant in experiment.variants
        ],
        "command": _command(path, overrides),
        "machine": describe_machine(),
        "versions": package_versions(),
        "git": _git(),
        **_about_data(experiment),
    }


def _about_data(experiment: Experiment) -> dict[str, Any]:
    """Describe the lengths of the reference's examples, and what the recommendation makes of them.

    Tokenises the data of every seed where that isn't done yet, so that no run's start-up has to.
    """
    recipe = experiment.of_reference.recipe
    lengths = [_lengths(with_settings(recipe, seed=seed)) for seed in dict.fromkeys(experiment.seeds)][0]
    chosen = recommend(
        recipe.batching,
        recipe.schedule,
        lengths,
        max_length=recipe.data.max_length,
        world_size=experiment.ranks,
        cost=find_cost(recipe.model),
    )
    return {
        "data": _histogram(lengths, recipe),
        "recommendation": {"strategy": chosen.strategy, "reasons": list(chosen.reasons)},
    }


def _lengths(recipe: Recipe) -> np.ndarray:
    examples, _ = find_training_examples(recipe)
    return np.asarray((examples or load_task(recipe).train).lengths)


def _histogram(lengths: np.ndarray, recipe: Recipe) -> dict[str, Any]:
    median, p99 = np.percentile(lengths, [50, 99]).tolist()
    edges = np.unique(np.geomspace(lengths.min(), lengths.max() + 1, BARS + 1).round().astype(int))
    return {
        "examples": len(lengths),
        "tokens": int(lengths.sum(dtype=np.int64)),
        "median": median,
        "p99": p99,
        "max": int(lengths.max()),
        "max_length": recipe.data.max_length,
        "max_tokens": recipe.batching.max_tokens,
        "edges": edges.tolist(),
        "counts": np.histogram(lengths, edges)[0].tolist(),
    }


def _command(path: Path, overrides: Sequence[str]) -> str:
    """Write the command line, with files as `shown_path` has them."""
    parts = ["packtrain", "compare", shown_path(path)]
    for override in overrides:
        key, _, value = override.partition("=")
        parts += ["--set", f"{key}={shown_path(value) if '/' in value and Path(value).exists() else value}"]
    return hidden(" ".join(parts))


def _git() -> dict[str, Any]:
    """Find the commit of packtrain's source, and whether the tree differs from it; empty outside a repository."""

    def git(*args: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parents[1]), *args]  # packtrain/
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        return result.stdout.strip() if result.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return {} if commit is None else {"commit": commit, "changed": bool(git("status", "--porcelain", "--", "."))}


def check_same(directory: Path, manifest: dict[str, Any]) -> None:
    """Refuse to add runs of another experiment, data, machine or software to a directory; more rounds are welcome.

    Raises:
        PacktrainError: there are runs of something else.
    """
    if not (directory / MANIFEST).exists():
        return
    before = read_manifest(directory)
    parts = {
        "hash": "another recipe",
        "data": "other data",
        "machine": "another machine",
        "versions": "other versions",
        "git": "another commit",
    }
    other = next((what for key, what in parts.items() if before.get(key) != manifest[key]), None)
    shared = min(len(before["rounds"]), len(manifest["rounds"]))
    if other in (None, "other data") and before["rounds"][:shared] != manifest["rounds"][:shared]:
        other = "other seeds"  # which hold out other rows, so that the data differ for it
    if other is not None:
        fix = "choose another directory with --out, or replace its runs with --restart"
        raise PacktrainError(f"contains runs of {other}", where=str(directory), fix=fix)
