"""Trains nothing: asks whether what is trained is what a conversation says, with every chat template that TRL ships.

    python results/templates/run.py          # about fifteen minutes on two cores

Every kind of conversation goes through packtrain with every template and two tokenizers (`assistant_only_loss`); text, mask
and round trip are compared with slow, literal references (`reference.py`). The same rows go through TRL's SFTTrainer, and
rows of GSM8K are tokenised by this code and by that before chat templates were located, in turns.

Writes `results/templates/bench.json` and `results/templates/README.md`.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import textwrap
from collections import Counter
from pathlib import Path

import trl

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, as results/ is not installed
from results.page import RESULTS, limits, origin, origin_lines, store
from results.templates.cells import WARN, Cell, encode, judge
from results.templates.conversations import CONVERSATIONS
from results.templates.peer import compare
from results.templates.speed import MODES, NEW_MODES
from results.templates.vocabularies import TOKENIZERS

HERE = Path(__file__).resolve().parent
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
BEFORE = "68529ed"  # the last commit that did not locate turns
GSM8K = HERE.parents[2] / "shared" / "data" / "gsm8k" / "train.jsonl"
ROUNDS, ROWS = 5, 3000


def templates() -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(TEMPLATES.glob("*.jinja"))}


# ------------------------------------------------------------------------------------------------- cells


def judge_template(name: str, sources: dict[str, str]) -> dict[str, dict[str, list[Cell]]]:
    """tokenizer -> kind -> its cell, and a second one with `on_lost_content: warn` where text was left out."""
    found: dict[str, dict[str, list[Cell]]] = {}
    for kind_of_tokenizer, make in TOKENIZERS.items():
        tokenizer = make(sources[name])
        cells = found[kind_of_tokenizer] = {}
        for options in ({}, {"on_lost_content": "warn"}):
            kinds = [k for k in CONVERSATIONS if not options or WARN in cells[k][0].problem]
            encoded = encode(tokenizer, [CONVERSATIONS[kind] for kind in kinds], assistant_only=True, **options)
            for kind, one in zip(kinds, encoded, strict=True):
                cell = judge(tokenizer, CONVERSATIONS[kind], one, sources.get(f"{name}_training"))
                cells.setdefault(kind, []).append(cell)
    return found


def judge_all(sources: dict[str, str]) -> dict:
    """template -> tokenizer -> kind -> cells, as they are stored."""
    return {
        name: {
            tokenizer: {kind: [cell.as_dict() for cell in pair] for kind, pair in kinds.items()}
            for tokenizer, kinds in judge_template(name, sources).items()
        }
        for name in sources
    }


def symbol(cells: list[dict]) -> str:
    """The cell of the table: of one conversation, with one tokenizer."""
    first, *second = cells
    if any(cell.get("failures") for cell in cells):
        return "**x**"
    if first["text"] == "refused":
        return "w" if second and second[0]["text"] != "refused" else "r"
    return {"complete": "+", "noted": "n"}[first["text"]]


def summary(cells: dict) -> dict[str, int]:
    """Counts cells by what became of them."""
    flat = [cells[t][v][k] for t in cells for v in cells[t] for k in cells[t][v]]
    firsts, seconds = [cell[0] for cell in flat], [cell[1] for cell in flat if cell[1:]]
    trained = [cell for cell in firsts + seconds if cell["text"] != "refused"]
    return {
        "templates": len(cells),
        "cells": len(flat),
        "complete": sum(cell["text"] == "complete" for cell in firsts),
        "noted": sum(cell["text"] == "noted" for cell in firsts),
        "refused": sum(cell["text"] == "refused" for cell in firsts),
        "warned": sum(cell["text"] != "refused" for cell in seconds),
        "compared": len(trained),
        "by spans": sum(cell["reference"] != "containment" for cell in trained),
        "tokens": sum(cell["tokens"] for cell in trained),
        "silent failures": sum(bool(cell.get("failures")) for cell in firsts + seconds),
    }


# ------------------------------------------------------------------------------------------------- peer and speed


def compare_peer(sources: dict[str, str], names: list[str]) -> dict[str, dict[str, Counter]]:
    """template -> `messages` (with markers), `prompts` (as shipped) -> verdicts over all conversations and tokenizers."""
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        for name in names:
            training = sources.get(f"{name}_training")
            counts = {"messages": Counter(), "prompts": Counter()}
            for make in TOKENIZERS.values():
                if training:
                    counts["messages"] += compare(make(training), directory, prompts=False)
                counts["prompts"] += compare(make(sources[name]), directory, prompts=True)
            found[name] = counts
            print(name, {way: dict(count) for way, count in counts.items()}, flush=True)
    return found


def unpack_before(directory: str) -> str:
    """Writes the code before into a directory."""
    done = subprocess.run(["git", "archive", BEFORE], cwd=HERE.parents[1], stdout=subprocess.PIPE, check=True)
    tarfile.open(fileobj=io.BytesIO(done.stdout)).extractall(directory, filter="data")
    return directory


def measure_speed(before: Path | None, rows: Path, rounds: int) -> dict:
    """Rows a CPU second of both, in processes that take turns; every other round begins with the other."""
    if not rows.exists():
        return {"skipped": "no ../shared/data/gsm8k/train.jsonl next to the checkout"}
    speeds: dict[str, list[dict[str, float]]] = {"before": [], "now": []}
    with tempfile.TemporaryDirectory() as directory:
        paths = {"before": before or unpack_before(directory), "now": HERE.parents[1]}
        for number in range(rounds):
            for way in list(speeds)[:: -1 if number % 2 else 1]:
                command = [sys.executable, str(HERE / "speed.py"), str(rows), "--rows", str(ROWS)]
                command += ["--new"] if way == "now" else []
                environment = os.environ | {"PYTHONPATH": str(paths[way]), "TOKENIZERS_PARALLELISM": "false"}
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                speeds[way].append(json.loads(done.stdout.splitlines()[-1]))
                print(way, speeds[way][-1], flush=True)
    return {"rounds": rounds, "rows": ROWS, "speeds": speeds}


# ------------------------------------------------------------------------------------------------- page


def markdown(result: dict) -> str:
    cells = result["cells"]
    counts = summary(cells)
    kinds = list(next(iter(next(iter(cells.values())).values())))
    lines = [
        "# Chat templates",
        "",
        *_wrapped(
            "Is what is trained what a conversation says, with the templates that models really have? Every "
            f"template that TRL {result['packages']['trl']} ships, training variants included "
            f"({counts['templates']}), by {len(kinds)} kinds of conversations and {len(result['tokenizers'])} "
            f"tokenizers ({', '.join(result['tokenizers'])}), with `assistant_only_loss`."
        ),
        "",
        "| cells | whole text | the same, reasoning of earlier turns noted | refused | of these trained with `warn` "
        "| **silent failures** |",
        "|---:|---:|---:|---:|---:|---:|",
        f"| {counts['cells']:,} | {counts['complete']:,} | {counts['noted']:,} | {counts['refused']:,} "
        f"| {counts['warned']:,} | **{counts['silent failures']}** |",
        "",
        *_wrapped(
            f"{counts['compared']:,} rows of {counts['tokens']:,} tokens were trained on. In {counts['by spans']:,} "
            "of them the factor of every token equals that of a reference (below). In the others what is learnt "
            "holds the words of the turns, and none of another role. In all, decoding what is learnt gives each "
            "turn's words, and otherwise the template's markup."
        ),
        "",
        *_table(cells, kinds),
        *_references(cells),
        *_refusals(cells),
        *_peer(result["peer"]),
        *_speed(result["speed"]),
        *limits(
            "Templates as TRL stores them, with two small tokenizers that know their special tokens and not the "
            "models' own; one row of each kind; text only. The references share the template engine with packtrain, "
            "and no code. Where a template renders earlier messages differently once one follows and has no "
            "training variant, containment does not say which of its own markup is to be learnt. GLM-4's models "
            "stop at the `<|user|>` of the next message, which is not learnt unless the template's markers enclose "
            "it."
        ),
        *origin_lines(result, "transformers", "trl"),
    ]
    return "\n".join(lines)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, width=118)


def _table(cells: dict, kinds: list[str]) -> list[str]:
    lines = [
        *_wrapped(
            "`+` whole, exact and back; `n` the same, with a note that the reasoning of earlier turns is left out; "
            "`w` refused as text is left out, and exact when trained with `data.on_lost_content: warn`; `r` "
            "refused; **x** a silent failure. Two signs: byte-level, sentencepiece."
        ),
        "",
        *(f"{number}. {kind}" for number, kind in enumerate(kinds, 1)),
        "",
        "| template | " + " | ".join(str(number) for number, _ in enumerate(kinds, 1)) + " |",
        "|---|" + "---|" * len(kinds),
    ]
    for name, by_tokenizer in cells.items():
        row = []
        for kind in kinds:
            signs = [symbol(by_kind[kind]) for by_kind in by_tokenizer.values()]
            row.append(signs[0] if len(set(signs)) == 1 else " ".join(signs))
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    return lines


def _references(cells: dict) -> list[str]:
    names = ["own markers", "training markers", "prefixes", "twins", "containment"]
    lines = [
        "",
        "## References",
        "",
        *_wrapped(
            "Rows by the reference that their mask was compared with, the first that applies. *Own markers*: the "
            "template's `{% generation %}`. *Training markers*: those of its training variant, where it renders the "
            "same text. *Prefixes*: renderings of the messages up to a turn, where they begin the text. *Twins*: "
            "the places of the words of a conversation whose strings are all unique, up to what is shared with the "
            "generation prompt and with the rendering that stops at the turn. *Containment*: where not even that is "
            "clear. Masks differ from a training variant's markers on purpose, by rule. *prompt*: what the "
            "generation prompt contains is not learnt. *stop*: what the template still renders when the "
            "conversation stops at a turn is. *next*: what the next message begins with is not. *void*: nor is a "
            "turn of which no word is rendered."
        ),
        "",
        "| template | " + " | ".join(names) + " | rules (rows) |",
        "|---|" + "---:|" * len(names) + "---|",
    ]
    for name, by_tokenizer in cells.items():
        flat = [cell for by_kind in by_tokenizer.values() for pair in by_kind.values() for cell in pair]
        counts = Counter(cell.get("reference") for cell in flat)
        rules = Counter(rule for cell in flat for rule in cell.get("rules", ()))
        said = ", ".join(f"{rule} {count}" for rule, count in sorted(rules.items()))
        lines.append(f"| {name} | " + " | ".join(str(counts[name]) for name in names) + f" | {said} |")
    return lines


def _refusals(cells: dict) -> list[str]:
    problems = Counter(
        cell["problem"]
        for by_tokenizer in cells.values()
        for by_kind in by_tokenizer.values()
        for pair in by_kind.values()
        for cell in pair
        if cell["text"] == "refused"
    )
    lines = ["", "## Refusals", "", "All there are, with the number of rows.", "", "| rows | refusal |", "|---:|---|"]
    return lines + [
        f"| {count} | {problem.replace('|', chr(92) + '|').replace('{{', '{ {')} |"
        for problem, count in sorted(problems.items(), key=lambda pair: (-pair[1], pair[0]))
    ]


PEER_NOTES = {  # verdict -> what it means
    "packtrain refuses": "TRL trains on what the template has left of the row, or on an empty answer.",
    "TRL fails": "most of all on tool calls with arguments in JSON text, which these templates want as objects.",
    "TRL renders another text": "arguments in JSON text are written as JSON once more (gpt-oss), put within the braces of "
    "the template (Gemma 4), or keep the escapes of the row (Qwen 3), where packtrain gives the template an object.",
    "same ids, packtrain has the reference's mask": "transformers' map of characters to tokens misses all but the first of "
    "the tokens that a character is made of, and takes the added token that swallowed the blanks an answer begins with.",
    "prompt ends inside a token: packtrain splits it": "prompt and completion are tokenised apart, as at inference.",
    "the template renders the prompt otherwise when an answer follows": "TRL learns from where the ids part, "
    "packtrain from where the turn begins.",
    "same ids, TRL has the reference's mask": "a failure of packtrain.",
    "packtrain renders another text": "a failure of packtrain.",
    "both masks differ": "a failure of both.",
    "ids differ": "not explained.",
}


def _peer(peer: dict) -> list[str]:
    lines = [
        "",
        "## TRL's SFTTrainer",
        "",
        *_wrapped(
            "The same rows (without switches) through TRL's tokenisation, with both tokenizers: conversations with "
            "`assistant_only_loss` and the training template in both programs, and prompt with completion with the "
            "template as shipped. Ids and labels are compared but for the first label, which nothing predicts."
        ),
    ]
    seen: set[str] = set()
    for way, title in (("messages", "Conversations, `assistant_only_loss`"), ("prompts", "Prompt and completion")):
        rows = {name: counts[way] for name, counts in peer.items() if counts[way]}
        total = sum((Counter(counts) for counts in rows.values()), Counter())
        seen |= total.keys()
        columns = ["identical", *sorted(total.keys() - {"identical"})]
        lines += ["", f"{title}:", "", f"| template | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
        for name, counts in [*rows.items(), ("**all**", total)]:
            lines.append(f"| {name} | " + " | ".join(str(counts.get(column, 0)) for column in columns) + " |")
    notes = [f"*{verdict}*: {note}" for verdict, note in PEER_NOTES.items() if verdict in seen]
    return [*lines, "", *_wrapped(" ".join(notes))]


def _speed(speed: dict) -> list[str]:
    lines = ["", "## Speed", ""]
    if "skipped" in speed:
        return [*lines, f"Not measured: {speed['skipped']}."]
    lines += [
        *_wrapped(
            f"The first {speed['rows']:,} rows of GSM8K as conversations, ChatML with generation markers, a BPE of "
            "4,096 tokens: rows read, checked, rendered, tokenised and stored in a second of CPU time (one thread, "
            f"as the machine is shared), by the code before turns were located (`{BEFORE}`) and now; "
            f"{speed['rounds']} rounds in turns: medians, and the median ratio of a round with its range."
        ),
        "",
        "| | rows/CPU s before | now | now / before |",
        "|---|---:|---:|---:|",
    ]
    now = speed["speeds"]["now"]
    for mode in MODES:
        old, new = ([one[mode] for one in speed["speeds"][way]] for way in ("before", "now"))
        ratios = [b / a for a, b in zip(old, new, strict=True)]
        lines.append(
            f"| {mode} | {statistics.median(old):,.0f} | {statistics.median(new):,.0f} "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) |"
        )
    for mode in NEW_MODES:
        lines.append(f"| {mode} | (refused) | {statistics.median([one[mode] for one in now]):,.0f} | |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--before", type=Path, help=f"a checkout of the code before (default: {BEFORE}, unpacked)")
    parser.add_argument("--rows", type=Path, default=GSM8K, help="GSM8K's train.jsonl")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of the measurement of speed (default {ROUNDS})")
    parser.add_argument("--out", type=Path, default=RESULTS / "templates", help="default results/templates")
    parser.add_argument("--only", choices=["speed", "cells", "peer"], help="the others are kept as they are stored")
    arguments = parser.parse_args()
    stored = arguments.out / "bench.json"
    result = json.loads(stored.read_text(encoding="utf-8")) if arguments.only else origin("templates")
    sources = templates()
    parts = {
        "speed": lambda: measure_speed(arguments.before, arguments.rows, arguments.rounds),
        "cells": lambda: judge_all(sources),
        "peer": lambda: compare_peer(sources, [name for name in sources if not name.endswith("_training")]),
    }
    result |= {"tokenizers": list(TOKENIZERS)}
    result |= {name: part() for name, part in parts.items() if arguments.only in (None, name)}
    store(arguments.out, result, page := markdown(result), depth=3)
    print(page)


if __name__ == "__main__":
    main()
