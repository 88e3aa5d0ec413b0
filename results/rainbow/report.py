"""Reports the trained tails: means and ranges over seeds, and a verdict that is computed from them.

Seeds are paired: every tail tuned a copy of the same base model, so differences from eos are taken seed by seed. One
that has the same sign for all seeds is called a difference, any other is not; the report says how often chance does that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from packtrain.errors import PacktrainError

BASELINE = "eos"
COLUMNS = {  # field -> heading
    "mean_length": "mean length",
    "early": "early stop",
    "late": "late stop",
    "exact": "exact",
    "content": "content",
    "ends_in_first_half": "ends in first half",
}
COMPARED = {"early": "Early stops", "exact": "Exact answers", "mean_length": "Mean length"}  # with the baseline
HOW_IT_WAS_FOUND = (
    "The setting was chosen after pilots of one seed in which rainbow K=7 was seen, too (`trained.py` says what they "
    "showed)."
)
LEARNT = 0.95  # of what is asked for, in every seed: below that a tail's failures may be the model's


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
    seeds, settings = len({result["seed"] for result in results}), settings_of(results)
    comparisons = len(COMPARED) * sum(setting.blocks == 1 and setting.tail != BASELINE for setting in settings)
    chance = (
        f"With {seeds} seeds chance alone gives all differences the same sign in {2.0 ** (1 - seeds):.0%} of cases, and "
        f"there are {comparisons} comparisons above."
    )
    return [_what_was_learnt(results), *_what_tails_change(settings), chance]


def _what_was_learnt(results: Sequence[dict]) -> str:
    worst = {
        "right": min(result["reading"]["next_place"] for result in results),
        "stops": min(result["reading"]["stops_when_done"] for result in results),
        "goes on": 1 - max(result["reading"]["stops_before"] for result in results),
    }
    learnt = all(share >= LEARNT for share in worst.values())
    figures = (
        f"with all words before it given, the next place is right in {worst['right']:.1%}, an answer that is complete is "
        f"ended in {worst['stops']:.1%}, and one that is not goes on in {worst['goes on']:.1%} (the worst of all runs)"
    )
    if not learnt:
        doubt = "What fails below may be the model as much as the order."
        return f"Content or stop are not learnt everywhere: {figures}. {doubt}"
    length = results[0]["measured"][0]["reference_length"]
    whole = (worst["right"] * worst["goes on"]) ** length * worst["stops"]
    return (
        f"Content and stop are learnable here: {figures}. Written from the left, an answer of {length:.1f} places would "
        f"then be right in about {whole:.0%} at worst; what is lost beyond that is lost by the order of writing."
    )


def _what_tails_change(settings: Sequence[Setting]) -> Iterator[str]:
    whole = [setting for setting in settings if setting.blocks == 1]
    baseline = {setting.canvas: setting for setting in whole if setting.tail == BASELINE}
    for tail in dict.fromkeys(setting.tail for setting in whole):
        own = [setting for setting in whole if setting.tail == tail]
        rates = ", ".join(f"{s.mean('early'):.2f} at {s.canvas}" for s in own)
        means = {field: ", ".join(f"{s.mean(field):.2f}" for s in own) for field in ("late", "exact", "mean_length")}
        text = (
            f"**{tail}** stops early in {rates} tokens (late in {means['late']}; exact {means['exact']}; mean length "
            f"{means['mean_length']})."
        )
        if tail != BASELINE and baseline:
            for field, name in COMPARED.items():
                changes = "; ".join(f"at {s.canvas} {_compare(s, baseline[s.canvas], field)}" for s in own)
                text += f" {name} against {BASELINE}: {changes}."
        yield text


def _compare(one: Setting, other: Setting, field: str) -> str:
    """Write `0.30 less in every seed`, or `no difference (2 of 3 seeds less, 1 more)`."""
    differences = [a - b for a, b in zip(one.values[field], other.values[field], strict=True)]
    mean, count = sum(differences) / len(differences), len(differences)
    less = sum(difference < 0 for difference in differences)
    more = sum(difference > 0 for difference in differences)
    if count in (less, more):
        return f"{abs(mean):.2f} {'less' if less else 'more'} in every seed"
    return f"no difference ({less} of {count} seeds less, {more} more)"


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
        f"temperature. Means over seeds {', '.join(map(str, seeds))}, the range over seeds in brackets.",
        *verdict(results),
        HOW_IT_WAS_FOUND,
        table(settings),
        "![early stops, exact answers and lengths against the allocated length](trained.png)",
        *(f"![what was written when, {name}]({name})" for name in pictures),
        f"Runs took {sum(result['seconds'] for result in results) / 60:.0f} minutes of one core, base models not counted. "
        f"{machine['cpu']}; " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        f"    {command}",
    ])  # fmt: skip
