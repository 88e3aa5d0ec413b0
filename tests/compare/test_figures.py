"""The figures of a report: what is drawn apart, what a colour means, and the files of `--figures`."""

from __future__ import annotations

import csv
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from packtrain.compare import plots
from packtrain.compare.comparison import read_comparison
from packtrain.compare.drawing import BLOCKS, COLOURS, LINES, PHASES, kept_by
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
    assert labels["loss-by-seconds"] == ["pad_longest", "balanced", "bfd"]
    others = [(name, trainer, False) for name, trainer, _ in VARIANTS[1:]]  # control: none has its updates
    store(directory.parent / "other", make_manifest([VARIANTS[0], *others]), [])
    (directory / "runs").rename(directory.parent / "other/runs")
    apart = drawn(plots.losses, read_comparison(directory.parent / "other"))["loss-by-update"]
    assert len(apart.axes[0].lines) == 5


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
    def pictures(rows: list) -> int:
        for file in directory.glob("runs/00-balanced.jsonl"):
            text = re.sub(
                r'"over_ranks":(null|\[.*?\}\])', f'"over_ranks":[{{"width":9,"rows":{rows}}}]', file.read_text()
            )
            file.write_text(text)
        return len(list(plots.rank_pictures(read_comparison(directory))))

    assert pictures([[9], [], [], []]) == 0 and pictures([[9], [5, 4], [8], [7]]) == 1


def test_no_table_of_the_page_is_wider_than_a_screen(directory):
    text = write_report([directory]).read_text()
    heads = [re.findall(r'<th scope="col">(.*?)</th>', head) for head in re.findall(r"<thead>.*?</thead>", text)]
    shown = [heading for heading, _ in columns(read_comparison(directory))]
    assert len(heads) == 2 and all(len(head) <= 11 for head in heads)
    assert sorted(heads[0][1:] + heads[1][1:]) == sorted(shown)
    assert set(DETAILS) & set(shown) == set(heads[1][1:]) and heads[0][0] == heads[1][0] == "variant"


def test_figures_are_files_for_a_paper(directory, tmp_path):
    write_report([directory], figures=tmp_path / "figures")
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    drawn_names = {"throughput", "loss-by-update", "padding", "phases", "step-times", "memory", "cover", "layout-0"}
    assert {f"{name}.{kind}" for name in drawn_names for kind in ("svg", "png")} | {"table.csv", "table.tex"} <= names
    ours = tuple(int(re.search(r"--ours: #(\w{6})", stylesheet())[1][at : at + 2], 16) for at in (0, 2, 4))
    sentinels = {tuple(bytes.fromhex(colour[1:])) for colour in COLOURS.values()}
    for path in (tmp_path / "figures").glob("*.svg"):
        root = ElementTree.fromstring(path.read_text())
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.get("width") and "--ours:" in path.read_text()
        with Image.open(path.with_suffix(".png")) as image:
            pixels = {tuple(pixel) for pixel in np.asarray(image.convert("RGB")).reshape(-1, 3)[::3].tolist()}
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
