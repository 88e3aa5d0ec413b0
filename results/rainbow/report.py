"""Reports the trained tails: means and ranges over seeds, and a verdict that is computed from them.

Seeds are paired: every tail tuned a copy of the same base model, so differences from eos are taken seed by seed, with
their 95% interval (`packtrain.compare.statistics`). Only an interval that leaves 0 out is called a difference; for the
others the report estimates how many seeds would be needed to see one of the size found.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from packtrain.compare.statistics import paired_difference
from packtrain.errors import PacktrainError

BASELINE = "eos"
COLUMNS = {  # field -> heading
    "mean_length": "mean length",
    "early": "early stop",
    "late": "late stop",
    "exact": "exact",
    "content": "content",
    "evaluations": "evaluations",
}
COMPARED = {  # with the baseline
    "exact": "exact answers",
    "early": "early stops",
    "late": "late stops",
    "mean_length": "mean length",
    "evaluations": "evaluations",
}
LEARNT = 0.9  # of the answers are exact at their true length, in every seed: below that, failures may be the base's


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Holds one tail in one allocated length and number of blocks.

    Attributes:
        values: field of `Measured` -> one number per seed, in the order of the seeds.
    """

    tail: str
    canvas: int
    blocks: int
    values: Mapping[str, tuple[float, ...]]

    def mean(self, field: str) -> float:
        return sum(self.values[field]) / len(self.values[field])

    def show(self, field: str) -> str:
        """Show the mean and, with several seeds, the range: `0.70 (0.66 to 0.74)`."""
        values = self.values[field]
        text = f"{self.mean(field):.2f}"
        return text if len(values) == 1 else f"{text} ({min(values):.2f} to {max(values):.2f})"


def load_results(directory: Path, tails: Sequence[str]) -> list[dict]:
    """Read every run stored in `directory`, by tail and seed.

    Raises:
        PacktrainError: none, runs of different settings, or a tail that lacks a seed that others have.
    """
    results = [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))]
    if not results:
        raise PacktrainError("there are no runs yet", where=str(directory))
    if any(result["settings"] != results[0]["settings"] for result in results):
        fix = "move the old ones away"
        raise PacktrainError("runs of different settings can't be averaged", where=str(directory), fix=fix)
    results.sort(key=lambda result: (tails.index(result["tail"]), result["seed"]))
    seeds = {tail: [result["seed"] for result in results if result["tail"] == tail] for tail in tails}
    if len({tuple(own) for own in seeds.values()}) != 1:
        raise PacktrainError("not every tail has every seed", where=str(directory), value=seeds, fix="let it finish")
    return results


def settings_of(results: Sequence[dict]) -> list[Setting]:
    """Put results of all seeds together, one setting per tail, allocated length and number of blocks."""
    settings = []
    for tail in dict.fromkeys(result["tail"] for result in results):
        for rows in zip(*(result["measured"] for result in results if result["tail"] == tail), strict=True):
            values = {field: tuple(row[field] for row in rows) for field in rows[0]}
            settings.append(Setting(tail=tail, canvas=rows[0]["canvas"], blocks=rows[0]["blocks"], values=values))
    return settings


def reference_length(settings: Sequence[Setting]) -> float:
    """Compute the mean length of the true answers."""
    return sum(setting.mean("reference_length") for setting in settings) / len(settings)


def table(settings: Sequence[Setting]) -> str:
    """Write one line per setting, mean and range over seeds."""
    lines = ["| tail | allocated | blocks | " + " | ".join(COLUMNS.values()) + " |"]
    lines.append("|---" * (len(COLUMNS) + 3) + "|")
    for setting in settings:
        cells = " | ".join(setting.show(field) for field in COLUMNS)
        lines.append(f"| {setting.tail} | {setting.canvas} | {setting.blocks} | {cells} |")
    return "\n".join(lines)


def verdict(results: Sequence[dict]) -> list[str]:
    """Write sentences: whether the task was learnt, then for every tail what it changes against eos."""
    settings = settings_of(results)
    others = sum(setting.blocks == 1 and setting.tail != BASELINE for setting in settings)
    chance = (
        f"{len(COMPARED) * others} intervals of 95% are given: about {0.05 * len(COMPARED) * others:.0f} would leave 0 out "
        "if no tail changed anything."
    )
    return [_what_was_learnt(results), *_what_tails_change(settings), chance]


def _what_was_learnt(results: Sequence[dict]) -> str:
    ceilings = {result["seed"]: result["ceiling"] for result in results}
    mean, worst = sum(ceilings.values()) / len(ceilings), min(ceilings.values())
    place, stops = (min(result["reading"][name] for result in results) for name in ("next_place", "stops_when_done"))
    figures = (
        f"on a canvas of its true length {mean:.1%} of the base model's answers are exact ({worst:.1%} in the worst seed), "
        f"which is the ceiling of what a tail can reach. Tuned and read along, the next place is right in {place:.1%}, and "
        f"a complete answer is ended in {stops:.1%} (the worst of all runs)"
    )
    if worst < LEARNT:
        return f"The task is not learnt everywhere: {figures}. What fails below may be the model as much as the tail."
    return f"The task is learnt: {figures}."


def _what_tails_change(settings: Sequence[Setting]) -> Iterator[str]:
    whole = [setting for setting in settings if setting.blocks == 1]
    baseline = {setting.canvas: setting for setting in whole if setting.tail == BASELINE}
    for tail in dict.fromkeys(setting.tail for setting in whole):
        own = [setting for setting in whole if setting.tail == tail]
        exact = ", ".join(f"{s.mean('exact'):.2f} at {s.canvas}" for s in own)
        means = {field: ", ".join(f"{s.mean(field):.2f}" for s in own) for field in ("early", "late", "mean_length")}
        calls = ", ".join(f"{s.mean('evaluations'):.1f}" for s in own)
        yield (
            f"**{tail}** is exact in {exact} tokens (early in {means['early']}; late in {means['late']}; mean length "
            f"{means['mean_length']}; {calls} evaluations)."
        )
        if tail != BASELINE and baseline:
            for s in own:
                yield f"- At {s.canvas} tokens {compare(s, baseline[s.canvas])}."


def compare(one: Setting, other: Setting) -> str:
    """Write whether a tail has more exact answers than another, by how much, and the other differences that are clear."""
    found = {field: paired_difference(one.values[field], other.values[field]) for field in COMPARED}
    exact = found.pop("exact")
    if exact.low is None:
        return f"it differs by {exact.estimate:+.2f} in exact answers, and one seed can't tell"
    interval = f"{exact.estimate:+.2f} ({exact.low:+.2f} to {exact.high:+.2f})"
    if exact.is_clear:
        text = f"it is {'better' if exact.estimate > 0 else 'worse'} than {other.tail}: exact answers {interval}"
    else:
        needed = exact.pairs_needed()
        seeds = (
            ""
            if needed is None
            else f"; a difference of this size would take about {needed:,} seeds to see (power 80%)"
        )
        text = f"{exact.pairs} seeds can't tell it from {other.tail}: exact answers {interval}{seeds}"
    clear = [
        f"{COMPARED[field]} {one_found.estimate:+.2f} ({one_found.low:+.2f} to {one_found.high:+.2f})"
        for field, one_found in found.items()
        if one_found.is_clear
    ]
    return "; ".join([text, *clear])


def page(results: Sequence[dict], *, pictures: Sequence[str], command: str) -> str:
    """Write the page.

    Args:
        results: those of `load_results`.
        pictures: file names, shown below the table.
        command: the one that ran them.
    """
    settings, ran = settings_of(results), results[0]["settings"]
    walks, seeds, reference = ran["walks"], sorted({result["seed"] for result in results}), reference_length(settings)
    machine, versions = results[0]["machine"], results[0]["versions"]
    plural = "s" * (ran["layers"] > 1)
    return "\n\n".join([
        "# Tails, trained",
        f"Walks over {walks['places']} places ({walks['last_places']} of them last) with {walks['keys']} keys, at most "
        f"{walks['longest']} places long and {reference:.2f} on average, every place worded in {walks['wordings']} equally "
        f"good ways (`results/rainbow/walks.py`). A Llama with {ran['layers']} layer{plural} of width "
        f"{ran['hidden_size']} that attends both ways: {ran['base_steps']:,} updates of {ran['examples_per_step']} examples "
        f"without tails, then {ran['tune_steps']:,} with each tail from that same model, canvases up to "
        f"{ran['largest_canvas']} sampled. {ran['prompts']} fresh prompts, one token a step, the surest first, no "
        f"temperature, until the end and all before it are written. Means over seeds {', '.join(map(str, seeds))}, the "
        "range over seeds in brackets.",
        *verdict(results),
        table(settings),
        "![early stops, exact answers and lengths against the allocated length](trained.png)",
        *(f"![what was written when, {name}]({name})" for name in pictures),
        f"Runs took {sum(result['seconds'] for result in results) / 60:.0f} minutes of one core, base models not counted. "
        f"{machine['cpu']}; " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        f"    {command}",
    ])  # fmt: skip
