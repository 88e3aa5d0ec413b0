"""A comparison: the stored runs of an experiment as one row per variant, with its speed, cost and loss.

Every row stands against the reference's. Speed is counted over the updates after `warmup_steps`, `measure_steps` of
them: real tokens of the window over its seconds, one figure per round, and the ratio to the reference pair by pair
(see `statistics`). Losses come from the rounds that train to the end. What was not measured is None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from packtrain.compare.flops import peak_flops
from packtrain.compare.results import Run, Update, read_manifest, read_runs
from packtrain.compare.statistics import Ratio, Spread, largest_relative_difference, paired_ratio, spread
from packtrain.compare.trainers import PACKTRAIN
from packtrain.packing.strategies import STRATEGIES

PHASES = ("data", "forward", "backward", "optimizer")
WAITING = "waiting"  # of a rank for the others
OF_SOME_STRATEGIES = {"shapes", "tokens_per_step"}  # of batching; a comparison leaves them out for the others
TRAINED_BY = ("model", "lora", "objective", "training")  # sections of a recipe


@dataclass(frozen=True, kw_only=True)
class Row:
    """One variant. Ratios are to the reference; memory in bytes; `*_difference` are the largest relative ones.

    Attributes:
        keeps_updates: whether every update sees the same examples as the reference's.
        scores_like_reference: whether its losses are of the same predictions as the reference's; where not, nothing
            of them is compared.
        ends_with_reference: what both have had as much of at the end, `examples` or `updates`; None: nothing.
        settings: what its recipe sets otherwise than the reference's, besides rows and batches, as
            `learning_rate 0.002 for 0.001`.
        rounds: rounds that were timed.
        tokens_per_second: real tokens, geometric mean over rounds; `supervised_per_second` likewise.
        speed: ratio of real tokens per second.
        update_rate: real tokens per second of single updates, over all rounds; `supervised_update_rate` likewise.
        update_seconds: of single updates.
        shares: share of each phase in the time of the updates, and of waiting where it was measured; what is left is the
            trainer's own work.
        memory, memory_before: peak, and before the first update; median over rounds.
        held_out, per_example: final loss per supervised token and per example, mean over seeds.
        held_out_ratio: of the final loss per token, paired over seeds.
        equal_updates: at the last update at which this and the reference were both evaluated.
        loss_difference, norm_difference: training loss and gradient norm, update by update; None unless
            `keeps_updates` and `scores_like_reference`.
        learning_runs: runs that trained to the end, one per seed.
    """

    name: str
    trainer: str
    strategy: str
    keeps_updates: bool
    scores_like_reference: bool
    ends_with_reference: str | None
    settings: tuple[str, ...]
    failure: str | None
    rounds: int
    tokens_per_second: float | None
    supervised_per_second: float | None
    speed: Ratio | None
    update_rate: Spread | None
    supervised_update_rate: Spread | None
    update_seconds: Spread | None
    shares: Mapping[str, float] | None
    padding_share: float | None
    updates: int | None
    examples_per_update: tuple[int, float, int] | None
    tokens_dropped: int | None
    memory: float | None
    memory_before: float | None
    memory_of: str | None
    startup_seconds: float | None
    held_out: float | None
    per_example: float | None
    held_out_ratio: Ratio | None
    equal_updates: EqualUpdates | None
    loss_difference: float | None
    norm_difference: float | None
    flops_per_second: float | None
    mfu: float | None
    attention: str | None
    dtype: str | None
    learning_runs: tuple[Run, ...]
    timed_runs: tuple[Run, ...]

    @property
    def is_peer(self) -> bool:
        return self.trainer != PACKTRAIN

    @property
    def waiting(self) -> float | None:
        """The share of the time of the updates that the mean rank waits for the others; None where it was not measured."""
        return (self.shares or {}).get(WAITING)


@dataclass(frozen=True, kw_only=True)
class EqualUpdates:
    """Held-out loss per token of a variant and of the reference after the same number of updates, mean over seeds."""

    update: int
    loss: float
    reference: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The rows of an experiment, in the order of its variants, and what was asked of it."""

    name: str
    manifest: Mapping[str, Any]
    rows: tuple[Row, ...]

    @property
    def reference(self) -> Row:
        return self.row(self.manifest["reference"])

    @property
    def others(self) -> list[Row]:
        """Rows that are not the reference's."""
        return [row for row in self.rows if not self.is_reference(row)]

    def is_reference(self, row: Row) -> bool:
        return row.name == self.manifest["reference"]

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def speed_of(self, row: Row, other: Row) -> Ratio | None:
        """Estimate how much faster `row` is than `other`, over the rounds that both were timed in."""
        others = {run.round: run for run in other.timed_runs}
        pairs = [(run, others[run.round]) for run in row.timed_runs if run.round in others]
        return _ratio_of(pairs, lambda run: _per_second(window(run, self.manifest), "real_tokens"), self.manifest)

    @property
    def measured(self) -> list[Row]:
        """Rows with a speed."""
        return [row for row in self.rows if row.tokens_per_second is not None]

    @property
    def ours(self) -> list[Row]:
        """Packtrain's rows with a speed whose updates are the reference's."""
        return [row for row in self.measured if row.keeps_updates and not row.is_peer]

    def differs_in_strategy_alone(self, row: Row) -> bool:
        """Whether its recipe is the reference's, but for the strategy and the keys that not every strategy takes."""
        found = {variant["name"]: variant["recipe"]["batching"] for variant in self.manifest["variants"]}
        mine, theirs = found[row.name], found[self.manifest["reference"]]
        shared = {*mine, *theirs} - {"strategy", *OF_SOME_STRATEGIES}
        return not row.settings and all(mine.get(key) == theirs.get(key) for key in shared)

    @property
    def same_updates(self) -> str:
        """Name the group of variants that keep the reference's updates."""
        name = self.manifest["reference"]
        found = {variant["name"]: variant["recipe"]["batching"] for variant in self.manifest["variants"]}
        strategy = STRATEGIES.get(found[name]["strategy"])
        return f"the same updates as {'plain padding' if strategy and strategy.layout == 'padded' else name}"

    @staticmethod
    def packs_epoch(row: Row) -> bool:
        """Whether its updates are other ones because it packs the whole epoch, not by a setting."""
        return not row.keeps_updates and getattr(STRATEGIES.get(row.strategy), "scope", "epoch") == "epoch"

    def is_own(self, row: Row) -> bool:
        """Whether it is the strategy of the recipe that was compared, or a function of the user's."""
        return not row.is_peer and (row.name == self.manifest.get("own_strategy") or ":" in row.strategy)

    @property
    def ranks(self) -> int:
        """How many processes trained every variant together."""
        return self.manifest.get("ranks", 1)  # comparisons of one may be older than the key

    @property
    def seeds(self) -> int:
        """How many different seeds there are."""
        return len({turn["seed"] for turn in self.manifest["rounds"]})

    @property
    def pairs(self) -> int:
        """How many pairs the intervals of speeds are over: seeds, or the rounds of a single one."""
        return max((row.speed.pairs for row in self.measured if row.speed), default=0)


def read_comparison(directory: Path) -> Comparison:
    """Read the experiment that is stored in a directory.

    Raises:
        PacktrainError: there is none, or a run is damaged.
    """
    manifest = read_manifest(directory)
    return summarise(manifest, read_runs(directory, manifest))


def summarise(manifest: Mapping[str, Any], runs: Sequence[Run]) -> Comparison:
    """Make one row per variant of the manifest, in its order.

    Variants without any run are left out, but not the reference once another variant has one.
    """

    def runs_of(name: str) -> list[Run]:
        return [run for run in runs if run.variant == name]

    reference = runs_of(manifest["reference"])
    rows = [
        _row(variant, its_runs, reference, manifest)
        for variant in manifest["variants"]
        if (its_runs := runs_of(variant["name"])) or (runs and variant["name"] == manifest["reference"])
    ]
    return Comparison(name=manifest["name"], manifest=manifest, rows=tuple(rows))


def _row(variant: Mapping[str, Any], runs: list[Run], reference: list[Run], manifest: Mapping[str, Any]) -> Row:
    learns = [turn["learns"] for turn in manifest["rounds"]]
    finished = [run for run in runs if not run.failed]
    timed = [run for run in finished if window(run, manifest)]
    learning = [run for run in finished if learns[run.round]]
    of_reference = {run.round: run for run in reference if not run.failed}
    pairs = [(run, of_reference[run.round]) for run in timed if window(of_reference.get(run.round), manifest)]
    learnt = [(run, of_reference[run.round]) for run in learning if run.round in of_reference]
    keeps = variant["keeps_updates"]
    alike = variant.get("scores_like_reference", True)  # comparisons may be older than the key
    updates = [update for run in timed for update in window(run, manifest)]
    seen = [update for run in learning or timed for update in run.updates]
    examples = [update.examples for update in seen if update.examples is not None]
    ends = [run.end for run in finished]
    only_timed = [run.end for run in finished if not learns[run.round]] or ends  # evaluation has a peak of its own
    held_out = [run.held_out[-1] for run in learning if run.held_out]
    flops = _total_rate(timed, manifest, "flops")
    peak = peak_flops(ends[0].device, ends[0].dtype) if ends else None
    return Row(
        name=variant["name"],
        trainer=variant["trainer"],
        strategy=variant["recipe"]["batching"]["strategy"],
        keeps_updates=keeps,
        scores_like_reference=alike,
        ends_with_reference=variant["ends_with_reference"],
        settings=_settings(variant, manifest),
        failure=next((run.end.reason for run in runs if run.failed), None),
        rounds=len(timed),
        tokens_per_second=_total_rate(timed, manifest, "real_tokens"),
        supervised_per_second=_total_rate(timed, manifest, "supervised_tokens"),
        speed=_ratio_of(pairs, lambda run: _per_second(window(run, manifest), "real_tokens"), manifest),
        update_rate=spread([u.real_tokens / u.seconds for u in updates]) if updates else None,
        supervised_update_rate=spread([u.supervised_tokens / u.seconds for u in updates]) if updates else None,
        update_seconds=spread([u.seconds for u in updates]) if updates else None,
        shares=_shares(updates) if updates else None,
        padding_share=1 - _sum(seen, "real_tokens") / _sum(seen, "computed_tokens") if seen else None,
        updates=learning[0].end.planned_updates if learning else None,
        examples_per_update=(min(examples), sum(examples) / len(examples), max(examples)) if examples else None,
        tokens_dropped=ends[0].tokens_dropped if ends else None,
        memory=_median(end.peak_memory for end in only_timed),
        memory_before=_median(end.memory_before for end in only_timed),
        memory_of=ends[0].memory_of if ends else None,
        startup_seconds=_median(end.startup_seconds for end in ends),
        held_out=_mean(point.loss for point in held_out),
        per_example=_mean(point.loss_per_example for point in held_out),
        held_out_ratio=_ratio_of(
            [pair for pair in learnt if alike and pair[0].held_out and pair[1].held_out],
            lambda run: run.held_out[-1].loss,
            manifest,
        ),
        equal_updates=_equal_updates(learnt) if alike else None,
        loss_difference=_largest(learnt, lambda u: u.loss) if keeps and alike else None,
        norm_difference=_largest(learnt, lambda u: u.grad_norm) if keeps and alike else None,
        flops_per_second=flops,
        mfu=flops / peak if flops and peak else None,
        attention=ends[0].attention if ends else None,
        dtype=ends[0].dtype if ends else None,
        learning_runs=tuple(learning),
        timed_runs=tuple(timed),
    )


def _settings(variant: Mapping[str, Any], manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """Name what trains a variant otherwise than the reference, whatever the batches: its model, objective and optimizer."""
    others = next(each["recipe"] for each in manifest["variants"] if each["name"] == manifest["reference"])
    found = []
    for section in TRAINED_BY:
        mine, theirs = (recipe.get(section) for recipe in (variant["recipe"], others))
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            keys = sorted(key for key in {*mine, *theirs} if mine.get(key) != theirs.get(key))
            found += [f"{key} {_value(mine.get(key))} for {_value(theirs.get(key))}" for key in keys]
        elif mine != theirs:
            found.append(f"another {section} section")
    return tuple(found)


def _value(value: object) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def window(run: Run | None, manifest: Mapping[str, Any]) -> list[Update]:
    """Return the timed updates of a run."""
    first = manifest["warmup_steps"]
    last = first + manifest["measure_steps"]
    return [update for update in run.updates if first < update.update <= last] if run else []


def rate(run: Run, manifest: Mapping[str, Any], field: str) -> float | None:
    """Sum a field over the timed updates, per second of them; None where it was not measured in one."""
    updates = window(run, manifest)
    return None if any(getattr(update, field) is None for update in updates) else _per_second(updates, field)


def _total_rate(runs: list[Run], manifest: Mapping[str, Any], field: str) -> float | None:
    """Average `rate` over rounds: the geometric mean."""
    rates = [value for run in runs if (value := rate(run, manifest, field)) is not None and value > 0]
    if not runs or len(rates) < len(runs):
        return None
    return math.exp(sum(map(math.log, rates)) / len(rates))


def _ratio_of(
    pairs: list[tuple[Run, Run]], figure: Callable[[Run], float], manifest: Mapping[str, Any]
) -> Ratio | None:
    if not pairs:
        return None
    seeds = [turn["seed"] for turn in manifest["rounds"]]
    return paired_ratio(
        [figure(run) for run, _ in pairs],
        [figure(reference) for _, reference in pairs],
        groups=[seeds[run.round] for run, _ in pairs] if len(set(seeds)) > 1 else None,
    )


def _shares(updates: list[Update]) -> dict[str, float]:
    total = _sum(updates, "seconds")
    measured = [] if any(update.waiting_seconds is None for update in updates) else [WAITING]
    return {phase: _sum(updates, f"{phase}_seconds") / total for phase in (*PHASES, *measured)}


def _equal_updates(learnt: list[tuple[Run, Run]]) -> EqualUpdates | None:
    """Compare at the last update after which both runs of every pair were evaluated; None if there is no such."""

    def losses(run: Run) -> dict[int, float]:
        return {point.update: point.loss for point in run.held_out if point.update > 0}

    curves = [(losses(run), losses(reference)) for run, reference in learnt]
    common = set.intersection(*(mine.keys() & theirs.keys() for mine, theirs in curves)) if curves else set()
    if not common:
        return None
    last = max(common)
    return EqualUpdates(
        update=last,
        loss=float(np.mean([mine[last] for mine, _ in curves])),
        reference=float(np.mean([theirs[last] for _, theirs in curves])),
    )


def _largest(learnt: list[tuple[Run, Run]], figure: Callable[[Update], float | None]) -> float | None:
    """Find the largest relative difference of a figure to the reference's, over all seeds and updates."""
    differences = []
    for run, reference in learnt:
        mine = [value for update in run.updates if (value := figure(update)) is not None]
        theirs = [value for update in reference.updates if (value := figure(update)) is not None]
        if len(mine) < len(run.updates) or len(theirs) < len(reference.updates):
            return None
        differences.append(largest_relative_difference(mine, theirs))
    return max(differences, default=None)


def _per_second(updates: Collection[Update], field: str) -> float:
    return _sum(updates, field) / _sum(updates, "seconds")


def _sum(updates: Iterable[Update], field: str) -> float:
    return sum(getattr(update, field) for update in updates)


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return float(np.mean(known)) if known else None
