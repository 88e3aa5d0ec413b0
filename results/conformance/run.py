"""Asks trainers what becomes of documents, tokens and updates, one harness for all.

    python results/conformance/run.py                        # half an hour on two cores
    python results/conformance/run.py --setting "SFTTrainer, packing bfd" --only isolated gradients   # these cells anew

Every setting trains a tiny model some thirty times, and what it did is looked at: the micro-batches that reached its
`training_step`, the gradients that its optimizer got, its losses, weights and messages (`watch.py`). Cells that are stored
are kept, so that the command goes on where it stopped; `--again` asks all anew. Environments of other projects are made
under `out/conformance` (`environments.py`).

Writes `results/conformance/bench.json` and `results/conformance/README.md` after every answer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, as results/ is not installed
from results.conformance.environments import PINNED, REMOVED, ROOT, make, python_of
from results.conformance.questions import ON_RANKS, QUESTIONS, TOLERANCE
from results.conformance.rows import CONFIGS, PACK
from results.conformance.settings import SETTINGS
from results.page import RESULTS, limits, origin, origin_lines, store

PATIENCE = 900  # seconds without an answer after which a process is ended
HERE = Path(__file__).resolve().parent
CONTROL = "control"
Cells = dict[str, dict[str, dict[str, str]]]


def ask(environment: str, wanted: dict[str, list[str]], *, ranks: int, keep: Any) -> None:
    """Runs one process (or two) over cells of an environment, and gives `keep` every answer.

    A cell that ends the process is an answer, too.
    """
    wanted = {name: list(questions) for name, questions in wanted.items() if questions}
    while wanted:
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory) / "answers.jsonl"
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
            python = str(python_of(environment))
            command = [python, *launcher, "-m", "results.conformance.worker", json.dumps(wanted), str(out)]
            settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            settings |= {"HF_DATASETS_CACHE": str(Path(directory) / "cache"), "TOKENIZERS_PARALLELISM": "false"}
            process = subprocess.Popen(command, cwd=ROOT, env=os.environ | settings)
            known, last = 0, time.monotonic()
            while True:
                ended = process.poll() is not None
                for line in _lines(out)[known:]:
                    keep(line)
                    wanted[line["setting"]].remove(line["question"])
                    known, last = known + 1, time.monotonic()
                if ended:
                    break
                if time.monotonic() - last > PATIENCE:
                    process.terminate()
                time.sleep(1)
        wanted = {name: questions for name, questions in wanted.items() if questions}
        if wanted:  # it ended at the first that it did not answer
            name = next(iter(wanted))
            keep({"setting": name, "question": wanted[name].pop(0), "verdict": "failed", "figure": "its process ended"})
            wanted = {name: questions for name, questions in wanted.items() if questions}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def reproduced(environment: str, script: Path, before: dict[str, str]) -> dict[str, str]:
    """Runs a reproducer in its environment, if it is not the one of `before`, and returns what it says and prints.

    Nothing is returned where its environment can't be made.
    """
    _, says, code = script.read_text(encoding="utf-8").split('"""', 2)
    if before.get("code") == code.strip():
        return before | {"says": " ".join(says.split())}
    if make(environment):
        return {}
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [str(python_of(environment)), "-W", "ignore", str(script)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=PATIENCE)
    if done.returncode:
        prints = (done.stderr.strip().splitlines() or ["it failed and said nothing"])[-1]
    else:
        prints = "\n".join(line for line in done.stdout.strip().splitlines() if "[WARNING]" not in line)  # of DeepSpeed
    return {"says": " ".join(says.split()), "code": code.strip(), "prints": prints}


def missing(result: dict[str, Any], names: Iterable[str]) -> list[tuple[str, str]]:
    """Returns the settings and questions that have no answer yet."""
    cells = result["cells"]
    return [(name, question) for name in names for question in QUESTIONS if question not in cells.get(name, {})]


# The page


def symbol(cell: dict[str, str] | None) -> str:
    if cell is None:
        return ""
    shown = {
        "yes": "+",
        "no": "**no**",
        "refused": "refuses",
        "n/a": "n/a",
        "not asked": "not asked",
        "failed": "fails",
    }[cell["verdict"]]
    return f"{shown} {cell['figure']}".strip() if cell["verdict"] == "no" else shown


def markdown(result: dict[str, Any]) -> str:
    cells: Cells = result["cells"]
    return "\n".join(
        [
            "# What trainers do with documents, tokens and updates",
            "",
            *textwrap.wrap(
                "Do documents stay apart, are tokens lost, and is an update that of padded batches? Every cell is "
                "measured by one harness on the same rows and the same weights: tiny models of random weights in float32 "
                "on a CPU, with each trainer's defaults but for what makes runs comparable (`arguments.py`, `settings.py`, "
                "`peers/`). Other projects run in environments of their own.",
                width=118,
            ),
            "",
            *counts(cells),
            "",
            *questions_lines(),
            "",
            *table(cells),
            "",
            *notes(cells),
            *reproducer_lines(result.get("reproducers", {})),
            *versions_lines(result),
            *environment_lines(result.get("left_out", {})),
            *limits(
                "A CPU has no flash-attention: flat layouts ran with SDPA, and a kernel may isolate what it leaks, or the "
                "other way round. Tiny Llama and LFM2 models; other architectures are in `results/audit`. What a trainer "
                "does on purpose (a packer's larger updates, a collator for language modelling that supervises all) is a "
                "**no** as well, for the question is only whether it is so. Only the settings that are named were asked; "
                "most trainers have options that change single cells. torchtune was given the study's tokenizer, with its "
                "own function for tokenizers without special tokens. Axolotl has not been asked: building its trainer "
                "imports Triton, and whether it trains on a CPU was not found out. "
                "Speed is compared in `results/compare_long_tail`."
            ),
            *origin_lines(result, "torch", "transformers", "trl"),
        ]
    )


def counts(cells: Cells) -> list[str]:
    others = [name for name in cells if name != CONTROL]
    failing = [name for name in QUESTIONS if cells.get(CONTROL, {}).get(name, {}).get("verdict") == "no"]
    text = (
        f"{len(others)} settings by {len(QUESTIONS)} questions. The last row is a control, a trainer that was made to "
        f"break: {len(failing)} of the {len(QUESTIONS)} questions see it. `+` yes; `refuses`: it says that it cannot, and "
        "trains nothing; figures of a **no** are relative differences, or counts."
    )
    if empty := len(missing({"cells": cells}, cells)):
        text += f" {empty} cells are empty: they have not been asked yet, and the command goes on with them."
    return textwrap.wrap(text, width=118)


def questions_lines() -> list[str]:
    lines = []
    for number, (name, question) in enumerate(QUESTIONS.items(), 1):
        text = " ".join(str(question.__doc__).split())
        lines += textwrap.wrap(f"{number}. **{name}**: {text}", width=118, subsequent_indent="   ")
    text = (
        f"Differences below {TOLERANCE:.0e} are a yes. Packs are of {PACK} tokens; updates of 4 x 2 examples unless a "
        "question says otherwise. Models: " + ", ".join(CONFIGS) + "."
    )
    return [*lines, "", *textwrap.wrap(text, width=118)]


def table(cells: Cells) -> list[str]:
    head = "| setting | " + " | ".join(str(number) for number in range(1, len(QUESTIONS) + 1)) + " |"
    rows = [
        f"| {name} | " + " | ".join(symbol(answers.get(question)) for question in QUESTIONS) + " |"
        for name, answers in cells.items()
    ]
    return [head, "|---" * (len(QUESTIONS) + 1) + "|", *rows]


def notes(cells: Cells) -> list[str]:
    """Returns why cells are `n/a`, `not asked`, `refuses` or `fails`."""
    why: dict[str, list[str]] = {}
    for name, answers in cells.items():
        for question, cell in answers.items():
            if cell["verdict"] in ("n/a", "not asked", "refused", "failed"):
                why.setdefault(cell["figure"], []).append(f"{name}: {question}")
    lines = ["Not asked, refused or failed:", ""] if why else []
    for reason, where in why.items():
        reason = reason.replace("|", "/").replace("<", "&lt;")
        lines += textwrap.wrap(f"- {reason} ({'; '.join(where)})", width=118, subsequent_indent="  ")
    return [*lines, ""]


def reproducer_lines(found: dict[str, dict[str, str]]) -> list[str]:
    lines = [
        "## Reproducers",
        "",
        'A cell alone, in this harness: `python results/conformance/run.py --setting "NAME" --only "QUESTION"`. With the',
        "libraries alone (`reproducers/`), and what they print:",
        "",
    ]
    for one in found.values():
        lines += [f"{one['says']}", "", "```python", one["code"], "```", "```text", one["prints"], "```", ""]
    return lines


def versions_lines(result: dict[str, Any]) -> list[str]:
    groups: dict[str, list[str]] = {}
    for name, versions in result.get("versions", {}).items():
        shown = ", ".join(f"{package} {version}" for package, version in versions.items())
        groups.setdefault(shown, []).append(name)
    lines = ["## Versions", ""]
    for shown, names in groups.items():
        lines += textwrap.wrap(f"- {shown}: {'; '.join(names)}", width=118, subsequent_indent="  ")
    return lines


def environment_lines(left_out: dict[str, str]) -> list[str]:
    lines = ["", "## Environments of other projects", ""]
    text = "Made by the command, over packtrain's environment: what is not named here (torch among it) is that one's."
    lines += [*textwrap.wrap(text, width=118), ""]
    for environment, pins in PINNED.items():
        text = f"- {environment}: {', '.join(pins)}"
        if environment in REMOVED:
            text += f"; without `{REMOVED[environment]}`, which were built for CUDA"
        if environment in left_out:
            text = f"- {environment} could not be made, and is left out: {left_out[environment]}"
        lines += textwrap.wrap(text, width=118, subsequent_indent="  ", break_on_hyphens=False)
    return lines


def reproducers() -> dict[str, tuple[str, Path]]:
    """Returns name -> environment and script; the environment is its folder, and packtrain's where it has none."""
    scripts = [("", path) for path in sorted((HERE / "reproducers").glob("*.py"))]
    for environment in PINNED:
        scripts += [(environment, path) for path in sorted((HERE / "reproducers" / environment).glob("*.py"))]
    return {f"{environment} {path.stem}".strip(): (environment, path) for environment, path in scripts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--setting", nargs="+", choices=list(SETTINGS), help="these settings (default: all)")
    parser.add_argument("--only", nargs="+", choices=list(QUESTIONS), help="these questions (default: all)")
    parser.add_argument("--again", action="store_true", help="ask also what is stored")
    parser.add_argument("--out", type=Path, default=RESULTS / "conformance", help="default results/conformance")
    arguments = parser.parse_args()
    named = bool(arguments.setting or arguments.only)
    stored = arguments.out / "bench.json"
    result = json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else {"cells": {}, "versions": {}}
    result |= origin("conformance") | {"command": "python results/conformance/run.py"}
    empty = missing(result, SETTINGS)
    wanted = {
        name: [
            question
            for question in arguments.only or QUESTIONS
            if named or arguments.again or (name, question) in empty
        ]
        for name in arguments.setting or SETTINGS
    }

    def keep(line: dict[str, Any]) -> None:
        cell = {"verdict": line["verdict"], "figure": line["figure"]}
        result["cells"].setdefault(line["setting"], {})[line["question"]] = cell
        if "versions" in line:
            result["versions"][line["setting"]] = line["versions"]
        write()

    def write() -> None:
        for part in ("cells", "versions"):
            result[part] = {name: result[part][name] for name in SETTINGS if name in result[part]}
        store(arguments.out, result, markdown(result), depth=3)

    left_out: dict[str, str] = result.setdefault("left_out", {})
    for environment in ("", *PINNED):
        of_it = {name: questions for name, questions in wanted.items() if SETTINGS[name].environment == environment}
        if not any(of_it.values()):
            continue
        if problem := make(environment):
            left_out[environment] = problem
            continue
        left_out.pop(environment, None)
        for ranks in (1, 2):
            cells = {name: [one for one in of_it[name] if (one in ON_RANKS) == (ranks > 1)] for name in of_it}
            ask(environment, cells, ranks=ranks, keep=keep)
    if not named:
        before = {} if arguments.again else result.get("reproducers", {})
        result["reproducers"] = {}
        for name, (environment, script) in reproducers().items():
            if environment not in left_out and (found := reproduced(environment, script, before.get(name, {}))):
                result["reproducers"][name] = found
    write()
    print(markdown(result))


if __name__ == "__main__":
    main()
