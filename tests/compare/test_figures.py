"""The figures of a report: what is drawn apart, what a colour means, and the files of `--figures`."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from packtrain.compare import pictures, plots
from packtrain.compare.comparison import read_comparison, summarise
from packtrain.compare.drawing import BLOCKS, COLOURS, FONTS, LINES, PHASES, kept_by, light_colours
from packtrain.compare.report import stylesheet, write_report
from packtrain.compare.tables import DETAILS, columns, render_latex
from packtrain.errors import PacktrainError
from tests.compare.synthetic_runs import make_manifest, make_run, store

VARIANTS = [
    ("pad_longest", "packtrain", True),
    ("padding_free", "packtrain", True),
    ("balanced", "packtrain", True),
    ("bfd", "packtrain", False),
    ("trl:padding", "trl:padding", True),
]
RATES = {"pad_longest": 100, "padding_free": 200, "balanced": 240, "bfd": 250, "trl:padding": 90}


@pytest.fixture
def directory(tmp_path):
    runs = []
    for number, wobble in enumerate((1.0, 1.1, 0.95)):
        for name, rate in RATES.items():
            changes = {"updates": 4, "loss_factor": 1.1} if name == "bfd" else {}
            rate = rate * (wobble if name == "pad_longest" else wobble**1.05)
            runs.append(make_run(name, number, rate=rate, learns=number == 0, **changes))
    store(tmp_path / "compare_synthetic", make_manifest(VARIANTS), runs)
    return tmp_path / "compare_synthetic"


def drawn(draw, *arguments) -> dict:
    """The figures that a function draws, by name, as matplotlib has them."""
    found = {}
    with kept_by(lambda name, svg, figure: found.update({name: figure})):
        result = draw(*arguments)
        if result is not None and not isinstance(result, str):
            list(result)
    return found


def test_one_line_stands_for_all_that_have_the_losses_of_the_reference(directory):
    """Over seconds the variant spoken of has its own, as the same losses come sooner."""
    comparison = read_comparison(directory)
    figures = drawn(plots.losses, comparison)
    labels = {name: [line.get_label() for line in figure.axes[0].lines] for name, figure in figures.items()}
    assert labels["loss-by-update"] == labels["loss-by-tokens"] == ["pad_longest and 3 with its losses", "bfd"]
    assert sorted(labels["loss-by-seconds"]) == sorted(RATES), "each of a few, other trainers too"
    others = [(name, trainer, False) for name, trainer, _ in VARIANTS[1:]]  # control: none has its updates
    store(directory.parent / "other", make_manifest([VARIANTS[0], *others]), [])
    (directory / "runs").rename(directory.parent / "other/runs")
    apart = drawn(plots.losses, read_comparison(directory.parent / "other"))["loss-by-update"]
    assert len(apart.axes[0].lines) == 5


def test_a_variant_has_one_colour_in_all_figures_of_losses(directory):
    """By updates `balanced` lies under the reference, and leaves its colour to no other; a figure for each is in a paper."""
    variants = [*VARIANTS[:1], *VARIANTS[2:4], ("balanced at 6e-3", "packtrain", True)]
    runs = [
        make_run(name, 0, rate=100.0, loss_factor=f) for (name, *_), f in zip(variants, (1, 1, 1.1, 1.2), strict=True)
    ]
    store(directory.parent / "own", make_manifest(variants, rounds=1), runs)
    seen: dict[str, set] = {}
    for figure in drawn(plots.losses, read_comparison(directory.parent / "own")).values():
        for line in figure.axes[0].lines:
            seen.setdefault(line.get_label(), set()).add(line.get_color())
    assert {len(colours) for colours in seen.values()} == {1}
    assert len(set.union(*(seen[name] for name in ("balanced", "bfd", "balanced at 6e-3")))) == 3


def test_no_two_of_many_lines_look_alike(tmp_path):
    names = [
        "pad_longest",
        *(f"packed {number}" for number in range(9)),
        *(f"trl:padding {number}" for number in range(7)),
    ]
    variants = [(name, name.partition(" ")[0] if ":" in name else "packtrain", name == "pad_longest") for name in names]
    runs = [make_run(name, 0, rate=100, learns=True, loss_factor=1 + n / 50) for n, name in enumerate(names)]
    store(tmp_path / "many", make_manifest(variants), runs)
    for figure in drawn(plots.losses, read_comparison(tmp_path / "many")).values():
        looks = [(line.get_color(), str(line._dash_pattern)) for line in figure.axes[0].lines]
        assert len(set(looks)) == len(looks) == len(names)


def test_losses_are_drawn_as_the_mean_of_the_seeds_that_the_table_has(tmp_path):
    """Of the first seed alone the line would end elsewhere; control: of one seed nothing is said of a mean."""
    runs = [make_run(name, n, rate=100.0, loss_factor=1 + n / 10) for name in ("pad_longest", "bfd") for n in range(2)]
    store(tmp_path, make_manifest([VARIANTS[0], VARIANTS[3]], seeds=(0, 1)), runs)
    comparison = read_comparison(tmp_path)
    ax = drawn(plots.losses, comparison)["loss-by-update"].axes[0]
    assert [line.get_ydata()[-1] for line in ax.lines] == pytest.approx([row.held_out for row in comparison.rows])
    assert ax.get_ylabel() == "held-out loss, mean of 2 seeds"
    store(tmp_path / "one", make_manifest(VARIANTS[:1]), runs[:1])
    assert (
        drawn(plots.losses, read_comparison(tmp_path / "one"))["loss-by-update"].axes[0].get_ylabel() == "held-out loss"
    )


def test_an_interval_that_goes_on_has_an_arrow(tmp_path):
    def arrows(second: float) -> int:
        rates = {"pad_longest": (100.0, 100.0), "balanced": (100.0, second)}
        runs = [
            make_run(name, n, rate=rate, learns=n == 0) for name, both in rates.items() for n, rate in enumerate(both)
        ]
        store(tmp_path / f"{second}", make_manifest(VARIANTS[:1] + VARIANTS[2:3], rounds=2), runs)
        (figure,) = drawn(plots.throughput, read_comparison(tmp_path / f"{second}")).values()
        return sum(line.get_marker() == ">" for line in figure.axes[0].lines)

    assert arrows(10_000.0) == 1 and arrows(101.0) == 0


def test_a_colour_has_one_meaning():
    """Documents and phases have no hue of a variant; control: lines of losses do, of their kind's first."""
    for part in re.findall(r"\{[^{}]*--ours:[^{}]*\}", stylesheet()):
        colour = dict(re.findall(r"--(\w+): (#[0-9a-fA-F]{6})", part))
        variants = {colour[role] for role in ("ours", "packed", "peer", "accent", *LINES)}
        parts = [colour[role] for role in (*PHASES, *BLOCKS, "padding")]
        assert not variants & set(parts) and len(set(parts)) == len(parts)
        assert colour["line0"] == colour["ours"] and colour["line1"] == colour["packed"]


def test_a_picture_of_fewer_packs_than_ranks_is_left_out(directory):
    def count(rows: list) -> int:
        for file in directory.glob("runs/00-balanced.jsonl"):
            text = re.sub(
                r'"over_ranks":(null|\[.*?\}\])', f'"over_ranks":[{{"width":9,"rows":{rows}}}]', file.read_text()
            )
            file.write_text(text)
        return len(list(pictures.rank_pictures(read_comparison(directory))))

    assert count([[9], [], [], []]) == 0 and count([[9], [5, 4], [8], [7]]) == 1


def test_no_table_of_the_page_is_wider_than_a_screen(directory):
    text = write_report([directory]).read_text()
    heads = [re.findall(r'<th scope="col">(.*?)</th>', head) for head in re.findall(r"<thead>.*?</thead>", text)]
    shown = [heading for heading, _ in columns(read_comparison(directory))]
    assert len(heads) == 2 and all(len(head) <= 11 for head in heads)
    assert sorted(heads[0][1:] + heads[1][1:]) == sorted(shown)
    assert set(DETAILS) & set(shown) == set(heads[1][1:]) and heads[0][0] == heads[1][0] == "variant"


@pytest.mark.parametrize("axis", ["examples", "updates"])
def test_the_loss_at_the_end_is_in_the_first_table_and_the_papers(axis):
    """Under `max_steps` all end after as many updates; control: after as many examples, as without."""
    manifest = make_manifest(VARIANTS[:2])
    for variant in manifest["variants"]:
        variant["ends_with_reference"] = axis
    comparison = summarise(manifest, [make_run(name, 0, rate=100.0) for name, *_ in VARIANTS[:2]])
    (heading,) = [
        name
        for name, _ in columns(comparison)
        if name.startswith("held-out") and name not in DETAILS and " same " in name
    ]
    assert heading in render_latex(comparison) and f"same {axis}" in heading


@pytest.mark.ci
@pytest.mark.slow
def test_figures_are_files_for_a_paper(directory, tmp_path):
    lines: list[str] = []
    write_report([directory], figures=tmp_path / "figures", say=lines.append)
    assert str(tmp_path / "figures") in lines[0] and "  throughput: Speed: real tokens/s" in lines
    assert "  first-update-of-balanced: balanced: first update" in lines
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    drawn_names = {
        "throughput",
        "loss-by-update",
        "padding",
        "phases",
        "step-times",
        "memory",
        "cover",
        "first-update-of-balanced",
    }
    assert {f"{name}.{kind}" for name in drawn_names for kind in ("svg", "png", "pdf")} | {
        "table.csv",
        "table.tex",
    } <= names
    ours = int(light_colours(stylesheet())["ours"][1:], 16)
    sentinels = {int(colour[1:], 16) for colour in COLOURS.values()}
    for path in (tmp_path / "figures").glob("*.svg"):
        text = path.read_text()
        root = ElementTree.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.get("width")
        assert not re.search(r"var\(|<style|@media|class=", text), "other programs than browsers know no stylesheets"
        fonts, painted = re.findall(r"font-family: ([^;\"]*)", text), re.findall(r"(?:fill|stroke): ([^;\"]*)", text)
        assert set(fonts) <= {FONTS} and set(painted) - {"none"} <= set(light_colours(stylesheet()).values())
        assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF-")
        with Image.open(path.with_suffix(".png")) as image:
            assert image.width >= 1800, "for a column of a paper in print"
            pixels = set(
                np.unique(np.asarray(image.convert("RGB"), dtype=np.int32)[::2, ::2] @ (1 << 16, 1 << 8, 1)).tolist()
            )
        assert not pixels & sentinels and len(pixels) > 5, path.name
        assert path.stem not in ("throughput", "cover") or ours in pixels
    rows = list(csv.reader((tmp_path / "figures/table.csv").open()))
    assert [row[0] for row in rows[1:]] == list(RATES) and rows[0][1] == "speed vs pad_longest"
    comparison = read_comparison(directory)
    assert (tmp_path / "figures/table.tex").read_text() == render_latex(comparison)
    assert render_latex(comparison).count(r"\\") == 6 and r"pad\_longest" in render_latex(comparison)


def test_a_page_is_not_written_into_a_picture(directory, tmp_path):
    with pytest.raises(PacktrainError, match="(?s)--out: is not the name of a page.*--figures DIR"):
        write_report([directory], out=tmp_path / "fig.png")
    assert not (tmp_path / "fig.png").exists() and not (directory / "report.html").exists()
    assert write_report([directory], out=tmp_path / "fig.html").read_text().startswith("<!doctype html>")


def test_over_seconds_what_is_left_out_of_many_is_named(tmp_path):
    names = [*VARIANTS, *((f"balanced {n}k", "packtrain", True) for n in range(5))]
    store(tmp_path, make_manifest(names), [make_run(name, 0, rate=RATES.get(name, 200)) for name, _, _ in names])
    figure = drawn(plots.losses, read_comparison(tmp_path))["loss-by-seconds"]
    labels = {line.get_label() for line in figure.axes[0].lines}
    assert labels == {"pad_longest", "balanced", "bfd", "trl:padding"}
    said = " ".join(figure.axes[0].get_xlabel().split())
    assert (
        all(name in said for name, _, _ in names if name not in labels)
        and "not drawn, with the losses of pad_longest: padding_free," in said
    )


def test_few_examples_are_counted_in_plain_numbers(directory):
    """An axis within a power of ten has its labels at minor ticks."""
    data = {"examples": 42, "median": 12.0, "p99": 13.0, "max": 13, "max_length": 64, "max_tokens": 64}
    comparison = read_comparison(directory)
    comparison = replace(
        comparison, manifest={**comparison.manifest, "data": {**data, "edges": [11, 12, 13, 14], "counts": [18, 20, 4]}}
    )
    axes = drawn(plots.lengths, comparison)["lengths"].axes[0]
    labels = [text.get_text() for axis in (axes.xaxis, axes.yaxis) for text in axis.get_ticklabels(which="both")]
    assert "20" in labels and all(re.fullmatch(r"[0-9]*k?", label) for label in labels)


def test_nothing_of_a_figure_lies_outside(tmp_path):
    """With a long name in every place; an interval that goes on makes the longest label."""
    long = "my_package.packing:by_lengths"
    rates = {long: (100.0, 100.0), f"{long}_of_{long}": (100.0, 10_000.0)}
    runs = [make_run(name, n, rate=rate, learns=n == 0) for name, both in rates.items() for n, rate in enumerate(both)]
    over_ranks = [{"width": 10, "rows": [[10], [4], [3], [2]]}]
    runs = [replace(run, end=replace(run.end, over_ranks=over_ranks)) for run in runs]
    store(tmp_path, make_manifest([(run.variant, "packtrain", True) for run in runs[::2]], rounds=2), runs)
    comparison = read_comparison(tmp_path)
    room, labels = {}, {}

    def keep(name: str, svg: str, figure) -> None:
        (width, height), box = figure.get_size_inches(), figure.get_tightbbox()
        room[name] = min(box.x0, box.y0, width - box.x1, height - box.y1)
        labels[name] = " ".join(figure.axes[0].get_xlabel().split())

    with kept_by(keep):
        plots.figures(comparison)
        plots.cover(comparison, stylesheet())
        list(pictures.packing_pictures(comparison)), list(pictures.rank_pictures(comparison))
    assert len(room) == 13 and all(inches > -0.03 for inches in room.values()), room
    label = labels["plan-on-4-ranks-of-my_package.packing-by_lengths"]
    assert "computed by the plan, not measured (it ran on 1 rank)" in label
