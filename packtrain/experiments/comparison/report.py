"""`packtrain report DIR [DIR...]`: the report of stored experiments, rebuilt from their files alone.

The same files give the same bytes: no dates, no random ids, numbers only from the stores. Several experiments
are laid side by side in one page, with a table of their ratios first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup, escape

from packtrain.experiments.comparison import plots
from packtrain.experiments.comparison.cover import cover
from packtrain.experiments.comparison.curves import losses
from packtrain.experiments.comparison.pictures import packing_pictures, rank_pictures
from packtrain.experiments.comparison.results import PICTURED_RANKS, read_manifest, read_runs, write_atomically
from packtrain.experiments.comparison.summary import Row, Summary, summarise
from packtrain.experiments.comparison.tables import columns, csv_text, markdown
from packtrain.experiments.comparison.verdict import note, verdict
from packtrain.training.summary import name_machine

REPORT, COVER = "report.html", "speed.svg"
TEMPLATES = files("packtrain.experiments.comparison") / "templates"
GROUPS = (
    ("the same updates as plain padding", lambda row: row.keeps_updates and not row.is_peer),
    ("packed over the whole epoch: other updates", lambda row: not row.keeps_updates and not row.is_peer),
    ("other trainers", lambda row: row.is_peer),
)


def write_report(directories: Sequence[str | Path], *, out: str | Path | None = None) -> Path:
    """Write `summary.csv`, `summary.md`, `report.html` and `speed.svg` of each experiment, and return the report's
    path.

    Args:
        directories: written by `compare`.
        out: where the page of several experiments goes; `report.html` beside them by default.

    Raises:
        PacktrainError: a directory holds no experiment, or a damaged run.
    """
    paths = [Path(directory) for directory in directories]
    summaries = [read_summary(path) for path in paths]
    chapters = [chapter(summary) for summary in summaries]
    for path, summary, own in zip(paths, summaries, chapters, strict=True):
        write_atomically(path / "summary.csv", csv_text(summary))
        write_atomically(path / "summary.md", markdown(summary, verdict(summary)))
        write_atomically(path / REPORT, page([own]))
        picture = cover(summary, style())
        if picture:
            write_atomically(path / COVER, picture)
    if len(paths) == 1 and out is None:
        return paths[0] / REPORT
    target = Path(out) if out else paths[0].parent / REPORT
    write_atomically(target, page(chapters, side_by_side(summaries)))
    return target


def read_summary(directory: Path) -> Summary:
    """The experiment that is stored in a directory."""
    manifest = read_manifest(directory)
    return summarise(manifest, read_runs(directory, manifest))


def page(chapters: Sequence[Mapping[str, Any]], side_by_side: Sequence[Sequence[str]] = ()) -> str:
    """One self-contained HTML page of one or more experiments, and of the table that lays them side by side."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["code"] = _code
    template = environment.from_string((TEMPLATES / "report.html.j2").read_text(encoding="utf-8"))
    text = template.render(
        style=style(),
        title=" and ".join(own["name"] for own in chapters),
        experiments=[_numbered(own, number) for number, own in enumerate(chapters)],
        side_by_side=side_by_side,
    )
    return text + "\n"


def style() -> str:
    """The stylesheet of the page, its colours first."""
    return (TEMPLATES / "report.css").read_text(encoding="utf-8")


def chapter(summary: Summary) -> dict[str, Any]:
    """What the template shows of one experiment."""
    shown = columns(summary)
    figures = [svg for figure in plots.FIGURES if (svg := figure(summary))] if summary.rows else []
    curves = list(losses(summary))
    return {
        "name": summary.name,
        "facts": facts(summary),
        "sentences": verdict(summary),
        "note": note(summary),
        "headings": [heading for heading, _ in shown],
        "groups": [
            (title, [_line(row, shown, summary) for row in summary.rows if belongs(row)]) for title, belongs in GROUPS
        ],
        "figures": [*figures[:1], *curves, *figures[1:]],
        "pictures": list(packing_pictures(summary)),
        "rank_pictures": list(rank_pictures(summary)),
        "world_size": PICTURED_RANKS,
        "method": method(summary),
        "reasons": (summary.manifest.get("recommendation") or {}).get("reasons", []),
        "command": summary.manifest["command"],
        "setting": _yaml({key: summary.manifest[key] for key in ("machine", "versions", "git")}),
        "recipes": [(variant["name"], _yaml(variant["recipe"])) for variant in summary.manifest["variants"]],
    }


def _yaml(data: object) -> str:
    return yaml.safe_dump(data, sort_keys=False, width=100)


def _numbered(own: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A chapter with ids of its own, its figures' too."""
    prefix = f"e{number}"

    def distinct(svg: str) -> str:
        for reference in ('id="', 'href="#', "url(#"):
            svg = svg.replace(reference, f"{reference}{prefix}-")
        return svg

    drawn = {part: [distinct(svg) for svg in own[part]] for part in ("figures", "pictures", "rank_pictures")}
    return {**own, **drawn, "id": prefix}


def _line(row: Row, shown: Sequence, summary: Summary) -> dict[str, Any]:
    return {
        "name": row.name,
        "role": plots.family(row, summary),
        "is_reference": row.name == summary.manifest["reference"],
        "failure": row.failure if row.tokens_per_second is None else None,
        "cells": [cell(row) for _, cell in shown],
    }


def facts(summary: Summary) -> list[str]:
    """What was compared, in a few words each."""
    manifest = summary.manifest
    recipe = next(v["recipe"] for v in manifest["variants"] if v["name"] == manifest["reference"])
    ends = [run.end for row in summary.rows for run in row.timed_runs]
    end = ends[0] if ends else None
    model = recipe["model"]
    name = model["model_name_or_path"] or (model["config"] or {}).get("model_type", "")
    result = []
    if end is not None and end.trained_parameters is not None:
        frozen = f" and {_short(end.frozen_parameters)} frozen" if end.frozen_parameters else ""
        result.append(f"{name}, {_short(end.trained_parameters)} trained{frozen} parameters, {end.dtype}")
    data = manifest.get("data")
    if data:
        result.append(f"{recipe['data']['path']}: {data['examples']:,} examples, {data['tokens']:,} tokens")
    batching = recipe["batching"]
    result.append(
        f"{batching['examples_per_step']:,} examples per update, {batching['max_tokens']:,} tokens per micro-batch"
    )
    threads = end.threads if end is not None else None
    return [*result, name_machine(manifest["machine"], threads)]


def method(summary: Summary) -> list[str]:
    """How it was measured, for this experiment."""
    manifest = summary.manifest
    rounds, seeds = manifest["rounds"], {turn["seed"] for turn in manifest["rounds"]}
    first, count = manifest["warmup_steps"], manifest["measure_steps"]
    return [
        f"{_count(len(rounds), 'round')} over {_count(len(seeds), 'seed')}; in a round every variant runs "
        "once, one after the other, each in a fresh process.",
        f"Speed: real tokens over seconds of updates {first + 1} to {first + count}. Ratios are taken within a round; "
        "intervals are 95% t intervals of their logarithms over the rounds.",
        "The first round of a seed trains to the end and gives the losses, the updates and the filler.",
        "Variants with the same updates see the same examples in the same updates as the reference. Those that pack "
        "the whole epoch are compared at the end of the run and after the same number of updates.",
        "Held-out loss is summed over tokens (and over examples) and divided once, by the same code for every trainer.",
        "Other trainers get the same model, tokenised examples, seed and TrainingArguments, with micro-batches of at "
        "most the tokens that packtrain's have; those that don't pack also get the examples in the same order.",
        "FLOPs count the attention of each document by itself and no filler. A number that was not measured is absent.",
    ]


def side_by_side(summaries: Sequence[Summary]) -> list[list[str]]:
    """Heading and rows of the table of speed ratios over several experiments."""
    names = list(dict.fromkeys(row.name for summary in summaries for row in summary.rows))
    head = ["variant", *(f"{summary.name}, vs {summary.manifest['reference']}" for summary in summaries)]

    def cell(summary: Summary, name: str) -> str:
        row = next((row for row in summary.rows if row.name == name), None)
        if row is None:
            return ""
        if name == summary.manifest["reference"] and row.speed:
            return "1"
        return "failed" if row.failure and row.speed is None else row.speed.text() if row.speed else ""

    return [head, *([name, *(cell(summary, name) for summary in summaries)] for name in names)]


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _short(count: int) -> str:
    """`37.8k`, `0.8M`, `1.24B`."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)


def _code(text: str) -> Markup:
    """Escaped text in which `words` between backticks are code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))
