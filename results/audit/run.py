"""Audits every architecture of the installed transformers: which ones keep packed documents isolated?

    python results/audit/run.py                      # every decoder and encoder, half an hour
    python results/audit/run.py llama bert mamba     # these

Each architecture runs as a tiny random model in a process of its own with a time and a memory limit, so that one
that crashes or hangs costs its own row only. An interrupted sweep continues with the same command. Writes
`results/audit/sweep.json` (every finding, one line per architecture; a finding is a list of `FIELDS`) and
`results/audit/README.md` (the table).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import signal
import sys
import time
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
FIELDS += ("cause", "error")  # of a finding, in the order in which they are stored


def audit_one(architecture: str) -> dict:
    """Audit one architecture with its own attention and with packtrain_varlen; returns plain data."""
    model = tiny_model(architecture)
    own = model.config._attn_implementation
    began = time.perf_counter()
    report = audit_model(model, implementations=[own, NAME], modes=MODES)
    found = report.to_dict() | {
        "own": own,
        "class": type(model).__name__,
        "kind": kind(model),
        "seconds": round(time.perf_counter() - began, 1),
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
    context.set_forkserver_preload(["packtrain.modeling.audit", "packtrain.training.summary"])
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


def findings(result: dict) -> list[dict]:
    return [dict(zip(FIELDS, finding, strict=True)) for finding in result["findings"]]


def cell(result: dict, implementation: str, layout: str, mode: str) -> str:
    wanted = (result["own"] if implementation == "own" else implementation, layout, mode)
    for finding in findings(result):
        name = PADDED if finding["implementation"].endswith(PADDED) else finding["implementation"]
        if (name, finding["layout"], finding["mode"]) == wanted:
            amount = finding["leak"] if finding["verdict"] == "leaks" else finding["difference"]
            shown = f" {amount:.2g}" if finding["verdict"] in ("leaks", "wrong") else ""
            return SIGNS[finding["verdict"]] + shown
    return "-"


def row(architecture: str, result: dict) -> list[str]:
    cells = [cell(result, *place) for place in COLUMNS.values()]
    ours = [finding for finding in findings(result) if finding["implementation"] == NAME]
    calls = next((str(finding["calls"]) for finding in ours if finding["calls"] is not None), "-")
    reaching = sorted({e["side"] for e in result["padding"] if e["reaches"] and e["implementation"] == result["own"]})
    flat = [f for f in ours + findings(result) if f["mode"] == "eval" and f["layout"] in ("flat", "positions")]
    why = next((f["cause"] for f in flat if f["cause"]), "")  # first, why packtrain_varlen doesn't repair it
    return [architecture, result["kind"], result["own"], *cells, calls, ", ".join(reaching), why]


def markdown(header: dict, results: dict[str, dict]) -> str:
    """Write the page: the table, and above it what it shows."""
    ran = {name: result for name, result in results.items() if "error" not in result}
    rows = {name: row(name, result) for name, result in ran.items()}
    headings = ["architecture", "kind", "default", *COLUMNS, "calls", "padding reaches", "cause"]
    ours = {name: cell(result, NAME, "flat", "train") for name, result in ran.items()}
    own = {name: cell(result, "own", "positions", "eval") for name, result in ran.items()}
    repaired = [name for name in ran if ours[name] == "ok" and own[name] != "ok"]
    inside = {name: cell(result, PADDED, "flat", "train") for name, result in ran.items()}
    masked = {name: cell(result, "own", "flat", "train") for name, result in ran.items()}
    padded = [name for name in ran if ours[name] != "ok" and inside[name] == "ok"]
    by_mask = [name for name in ran if ours[name] != "ok" and inside[name] != "ok" and masked[name] == "ok"]
    lost = [name for name in ran if "ok" not in (ours[name], inside[name], masked[name])]
    flat = len(ran) - len(lost)
    lines = [
        "# Which architectures keep packed documents isolated",
        "",
        "Does the output of one document in a batch change when another document of the batch changes, in any layout, with",
        "any attention implementation?",
        "",
        f"transformers {header['packages']['transformers']}, torch {header['packages']['torch']}, "
        f"{header['machine']['cpu']}; tiny random models in float32. {len(ran)} architectures ran.",
        "",
        f"**{flat} of {len(ran)} train flat**, {len(lost)} have to be padded:",
        "",
        f"- isolated by their own attention, given positions that restart: {sum(v == 'ok' for v in own.values())}",
        f"- isolated by `{NAME}`, in training: {sum(v == 'ok' for v in ours.values())}",
        f"- repaired by `{NAME}` ({len(repaired)}): {', '.join(repaired)}",
        f"- isolated padded inside ({len(padded)}): {', '.join(padded)}",
        f"- isolated by a mask of all documents alone ({len(by_mask)}): {', '.join(by_mask)}",
        f"- not isolated ({len(lost)}; train them padded): {', '.join(lost)}",
        "",
        "*positions only*: one row with positions that restart, as stock collators give it. *flat*: packtrain's",
        "batch, with `cu_seq_lens` and `seq_idx` as well. *calls*: how often a forward pass called the registered",
        "attention; `-` where the architecture cannot be told to use it. *padded inside*: with its mixers, or its backbone,",
        "given groups of padded documents; `-` where nothing has to be. *padding reaches*: where padding under a mask",
        "(left, right) or an unmasked tail of pad tokens changes the outputs of real tokens. Numbers are the largest",
        "change of a logit; the largest logits are around 2 to 4.",
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
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("architectures", nargs="*", help="default: all with a causal or masked language model")
    parser.add_argument("--seconds", type=int, default=60, help="computing time of one architecture (default 60)")
    parser.add_argument("--out", type=Path, default=RESULTS / "audit", help="default results/audit")
    arguments = parser.parse_args()
    everything = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) | set(MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    architectures = arguments.architectures or sorted(everything)
    header = {"fields": list(FIELDS)} | origin("audit")
    header.pop("threads")  # the process of an architecture has one
    results = stored(arguments.out, header)
    missing = [architecture for architecture in architectures if architecture not in results]
    for architecture, result in sweep(missing, arguments.seconds):
        results[architecture] = result
        store(arguments.out, header, results)
        places = (("own", "positions", "eval"), (NAME, "flat", "train"))
        said = result["error"] if "error" in result else ", ".join(cell(result, *place) for place in places)
        print(f"{len(results)}/{len(architectures)} {architecture}: {said}", file=sys.stderr, flush=True)


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
