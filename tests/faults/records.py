r"""What a run of the fault-injection suite came to, as a table: a plugin of pytest.

    python -m pytest -p tests.faults.records --records results/faults -m "slow or not slow" \
        tests/faults tests/test_recipe.py tests/data/test_bad_rows.py tests/training/test_checkpoint.py

A part of it (some of the files) renews its own lines of the table and leaves the others. A line is a test function with all
its parameters. `record_property("times", 50)` counts a test fifty times, `record_property("note", ...)` says what it
measured. A test that fails counts as held 0 times.
"""

from __future__ import annotations

import json
import platform
from importlib import import_module
from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption("--records", type=Path, help="directory for README.md and faults.json")


def pytest_configure(config):
    if config.getoption("--records"):
        config.pluginmanager.register(_Records(config), "faults-records")


class _Records:
    def __init__(self, config: pytest.Config):
        self.config, self.lines = config, {}

    def pytest_runtest_logreport(self, report: pytest.TestReport):
        file, _, name = report.nodeid.partition("::")
        key = (file, name.partition("[")[0])
        line = self.lines.setdefault(key, {"held": 0, "of": 0, "skipped": 0, "seconds": 0.0, "notes": []})
        line["seconds"] += report.duration
        properties = report.user_properties if report.when == "call" else []
        times = sum(value for kind, value in properties if kind == "times") or 1
        parameters = name.partition("[")[2].rstrip("]")
        notes = [value for kind, value in properties if kind == "note"]
        line["notes"] += [f"({parameters}) {note}" if parameters else note for note in notes]
        if report.skipped:
            line["skipped"] += 1
        elif report.when == "call":
            line["of"] += times
            line["held"] += times * report.passed
        elif report.failed:  # in setup or teardown
            line["of"] += 1

    def pytest_sessionfinish(self, session):
        from packtrain.training.summary import describe_machine, package_versions

        directory = self.config.getoption("--records")
        directory.mkdir(parents=True, exist_ok=True)
        about = {"machine": describe_machine() | {"system": platform.system()}, "versions": package_versions()}
        path, lines = directory / "faults.json", {}
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            if any(before[key] != value for key, value in about.items()):
                pytest.exit(f"{path} is of another machine or other versions; choose another directory", 2)
            lines = {(line["file"], line["test"]): line for line in before["faults"]}
        for (file, test), line in self.lines.items():
            if line["of"] or (file, test) not in lines:
                lines[file, test] = {"file": file, "test": test, **line, "seconds": round(line["seconds"], 1)}
        found = about | {"faults": [lines[key] for key in sorted(lines)]}
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (directory / "README.md").write_text(page(found), encoding="utf-8")


def page(found: dict) -> str:
    """The table of `faults.json`, as Markdown."""
    held, of = (sum(line[key] for line in found["faults"]) for key in ("held", "of"))
    seconds = sum(line["seconds"] for line in found["faults"])
    machine, versions = found["machine"], found["versions"]
    software = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [
        "# Fault injection",
        "",
        f"{held:,} of {of:,} held, in {seconds / 60:.0f} minutes. Made by",
        "",
        *(line for line in (__doc__ or "").splitlines() if line.startswith("    ")),
        "",
        f"on {machine['cpu']} ({machine['cores']} cores, {machine.get('memory_gib')} GiB), {machine['system']}; {software}.",
    ]
    files = dict.fromkeys(line["file"] for line in found["faults"])
    for file in files:
        about = (import_module(file.removesuffix(".py").replace("/", ".")).__doc__ or file).splitlines()[0]
        lines += ["", f"## {about}", "", f"`{file}`", "", "| what | held | seconds | |", "|---|---|---|---|"]
        for line in found["faults"]:
            if line["file"] != file:
                continue
            what = line["test"].removeprefix("test_").replace("_", " ")
            more = "; ".join([*line["notes"], *([f"{line['skipped']} skipped"] if line["skipped"] else [])])
            lines.append(f"| {what} | {line['held']}/{line['of']} | {line['seconds']:.1f} | {more} |")
    return "\n".join(lines) + "\n"
