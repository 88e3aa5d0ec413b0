"""The page: from stored files alone, the same bytes every time, readable by all."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import warnings
from collections import Counter
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from packtrain.compare.comparison import read_comparison
from packtrain.compare.plots import drawn_ends
from packtrain.compare.report import write_report
from packtrain.compare.tables import render_csv, render_latex, render_markdown, render_shown_csv
from packtrain.errors import PacktrainError
from tests.compare.synthetic_runs import make_manifest, make_run, store

VARIANTS = [
    ("pad_longest", "packtrain", True),
    ("balanced", "packtrain", True),
    ("bfd", "packtrain", False),
    ("trl:padding", "trl:padding", True),
    ("ffd", "packtrain", False),
]
TEXT = "{http://www.w3.org/2000/svg}text"
DATA = {
    "examples": 100, "tokens": 9000, "median": 60.0, "p99": 600.0, "max": 800, "max_length": 1024, "max_tokens": 4096,
    "edges": [10, 50, 100, 801], "counts": [40, 50, 10],
}  # fmt: skip


@pytest.fixture
def experiment(tmp_path):
    """An experiment of five variants, one of which failed with something that must not become markup."""
    runs = []
    for number, wobble in enumerate((1.0, 1.1, 0.95)):
        learns = number == 0
        runs += [
            make_run("pad_longest", number, rate=100 * wobble, learns=learns),
            make_run("balanced", number, rate=240 * wobble**1.05, learns=learns),
            make_run("bfd", number, rate=250 * wobble, updates=4, loss_factor=1.1, learns=learns),
            make_run("trl:padding", number, rate=90 * wobble, learns=learns),
        ]
    runs.append(make_run("ffd", 0, rate=1.0, failure="ValueError: <script>alert(1)</script>"))
    directory = tmp_path / "compare_synthetic"
    store(directory, make_manifest(VARIANTS, data=DATA), runs)
    return directory


class Page(HTMLParser):
    """Tags, ids, and the text of table cells."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.labels: list[str] = []
        self.external: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags[tag] += 1
        self.ids += [given["id"]] if "id" in given else []
        for name in ("href", "xlink:href", "src"):
            value = given.get(name)
            if value is not None:
                (self.references if value.startswith("#") else self.external).append(value)
        if tag == "svg":
            self.labels.append(given.get("aria-label") or "")


@pytest.mark.ci
@pytest.mark.slow
def test_the_same_files_give_the_same_bytes(experiment):
    first = write_report([experiment]).read_bytes()
    for name in ("report.html", "summary.csv", "summary.md", "speed.svg"):
        (experiment / name).rename(experiment / f"{name}.first")
    command = [sys.executable, "-m", "packtrain", "report", str(experiment)]
    subprocess.run(
        command, check=True, env={"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "PATH": ""}, capture_output=True
    )
    assert (experiment / "report.html").read_bytes() == first
    for name in ("summary.csv", "summary.md", "speed.svg"):
        assert (experiment / name).read_bytes() == (experiment / f"{name}.first").read_bytes()


def test_other_numbers_give_another_page(experiment):
    """The control: the page does depend on the runs."""
    before = write_report([experiment]).read_text()
    run = experiment / "runs" / "00-balanced.jsonl"
    run.write_text(run.read_text().replace('"real_tokens":1000', '"real_tokens":1100'))
    assert write_report([experiment]).read_text() != before


def test_the_page_is_self_contained_and_accessible(experiment):
    text = write_report([experiment]).read_text()
    page = Page(text)
    assert not page.external and page.tags["script"] == page.tags["img"] == page.tags["link"] == 0
    assert "@import" not in text and "http-equiv" not in text
    assert len(page.ids) == len(set(page.ids))
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    assert len(page.labels) >= 10 and all(len(label) > 20 for label in page.labels)
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    assert "#0000" not in text  # every colour of a figure is the page's


def test_the_page_says_what_happened(experiment):
    text = write_report([experiment]).read_text()
    assert "<code>balanced</code> is 2.4" in text and "95% interval over 3 paired rounds of one seed" in text
    assert "a processor, 2 cores, 1 thread" in text
    assert "failed: ValueError: &lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "MFU" not in text  # the device's peak is not known, so the column is absent


def test_the_picture_stands_alone_and_shows_speed_and_loss(experiment):
    write_report([experiment])
    text = (experiment / "speed.svg").read_text()
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "#0000" not in text and "var(" not in text and "<style" not in text and "#2f6fdb" in text
    shown = [element.text for element in root.iter(TEXT)]
    assert {"pad_longest", "balanced", "bfd", "trl:padding"} <= set(shown) and "ffd" not in shown  # it failed
    assert shown.count("the same in all 6 updates") == 2  # balanced, trl:padding
    assert "+15.0% held-out, same examples" in shown  # bfd: 4.6 x 1.1 for 4.4
    assert "packed over the whole epoch" in shown  # and not the fastest of one
    assert "balanced 2.4" in root.get("aria-label")


def test_an_interval_without_information_leaves_the_figures_readable(tmp_path):
    """Two rounds that disagree a hundredfold: the interval ends at a million, the longest bar at ten."""
    rates = {"pad_longest": (100.0, 100.0), "balanced": (100.0, 10_000.0)}
    runs = [make_run(name, n, rate=rate, learns=n == 0) for name, both in rates.items() for n, rate in enumerate(both)]
    store(tmp_path, make_manifest(VARIANTS[:2], rounds=2), runs)
    assert read_comparison(tmp_path).row("balanced").speed.high > 1e6
    assert drawn_ends(read_comparison(tmp_path).measured) == pytest.approx([1.0, 20.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns where nothing fits
        write_report([tmp_path])


def test_nothing_timed_no_picture(tmp_path):
    failed = [make_run(name, 0, rate=1.0, failure="RunFailed: no") for name in ("pad_longest", "balanced")]
    store(tmp_path, make_manifest(VARIANTS), failed)
    write_report([tmp_path])
    assert not (tmp_path / "speed.svg").exists() and (tmp_path / "report.html").exists()


def test_the_csv_has_every_variant_in_full_precision(experiment):
    write_report([experiment])
    rows = {row["variant"]: row for row in csv.DictReader((experiment / "summary.csv").open())}
    assert list(rows) == [name for name, _, _ in VARIANTS]
    comparison = read_comparison(experiment)
    assert float(rows["balanced"]["speed_estimate"]) == comparison.row("balanced").speed.estimate
    assert rows["ffd"]["failure"].startswith("ValueError") and rows["ffd"]["real_tokens_per_second"] == ""
    assert float(rows["bfd"]["equal_updates_loss"]) == pytest.approx(4.6 * 1.1)


def test_a_table_for_a_paper_has_every_loss_and_its_numbers_as_papers_write_them(tmp_path):
    """The loss after as many updates belongs to what makes other updates; control: where nothing does it is left out."""
    runs = [make_run(name, n, rate=100.0 + n * (name != "pad_longest"), loss_factor=factor, updates=updates)
            for name, factor, updates in (("pad_longest", 1, 6), ("balanced", 1 + 2e-6, 6), ("bfd", 1.1, 4))
            for n in range(3)]  # fmt: skip
    store(tmp_path, make_manifest(VARIANTS[:3]), runs)
    text = render_latex(read_comparison(tmp_path))
    head, *lines = [line for line in text.splitlines() if " & " in line]
    assert "held-out loss, same examples" in head and "held-out loss, same updates" in head
    assert "5.0600 for 4.6000 after 4" in lines[2] and r"$2 \times 10^{-6}$" in lines[1] and "2e-6" not in text
    assert re.search(r"1\.01x \(\d\.\d+--\d\.\d+\)", lines[1])
    store(tmp_path / "keeps", make_manifest(VARIANTS[:2]), runs[:6])
    assert "same updates" not in render_latex(read_comparison(tmp_path / "keeps"))


def test_a_name_is_no_formula_and_no_command(tmp_path):
    """In a spreadsheet, a table of Markdown and a paper."""
    name = r"=cmd('x')|\input{a}~^"
    variants = [VARIANTS[0], (name, "packtrain", True), ("-safe", "packtrain", True)]
    runs = [make_run(each, 0, rate=100.0) for each, _, _ in variants]
    store(tmp_path / "compare", make_manifest(variants, rounds=1), runs)
    comparison = read_comparison(tmp_path / "compare")
    for text in (render_csv(comparison), render_shown_csv(comparison)):
        cells = [row[0] for row in csv.reader(text.splitlines())]
        assert cells == ["variant", "pad_longest", f"'{name}", "'-safe"]
    (line,) = (line for line in render_markdown(comparison).splitlines() if "cmd" in line and line.startswith("|"))
    assert re.split(r"(?<!\\)\|", line)[1].strip() == name.replace("|", r"\|")
    assert r"=cmd('x')\textbar{}\textbackslash{}input\{a\}\textasciitilde{}\textasciicircum{}" in render_latex(
        comparison
    )


@pytest.mark.ci
@pytest.mark.slow
def test_several_experiments_side_by_side(experiment, tmp_path):
    other = tmp_path / "compare_other"
    runs = [make_run(name, 0, rate=rate) for name, rate in (("pad_longest", 100.0), ("stream", 300.0))]
    manifest = make_manifest([VARIANTS[0], ("stream", "packtrain", False)], rounds=1, name="other")
    store(other, manifest, runs)
    path = write_report([experiment, other])
    assert path == tmp_path / "report.html"
    text = path.read_text()
    page = Page(text)
    assert len(page.ids) == len(set(page.ids)) and {"e0", "e1"} <= set(page.ids)
    assert "<td>3.00x</td>" in text.replace("</td><td>", "</td>\n<td>")
    assert (other / "report.html").exists() and (other / "summary.md").exists()
    assert "Speed in every experiment" in text
    alone = write_report([other], out=tmp_path / "alone.html").read_text()
    assert "Speed in every experiment" not in alone and "The variants" in alone  # its own table says the same


def test_an_experiment_without_runs_yet_has_a_page(tmp_path):
    store(tmp_path, make_manifest(VARIANTS), [])
    assert "nothing to compare" in write_report([tmp_path]).read_text()


def test_before_the_reference_has_run_there_is_a_page_without_ratios(tmp_path):
    store(tmp_path, make_manifest(VARIANTS), [make_run("balanced", 0, rate=100.0)])
    text = write_report([tmp_path]).read_text()
    assert "The reference, <code>pad_longest</code>, was not timed" in text
    row = read_comparison(tmp_path).row("balanced")
    assert row.tokens_per_second == pytest.approx(100.0) and row.speed is None


def test_a_directory_without_an_experiment_is_refused(tmp_path):
    with pytest.raises(PacktrainError, match=r"contains no comparison: it has no manifest.json"):
        write_report([tmp_path])
    with pytest.raises(PacktrainError, match="nowhere: there is no such directory"):
        write_report([tmp_path / "nowhere"])
