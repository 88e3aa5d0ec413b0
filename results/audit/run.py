"""Audits every architecture of the installed transformers: which ones keep packed documents isolated?

    python results/audit/run.py                      # every decoder and encoder, a quarter of an hour
    python results/audit/run.py llama bert mamba     # these

Each architecture runs as a tiny random model in a process of its own with a time and a memory limit, so that one
that crashes or hangs costs its own row only. An interrupted sweep continues with the same command, where neither
machine, packages nor packtrain/modeling have changed meanwhile. Writes `results/audit/sweep.json` (every finding, one
line per architecture; a finding is a list of `FIELDS`) and `results/audit/README.md` (the table).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from packtrain.errors import PacktrainError
from packtrain.modeling.attention.varlen import NAME
from packtrain.modeling.audit.audit import PADDED, audit_model, tiny_model
from packtrain.modeling.audit.causes import recurrent_layers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, as results/ is not installed
from results.page import RESULTS, limits, origin

MEMORY_LIMIT = 6 << 30  # bytes of address space for one architecture
MODES = ("eval", "train", "cache")
FIELDS = ("implementation", "layout", "mode", "verdict", "difference", "leak", "sees", "gradient_difference", "calls")
FIELDS += ("scale", "cause", "error")  # of a finding, in the order in which they are stored


def audit_one(architecture: str) -> dict:
    """Audit one architecture with its own attention and with packtrain_varlen; returns plain data."""
    model = tiny_model(architecture)
    own = model.config._attn_implementation
    report = audit_model(model, implementations=[own, NAME], modes=MODES)
    found = report.to_dict() | {
        "own": own,
        "class": type(model).__name__,
        "kind": kind(model),
    }
    found["findings"] = [[rounded(finding[name]) for name in FIELDS] for finding in found["findings"]]
    found["padding"] = [{k: rounded(v) for k, v in effect.items()} for effect in found["padding"]]
    return found


def kind(model: transformers.PreTrainedModel) -> str:
    """Name the kind: encoder or decoder, and whether it has experts, recurrent or convolutional layers."""
    parts = ["encoder" if type(model).__name__.endswith("ForMaskedLM") else "decoder"]
    names = {type(module).__name__.lower() for module in model.modules()}
    parts += ["MoE"] if any("expert" in name or "moe" in name for name in names) else []
    along_the_row = recurrent_layers(model)
    parts += ["convolutional" if along_the_row == ["Conv1d"] else "recurrent"] if along_the_row else []
    return ", ".join(parts)


def rounded(value: object) -> object:
    return float(f"{value:.3g}") if isinstance(value, float) else value


def child(audit: Callable[[str], dict], architecture: str, seconds: int, pipe: Connection) -> None:
    """Run the audit in the process of one architecture, within its limits."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    try:
        pipe.send(audit(architecture))
    except Exception as error:  # an architecture may raise anything; it becomes its row
        text = error.what if isinstance(error, PacktrainError) else f"{type(error).__name__}: {error}"
        pipe.send({"error": text.strip().splitlines()[0][:200]})


def sweep(
    architectures: list[str], seconds: int, audit: Callable[[str], dict] = audit_one
) -> Iterator[tuple[str, dict]]:
    """Yield every architecture with what its process found, or why it found nothing.

    The limit counts computing time, so that a busy machine does not fail an architecture; a process that only waits is
    ended after ten times as long.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "packtrain.modeling.audit.audit", "transformers.models.auto"])
    for architecture in architectures:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=child, args=(audit, architecture, seconds, theirs))
        process.start()
        theirs.close()
        try:
            result = ours.recv() if ours.poll(10 * seconds) else {"error": f"no answer in {10 * seconds} s"}
        except EOFError:
            process.join(seconds)
            died = {-signal.SIGXCPU: f"not done in {seconds} s", -signal.SIGKILL: f"not done in {seconds} s"}
            result = {"error": died.get(process.exitcode, f"the process died (exit code {process.exitcode})")}
        process.kill()
        process.join()
        yield architecture, result


# ------------------------------------------------------------------------------------------------- the table

COLUMNS = {  # heading: implementation ("own" is the architecture's default), layout, mode
    "positions only": ("own", "positions", "eval"),
    "flat": ("own", "flat", "eval"),
    f"flat, {NAME}": (NAME, "flat", "eval"),
    "the same, training": (NAME, "flat", "train"),
    "padded inside, training": (PADDED, "flat", "train"),
    "flat, cache on": ("own", "flat", "cache"),
    "flat, mask of ones": ("own", "masked", "eval"),
    "packed rows": ("own", "rows", "eval"),
    "padded": ("own", "padded", "eval"),
}
SIGNS = {"isolated": "ok", "leaks": "**leaks**", "wrong": "**wrong**", "not supported": "refused", "unclear": "?"}
WAYS = {  # to train flat, in the order in which they are preferred: implementation, layout, mode
    NAME: (NAME, "flat", "train"),
    "padded inside": (PADDED, "flat", "train"),
    "own mask": ("own", "flat", "train"),
}


def findings(result: dict) -> list[dict]:
    return [dict(zip(FIELDS, finding, strict=True)) for finding in result["findings"]]


def find(result: dict, implementation: str, layout: str, mode: str) -> dict | None:
    wanted = (result["own"] if implementation == "own" else implementation, layout, mode)
    for finding in findings(result):
        name = PADDED if finding["implementation"].endswith(PADDED) else finding["implementation"]
        if (name, finding["layout"], finding["mode"]) == wanted:
            return finding
    return None


def cell(result: dict, implementation: str, layout: str, mode: str) -> str:
    finding = find(result, implementation, layout, mode)
    if finding is None:
        return "-"
    amount = finding["leak"] if finding["verdict"] == "leaks" else finding["difference"]
    return SIGNS[finding["verdict"]] + (f" {amount:.2g}" if finding["verdict"] in ("leaks", "wrong") else "")


def way(result: dict) -> str:
    """Name the way to train flat: a key of `WAYS`, "unclear" where no leak could be seen, or "none"."""
    cells = {name: cell(result, *place) for name, place in WAYS.items()}
    found = next((name for name, shown in cells.items() if shown == "ok"), None)
    return found or ("unclear" if "?" in cells.values() else "none")


def padded_inside(result: dict) -> str:
    """Say what is padded inside: "2 mixers (MambaMixer)", "BartDecoderWrapper", or "-"."""
    begins = "padded inside: "
    said = (note.removeprefix(begins) for note in result["notes"] if note.startswith(begins))
    return next(said, "-") if find(result, *WAYS["padded inside"]) else "-"


def why(result: dict) -> str:
    """Say what keeps documents from being isolated with packtrain_varlen, else with the own attention."""
    ours = [finding for finding in findings(result) if finding["implementation"] == NAME]
    flat = [f for f in ours + findings(result) if f["mode"] == "eval" and f["layout"] in ("flat", "positions")]
    return next((finding["cause"] for finding in flat if finding["cause"]), "")


def refusal(result: dict) -> str:
    """Say why an architecture has to be padded: the cause, else what the model raised."""
    finding = find(result, *WAYS[NAME]) or {}
    return why(result) or finding.get("error") or "no cause is known"


def row(architecture: str, result: dict) -> list[str]:
    cells = [cell(result, *place) for place in COLUMNS.values()]
    ours = [finding for finding in findings(result) if finding["implementation"] == NAME]
    calls = next((str(finding["calls"]) for finding in ours if finding["calls"] is not None), "-")
    reaching = sorted({e["side"] for e in result["padding"] if e["reaches"] and e["implementation"] == result["own"]})
    inside = padded_inside(result)
    return [architecture, result["kind"], result["own"], *cells, inside, calls, ", ".join(reaching), why(result)]


def largest_differences(ran: dict[str, dict]) -> list[tuple[float, str]]:
    """Find how far documents that train flat are from those alone, or move when another changes, as shares of the largest
    output; the largest first."""
    found = [(find(result, *WAYS[way(result)]), name) for name, result in ran.items() if way(result) in WAYS]
    shares = [(max(f["leak"], f["difference"]) / f["scale"], name) for f, name in found if f]
    return sorted(shares, reverse=True)


def listed(names: list[str]) -> str:
    return f"{len(names)}" + (f": {', '.join(names)}" if names else "")


def markdown(header: dict, results: dict[str, dict]) -> str:
    """Write the page: the table, and above it what it shows."""
    ran = {name: result for name, result in results.items() if "error" not in result}
    rows = {name: row(name, result) for name, result in ran.items()}
    headings = ["architecture", "kind", "default", *COLUMNS, "what is padded", "calls", "padding reaches", "cause"]
    ways = {name: way(result) for name, result in ran.items()}
    by = {one: [name for name in ran if ways[name] == one] for one in (*WAYS, "unclear", "none")}
    alone = [name for name, result in ran.items() if cell(result, *COLUMNS["positions only"]) == "ok"]
    repaired = [name for name in by[NAME] if name not in alone]
    mixers = [name for name in by["padded inside"] if "mixer" in padded_inside(ran[name])]
    whole = [name for name in by["padded inside"] if name not in mixers]
    flat = sum(len(by[one]) for one in WAYS)
    apart = largest_differences(ran)[:1] or [(0.0, "none")]
    lines = [
        "# Which architectures keep packed documents isolated",
        "",
        "Does the output of one document in a batch change when another document of the batch changes, in any layout, with",
        "any attention implementation?",
        "",
        f"transformers {header['packages']['transformers']}, torch {header['packages']['torch']}, "
        f"{header['machine']['cpu']}; tiny random models in float32. {len(ran)} architectures ran, of {len(results)} "
        "with a causal or a masked language model.",
        "",
        f"**{flat} of {len(ran)} train flat**, {len(ran) - flat} have to be padded. Flat, no document is further from what "
        f"it gives alone, or moves more when another document changes, than {apart[0][0]:.0e} of the largest output "
        f"({apart[0][1]}). Each stands in one of these lists:",
        "",
        f"- with `{NAME}`, {len(by[NAME])}: {len(by[NAME]) - len(repaired)} that are isolated without it, too, and "
        f"{len(repaired)} that are repaired by it: {', '.join(repaired)}",
        f"- with mixers (what mixes positions and knows no documents) padded inside, {listed(mixers)}",
        f"- with the backbone padded inside, {listed(whole)}",
        f"- with a mask of all documents by their own attention only (`attn_implementation: sdpa` or `eager`), "
        f"{listed(by['own mask'])}",
        f"- not: {len(by['none'])}; train them padded",
        *(f"    - {name}: {refusal(ran[name])}" for name in by["none"]),
        *(
            [f"- not known, as the outputs hardly depend on the context, {listed(by['unclear'])}"]
            if by["unclear"]
            else []
        ),
        "",
        f"By their own attention alone, given positions that restart (*positions only*), {len(alone)} isolate documents.",
        "",
        "*positions only*: one row with positions that restart, as stock collators give it. *flat*: packtrain's",
        "batch, with `cu_seq_lens` and `seq_idx` as well. *calls*: how often a forward pass called the registered",
        "attention; `-` where the architecture cannot be told to use it. *padded inside*: with *what is padded* (mixers, or",
        "the backbone) given groups of padded documents; `-` where nothing has to be, or nothing helps. *padding reaches*:",
        "where padding under a mask (left, right) or an unmasked tail of pad tokens changes the outputs of real tokens.",
        "Numbers are the largest change of a logit; the largest logits are around 2 to 4.",
        "",
        "| " + " | ".join(headings) + " |",
        "|" + "---|" * len(headings),
        *("| " + " | ".join(cells) + " |" for cells in rows.values()),
        "",
        "No tiny model could be built of, or no document be run with:",
        "",
        *(f"- {name}: {result['error']}" for name, result in results.items() if "error" in result),
        *limits(
            "Tiny models with random weights in float32 on a CPU: kernels for GPUs, half precision, code from the Hub and "
            "leaks that need long rows are not covered. `packtrain audit MODEL` asks one real model."
        ),
        "",
        f"    {header['command']}",
        "",
        f"The tree of the code, `git rev-parse HEAD:packtrain/modeling`: {header['code']}.",
        "",
    ]
    return "\n".join(lines)


def code_state() -> str:
    """Name the state of packtrain/modeling: git's hash of the tree, marked where files differ from it."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(RESULTS.parent), *args]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout

    tree = git("rev-parse", "HEAD:packtrain/modeling").strip() or "unknown"
    return tree + (" with changes" if git("status", "--porcelain", "packtrain/modeling").strip() else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("architectures", nargs="*", help="default: all with a causal or masked language model")
    parser.add_argument("--seconds", type=int, default=120, help="computing time of one architecture (default 120)")
    parser.add_argument("--out", type=Path, default=RESULTS / "audit", help="default results/audit")
    arguments = parser.parse_args()
    everything = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) | set(MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    architectures = arguments.architectures or sorted(everything)
    header = {"fields": list(FIELDS), "code": code_state()} | origin("audit")
    header.pop("threads")  # the process of an architecture has one
    results = stored(arguments.out, header)
    missing = [architecture for architecture in architectures if architecture not in results]
    for architecture, result in sweep(missing, arguments.seconds):
        results[architecture] = result
        store(arguments.out, header, results)
        said = result["error"] if "error" in result else way(result)
        print(f"{len(results)}/{len(architectures)} {architecture}: {said}", file=sys.stderr, flush=True)
    store(arguments.out, header, results)


def stored(directory: Path, header: dict) -> dict[str, dict]:
    """Read what the same command found before it was interrupted."""
    path = directory / "sweep.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"header": None}
    return before["architectures"] if before["header"] == header else {}


def store(directory: Path, header: dict, results: dict[str, dict]) -> None:
    """Replace both files at once, so that an interrupted sweep loses one architecture, not all of them."""
    results = dict(sorted(results.items()))
    one_per_line = (f"{json.dumps(name)}:{json.dumps(found, separators=(',', ':'))}" for name, found in results.items())
    text = '{"header":' + json.dumps(header) + ',\n"architectures":{\n' + ",\n".join(one_per_line) + "\n}}\n"
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in (("sweep.json", text), ("README.md", markdown(header, results))):
        unfinished = directory / f"{name}.unfinished"
        unfinished.write_text(content, encoding="utf-8")
        unfinished.replace(directory / name)


if __name__ == "__main__":
    main()
