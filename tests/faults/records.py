r"""What a run of the fault-injection suite came to, as a table: a plugin of pytest.

    python -m pytest -p tests.faults.records --records results/faults -m "slow or not slow" \
        tests/faults tests/recipe/test_recipe.py tests/recipe/test_bad_recipes.py tests/data/test_bad_rows.py \
        tests/training/test_checkpoint.py

A part of it (some of the files) renews its own lines of the table and leaves the others; tests in none of them are said
to be not run. A line is a test function with all its parameters. `record_property("times", 50)` counts a test fifty times,
`record_property("note", ...)` says what it measured. A test that fails counts as held 0 times.
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
        self.config, self.lines = config, {}  # id of a test -> what it came to

    def pytest_runtest_logreport(self, report: pytest.TestReport):
        empty = {"held": 0, "of": 0, "skipped": 0, "seconds": 0.0, "notes": []}
        line = self.lines.setdefault(report.nodeid, empty)
        line["seconds"] = round(line["seconds"] + report.duration, 2)
        properties = report.user_properties if report.when == "call" else []
        times = sum(value for kind, value in properties if kind == "times") or 1
        line["notes"] += [value for kind, value in properties if kind == "note"]
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
        machine = describe_machine() | {"system": platform.system()}
        machine.pop("cores")  # those of this process, which may have been given one
        found = {"machine": machine, "versions": package_versions(), "tests": self.lines}
        path = directory / "faults.json"
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            if any(before[key] != found[key] for key in ("machine", "versions")):
                pytest.exit(f"{path} is of another machine or other versions; choose another directory", 2)
            kept = {
                name: line for name, line in before["tests"].items() if function_of(name) in functions(file_of(name))
            }
            found["tests"] = dict(sorted((kept | self.lines).items()))
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (directory / "README.md").write_text(page(found), encoding="utf-8")


def file_of(test: str) -> str:
    return test.partition("::")[0]


def function_of(test: str) -> str:
    return test.partition("::")[2].partition("[")[0]


def functions(file: str) -> list[str]:
    """The tests that a file has, whichever were run; none where it is gone."""
    if not Path(file).exists():
        return []
    module = import_module(file.removesuffix(".py").replace("/", "."))
    return [name for name in vars(module) if name.startswith("test_")]


def page(found: dict) -> str:
    """The table of `faults.json`, as Markdown."""
    tests, machine = found["tests"], found["machine"]
    held, of, seconds = (sum(line[key] for line in tests.values()) for key in ("held", "of", "seconds"))
    software = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    text = [
        "# Fault injection",
        "",
        f"{held:,} of {of:,} held, in {seconds / 60:.0f} minutes. Made by",
        "",
        *(line for line in (__doc__ or "").splitlines() if line.startswith("    ")),
        "",
        f"on {machine['cpu']} ({machine.get('memory_gib')} GiB), {machine['system']}; {software}.",
    ]
    grouped: dict[str, dict[str, list[tuple[str, dict]]]] = {}  # file -> function -> (parameters, line)
    for file in sorted(
        {file_of(name) for name in tests} | {str(path) for path in Path("tests/faults").glob("test_*.py")}
    ):
        grouped[file] = {function: [] for function in functions(file)}
    for name, line in tests.items():
        parameters = name.partition("[")[2].rstrip("]")
        grouped[file_of(name)][function_of(name)].append((parameters, line))
    for file, lines_of in grouped.items():
        about = (import_module(file.removesuffix(".py").replace("/", ".")).__doc__ or file).splitlines()[0]
        text += ["", f"## {about}", "", f"`{file}`", "", "| what | held | seconds | |", "|---|---|---|---|"]
        for function, lines in lines_of.items():
            held, of, skipped, seconds = (
                sum(line[key] for _, line in lines) for key in ("held", "of", "skipped", "seconds")
            )
            notes = [f"{parameters}: {note}".removeprefix(": ") for parameters, line in lines for note in line["notes"]]
            notes += [f"{skipped} skipped"] if skipped else [] if lines else ["not run"]
            what = function.removeprefix("test_").replace("_", " ")
            text.append(f"| {what} | {held}/{of} | {seconds:.1f} | {'; '.join(notes)} |")
    return "\n".join(text) + "\n"
