"""An experiment: the recipe of a comparison. A base recipe, its variants, and how often and how long each runs.

    base: ../quickstart.yaml             # relative to this file
    set: {data.num_rows: 1500}           # for every variant
    reference: pad_longest               # what the others are compared with
    variants:
      - pad_longest                      # a strategy
      - balanced
      - {name: balanced 8k, batching.strategy: balanced, batching.max_tokens: 8192}
      - my_module:function               # a strategy of your own
      - trl:padding                      # another trainer, see `peers`
    seeds: [0]
    repeats: 3                           # rounds per seed; a round runs every variant once
    ranks: 1                             # processes that train every variant together, started by torchrun
    warmup_steps: 2                      # updates before the clock counts
    measure_steps: 8                     # updates it counts

A recipe to train stands for a comparison of itself: its strategy with those of `USUAL` that its other settings allow,
`warmup_steps + measure_steps` updates each.

The first round of a seed trains to the end of the base recipe's epochs and gives the losses; the others stop
once they are timed. Every variant's recipe is checked before anything runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field

from packtrain.compare.results import slug
from packtrain.compare.trainers import PACKTRAIN, TRAINERS
from packtrain.errors import PacktrainError, PlanError, RecipeError
from packtrain.objectives.task import refuse_streaming
from packtrain.packing.strategies import STRATEGIES, resolve_strategy
from packtrain.recipe.fields import Mapping, Positive, Text, Whole, check, did_you_mean
from packtrain.recipe.reader import load_recipe
from packtrain.recipe.recipe import SECTIONS, Recipe
from packtrain.recipe.yaml_source import Source
from packtrain.training.portable import portable

KEYS: dict[str, Any] = {
    "base": Text,
    "set": Mapping,
    "reference": Text,
    "variants": Annotated[list[Any], "a list of strategies, trainers and mappings"],
    "seeds": Annotated[list[Whole], Field(min_length=1), "a list of whole numbers"],
    "repeats": Positive,
    "ranks": Positive,
    "warmup_steps": Annotated[Whole, Field(ge=0)],
    "measure_steps": Positive,
}
DEFAULTS: dict[str, Any] = {"set": {}, "seeds": [42], "repeats": 3, "ranks": 1, "warmup_steps": 2, "measure_steps": 10}
REQUIRED = {
    "base": "name the recipe that every variant begins with; a recipe itself is compared by `packtrain compare RECIPE`",
    "reference": "name the variant that the others are compared with",
    "variants": "list at least two, for example [pad_longest, balanced]",
}
STREAMED = "is not compared: other trainers take rows that are counted and tokenised"
MEANINGS = {  # of the keys
    "base": "the recipe that every variant begins with, relative to this file",
    "set": "keys of the recipe, for every variant",
    "reference": "the variant that the others are compared with",
    "variants": "strategies, your own as module:function, trainers, or {name: ..., section.key: value}",
    "seeds": "seeds of data and model; the first round of each trains to the end and gives the losses",
    "repeats": "rounds per seed; a comparison has seeds x repeats rounds, and a round runs every variant once",
    "ranks": "processes that train every variant together",
    "warmup_steps": "updates before the clock counts",
    "measure_steps": "updates that are timed: later rounds have warmup_steps + measure_steps updates, or "
    "training.max_steps where that is fewer",
}
LONGEST_NAME = 200  # characters of a file's name, of 255
DECIDE_TOKENS = ("tokenizer_name_or_path", "tokenizer_vocab_size", "chat_template")  # of a model
USUAL = ("pad_longest", "group_by_length", "padding_free", "balanced", "bfd")
FORCED = {  # a comparison evaluates, logs and stores by itself, alike for every trainer
    "training.save_strategy": "no",
    "training.eval_strategy": "no",
    "training.eval_on_start": False,
    "training.report_to": "none",
    "training.logging_strategy": "steps",
    "training.logging_steps": 1,
}
NEEDS_EVALUATION: dict[str, Any] = {  # set back where the base recipe has them
    "training.early_stopping_patience": None,
    "training.early_stopping_threshold": None,
    "training.load_best_model_at_end": False,
    "training.sample_prompts": None,
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of the comparison: a recipe, and the trainer that runs it (`packtrain`, or one of its peers)."""

    name: str
    trainer: str
    recipe: Recipe

    @property
    def of_step_scope(self) -> bool:
        """Whether its updates take the examples as they come, `examples_per_step` at a time."""
        if self.trainer in TRAINERS:
            return TRAINERS[self.trainer].keeps_order
        return resolve_strategy(self.recipe.batching.strategy).scope == "step"

    def keeps_updates_of(self, other: Variant) -> bool:
        """Whether every update sees the same examples as `other`'s."""
        mine, theirs = self.recipe, other.recipe
        return (
            (self.of_step_scope and other.of_step_scope)
            and mine.data == theirs.data
            and mine.batching.examples_per_step == theirs.batching.examples_per_step
            and mine.batching.schedule == theirs.batching.schedule
            and mine.training.get("data_seed") == theirs.training.get("data_seed")
        )

    def scores_like(self, other: Variant) -> bool:
        """Whether its losses are of the same predictions as `other`'s, so that one can be lower than the other."""
        mine, theirs = self.recipe, other.recipe
        same_tokens = all(getattr(mine.model, key) == getattr(theirs.model, key) for key in DECIDE_TOKENS)
        return same_tokens and mine.objective.scores_like(theirs.objective)

    def ends_with(self, other: Variant) -> str | None:
        """Name what both have had as much of when their runs end: `examples`, `updates`, or None."""
        mine, theirs = (
            [v.recipe.training.get(key) for key in ("max_steps", "num_train_epochs")] for v in (self, other)
        )
        if mine != theirs or self.recipe.data != other.recipe.data:
            return None
        return "updates" if (mine[0] or -1) > 0 else "examples"


@dataclass(frozen=True, kw_only=True)
class Round:
    """One pass over all variants. `learns` is true for the first of a seed, which trains to the end."""

    seed: int
    learns: bool


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A checked comparison.

    Attributes:
        eval_every: updates between held-out evaluations, None for the start and the end only.
        ranks: processes that train every variant together.
        own_strategy: that of the base recipe.
    """

    name: str
    reference: str
    variants: tuple[Variant, ...]
    rounds: tuple[Round, ...]
    warmup_steps: int
    measure_steps: int
    eval_every: int | None
    ranks: int = 1
    own_strategy: str | None = None

    @property
    def of_reference(self) -> Variant:
        return next(variant for variant in self.variants if variant.name == self.reference)

    @property
    def seeds(self) -> list[int]:
        """The seed of every round."""
        return [turn.seed for turn in self.rounds]

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of what a run depends on: equal hashes, comparable runs. More rounds may be added."""
        variants = [(each.name, each.trainer, portable(each.recipe, show=_name, given=True)) for each in self.variants]
        asked = [variants, self.reference, self.warmup_steps, self.measure_steps, self.eval_every]
        text = json.dumps([*asked, self.ranks] if self.ranks > 1 else asked, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read and check the recipe of a comparison, and the recipe of every variant.

    Args:
        path: a YAML file: a comparison, or a recipe to train.
        overrides: `key=value` of this file (`repeats=1`), or of the base recipe (`data.path=train.jsonl`).

    Raises:
        RecipeError: with every problem in `.problems`.
    """
    own = [override for override in overrides if override.partition("=")[0].strip() in KEYS]
    of_base = [override for override in overrides if override not in own]
    source = Source.from_file(path)
    if _is_a_recipe(source):
        source = Source(yaml.safe_dump(_of_recipe(Path(path), of_base), sort_keys=False), str(path))
    for override in own:
        key, _, value = override.partition("=")
        source.override((key.strip(),), value, f"--set {override}")
    settings = _read_settings(source)
    base = Path(path).parent / settings["base"]
    common = [*_overrides(settings["set"]), *of_base]
    learning = load_recipe(base, common)
    refuse_streaming(learning, STREAMED)
    forced = FORCED | {key: off for key, off in NEEDS_EVALUATION.items() if learning.training.get(key.split(".")[1])}
    entries = [_read_variant(item, source, f"variants.{number}") for number, item in enumerate(settings["variants"])]
    entries = [entry for entry in entries if entry is not None]
    _check_names([name for name, _, _ in entries], settings["reference"], source)
    variants = []
    for name, trainer, changes in entries:
        try:
            recipe = load_recipe(base, [*common, *changes, *_overrides(forced)])
        except RecipeError as error:
            source.problems += [
                PacktrainError(p.what, where=f"variant {name}: {p.where}", key=p.key, value=p.value, fix=p.fix)
                for p in error.problems
            ]
        else:
            variants.append(Variant(name=name, trainer=trainer, recipe=recipe))
            _check_ranks(variants[-1], settings["ranks"], source)
            _check_objective(variants[-1], source)
            _check_schedule(variants[-1], source)
    if source.problems:
        raise RecipeError(source.problems)
    return Experiment(
        name=Path(path).stem,
        reference=settings["reference"],
        variants=tuple(variants),
        rounds=tuple(
            Round(seed=seed, learns=repeat == 0) for repeat in range(settings["repeats"]) for seed in settings["seeds"]
        ),
        warmup_steps=settings["warmup_steps"],
        measure_steps=settings["measure_steps"],
        eval_every=_eval_every(learning),
        ranks=settings["ranks"],
        own_strategy=learning.batching.strategy,
    )


def _is_a_recipe(source: Source) -> bool:
    return (
        isinstance(source.tree, dict)
        and not source.tree.keys() & KEYS.keys()
        and bool(source.tree.keys() & {*SECTIONS})
    )


def _of_recipe(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Make the comparison that a recipe to train stands for.

    Raises:
        RecipeError: the recipe is wrong.
    """
    recipe = load_recipe(path, overrides)
    refuse_streaming(recipe, STREAMED)
    updates = DEFAULTS["warmup_steps"] + DEFAULTS["measure_steps"]
    given = recipe.training.get("max_steps", -1)
    variants: list[Any] = []
    for strategy in dict.fromkeys((*USUAL, recipe.batching.strategy)):
        changes = _changes_for(strategy, recipe)
        if changes is None:
            continue
        try:
            load_recipe(path, [*overrides, *_overrides({"batching.strategy": strategy, **changes})])
        except RecipeError:
            continue
        variants.append({"name": strategy, "batching.strategy": strategy, **changes} if changes else strategy)
    names = [variant if isinstance(variant, str) else variant["name"] for variant in variants]
    return {
        "base": path.name,
        "set": {"training.max_steps": min(given, updates) if given > 0 else updates},
        "reference": names[0],
        "variants": variants,
        "seeds": [recipe.training["seed"]],
    }


def _changes_for(strategy: str, recipe: Recipe) -> dict[str, None] | None:
    """Name the keys of a recipe that another strategy does not take, and that are left out; None where it can't be used."""
    rule, batching = resolve_strategy(strategy), recipe.batching
    if rule.scope == "epoch" and recipe.objective.equal_lengths:
        return None
    unset = {"batching.shapes": batching.shapes is not None and rule.layout != "flat"}
    unset |= {"batching.tokens_per_step": batching.tokens_per_step is not None and rule.scope == "step"}
    return {key: None for key, wanted in unset.items() if wanted}


def _read_settings(source: Source) -> dict[str, Any]:
    """Check the file's own keys.

    Raises:
        RecipeError: one of them is wrong or missing, so that reading on makes no sense.
    """
    tree = source.tree if isinstance(source.tree, dict) else {}
    settings = dict(DEFAULTS)
    for key, value in tree.items():
        if key not in KEYS:
            near = did_you_mean(key, KEYS)
            fix = f"did you mean {near}?" if near else f"known: {', '.join(KEYS)}"
            _problem(source, key, "is not a key", fix=fix)
            continue
        settings[key], what, fix = check(KEYS[key], value)
        if what:
            _problem(source, key, what, value, fix=fix)
    if not source.problems and len(set(settings["seeds"])) < len(settings["seeds"]):
        fix = "name each seed once; repeats: 2 makes two rounds of every seed"
        _problem(source, "seeds", "has a seed twice, which would count one run as two", settings["seeds"], fix=fix)
    for key, fix in REQUIRED.items():
        if key not in tree:
            _problem(source, key, "is missing", fix=fix)
    if source.problems:
        raise RecipeError(source.problems)
    return settings


def _read_variant(item: Any, source: Source, key: str) -> tuple[str, str, list[str]] | None:
    """Read an entry under `variants:` as (name, trainer, overrides); None and a problem where it makes no sense."""
    if isinstance(item, str):
        if item not in TRAINERS and not _is_a_strategy(item, source, key):
            return None
        item = {"name": item, "trainer" if item in TRAINERS else "batching.strategy": item}
    if not isinstance(item, dict) or not isinstance(item.get("name"), str):
        fix = "write a strategy, a trainer, or {name: ..., section.key: value}"
        _problem(source, key, "has no name", item, fix=fix)
        return None
    changes = {name: value for name, value in item.items() if name not in ("name", "trainer")}
    trainer = item.get("trainer", PACKTRAIN)
    if trainer in TRAINERS:
        if find_spec(TRAINERS[trainer].package) is None:
            fix = "pip install 'packtrain[compare]', or leave this variant out"
            _problem(source, key, f"needs {TRAINERS[trainer].package}, which is not installed", trainer, fix=fix)
        changes = {"batching.strategy": TRAINERS[trainer].like, **changes}
    elif trainer != PACKTRAIN:
        near = did_you_mean(str(trainer), TRAINERS)
        _problem(source, f"{key}.trainer", "is not a known trainer", trainer, fix=near and f"did you mean {near}?")
        return None
    return item["name"], trainer, _overrides(changes)


def _is_a_strategy(name: str, source: Source, key: str) -> bool:
    """Whether it is a strategy's name, or a function that can be imported; adds a problem where it is neither."""
    if name in STRATEGIES:
        return True
    near, what, fix = did_you_mean(name, [*STRATEGIES, *TRAINERS]), "is neither a strategy nor a trainer", None
    if ":" in name:
        try:
            resolve_strategy(name)
            return True
        except PlanError as error:
            what, fix = error.what, error.fix
    _problem(source, key, what, name, fix=f"did you mean {near}?" if near else fix)
    return False


def _check_names(names: list[str], reference: str, source: Source) -> None:
    files = [slug(name) for name in names]
    for number, (name, file) in enumerate(zip(names, files, strict=True)):
        if len(file) > LONGEST_NAME:
            _problem(source, "variants", "has a variant whose name is too long for a file", name, fix="shorten it")
        if files.count(file) > 1 and files.index(file) == number:  # once for all of them
            _problem(
                source,
                "variants",
                "has two variants with this name, or with names that differ too little",
                name,
                fix="rename one of them",
            )
    if reference not in names and not source.problems:
        near = did_you_mean(reference, names)
        _problem(source, "reference", "is not a variant", reference, fix=near and f"did you mean {near}?")


def _check_ranks(variant: Variant, ranks: int, source: Source) -> None:
    """Other trainers deal as many examples to every rank; those that pack count rows."""
    examples = variant.recipe.batching.examples_per_step
    if variant.trainer in TRAINERS and not TRAINERS[variant.trainer].packs and examples % ranks:
        what = f"does not divide the {examples} examples of an update, which {variant.name} deals to ranks equally"
        _problem(source, "ranks", what, ranks, fix="set batching.examples_per_step to a multiple of it")


def _check_objective(variant: Variant, source: Source) -> None:
    """Other trainers fine-tune a language model, whatever the objective of the recipe says."""
    unlike = variant.recipe.objective.unlike_sft()
    if variant.trainer in TRAINERS and unlike is not None:
        key, value = unlike
        what = f"is not what {variant.trainer} trains: the mean loss of the next token over supervised tokens"
        fix = "leave this variant out, or set `objective: {name: causal_lm, loss_weighting: token}` for all"
        problem = PacktrainError(what, where=f"variant {variant.name}", key=key, value=value, fix=fix)
        source.problems.append(problem)


def _check_schedule(variant: Variant, source: Source) -> None:
    """Other trainers have as many examples in every update."""
    if variant.trainer in TRAINERS and variant.recipe.batching.schedule is not None:
        what, fix = (
            f"is not known to {variant.trainer}",
            "leave this variant out, or set `batching.schedule: null` for all",
        )
        problem = PacktrainError(what, where=f"variant {variant.name}", key="batching.schedule", fix=fix)
        source.problems.append(problem)


def _overrides(changes: dict[str, Any]) -> list[str]:
    """Write `{key: value}` as `key=value` texts; JSON is YAML."""
    return [f"{key}={json.dumps(value)}" for key, value in changes.items()]


def _eval_every(recipe: Recipe) -> int | None:
    training = recipe.training
    every = training.get("eval_steps") if training.get("eval_strategy") == "steps" else None
    return int(every) if isinstance(every, int | float) and every >= 1 else None


def _problem(source: Source, key: str, what: str, *value: Any, fix: str | None = None) -> None:
    given = {"value": value[0]} if value else {}
    where = source.where(tuple(key.split(".")))
    source.problems.append(PacktrainError(what, where=where, key=key, fix=fix, **given))


def with_settings(recipe: Recipe, **changes: Any) -> Recipe:
    """Return a recipe with other values under `training:`."""
    return recipe.model_copy(update={"training": recipe.training | changes})


def _name(path: str | Path) -> str:
    return Path(path).name
