"""The setting of a comparison: what was compared, of which model and data, on which machine, and how it was measured."""

from __future__ import annotations

from packtrain.compare.comparison import Comparison, window
from packtrain.training.summary import name_machine


def facts(comparison: Comparison) -> list[str]:
    """Say what was compared, in a few words each."""
    manifest = comparison.manifest
    recipe = next(v["recipe"] for v in manifest["variants"] if v["name"] == manifest["reference"])
    ends = [run.end for row in comparison.rows for run in row.timed_runs]
    end = ends[0] if ends else None
    model = recipe["model"]
    name = model["model_name_or_path"] or (model["config"] or {}).get("model_type", "")
    result = []
    if end is not None and end.trained_parameters is not None:
        frozen = f" and {_rounded(end.frozen_parameters)} frozen" if end.frozen_parameters else ""
        result.append(f"{name}, {_rounded(end.trained_parameters)} trained{frozen} parameters, {end.dtype}")
    data = manifest.get("data")
    if data:
        result.append(f"{recipe['data']['path']}: {data['examples']:,} examples, {data['tokens']:,} tokens")
    batching = recipe["batching"]
    result.append(
        f"{batching['examples_per_step']:,} examples per update, {batching['max_tokens']:,} tokens per micro-batch"
    )
    if comparison.ranks > 1:
        result.append(f"{comparison.ranks} ranks (DDP)")
    threads = end.threads if end is not None else None
    return [*result, name_machine(manifest["machine"], threads)]


def method(comparison: Comparison) -> list[str]:
    """Say how this comparison was measured."""
    manifest = comparison.manifest
    rounds, seeds = manifest["rounds"], {turn["seed"] for turn in manifest["rounds"]}
    first, ranks = manifest["warmup_steps"], comparison.ranks
    ends = [window(run, manifest)[-1].update for row in comparison.rows for run in row.timed_runs]
    last = max(ends, default=first + manifest["measure_steps"])
    shorter = (
        f", or to the end of a shorter run (the shortest ends after {min(ends)})" if ends and min(ends) < last else ""
    )
    over_ranks = [
        f"Every run is {ranks} processes, started by torchrun on one host. Tokens are summed over ranks, seconds are those "
        "of the slowest rank, phases are means, memory is that of the rank with the most.",
        "A rank waits from when its gradients are ready (DDP's communication hook) until those of every rank are; sending "
        "them is not part of it. The share is that of the mean rank in the seconds of the updates.",
    ]
    return [
        f"{_count(len(rounds), 'round')} over {_count(len(seeds), 'seed')}; in a round every variant runs "
        "once, one after the other, each in a fresh process.",
        f"Speed: real tokens over seconds of updates {first + 1} to {last}{shorter}. Ratios are taken within a round; "
        f"intervals are 95% t intervals of their logarithms over the {'seeds' if len(seeds) > 1 else 'rounds'}.",
        *(over_ranks if ranks > 1 else []),
        "The first round of a seed trains to the end and gives the losses, the updates and the padding.",
        "Variants with the same updates see the same examples in the same updates as the reference. Those that pack "
        "the whole epoch are compared at the end of the run and after the same number of updates.",
        "Held-out loss is summed over tokens (and over examples) and divided once, by the same code for every trainer.",
        "Other trainers get the same model, tokenised examples, seed and TrainingArguments, with micro-batches of at "
        "most the tokens that packtrain's have; those that don't pack also get the examples in the same order.",
        "FLOPs count the attention of each document by itself and no padding. A number that was not measured is absent.",
    ]


def software(comparison: Comparison) -> str:
    """Say with which packages, and which commit of packtrain."""
    git = comparison.manifest["git"]
    text = "Versions: " + ", ".join(f"{name} {number}" for name, number in comparison.manifest["versions"].items())
    if git:
        text += f"; packtrain's commit {git['commit'][:12]}{', with changes' if git.get('changed') else ''}"
    return f"{text}."


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _rounded(count: int) -> str:
    """Write a count in three digits: `37.8k`, `0.8M`, `1.24B`."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)
