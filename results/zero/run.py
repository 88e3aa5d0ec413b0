"""Trains the same recipe on every engine: losses next to each other, and bytes per rank next to the formulas.

    python results/zero/run.py losses       # minutes on two cores
    python results/zero/run.py losses --ranks 4 --set model.config.num_hidden_layers=8
    python results/zero/run.py bytes

Every run is started as a user starts it, `accelerate launch --config_file launch/...`, with the same seed, for 20
updates in float32, in full and with LoRA. Writes tables to read, `losses.md` and `bytes.md`, with the machine, and
every figure, `losses.csv` (each update of each run) and `bytes.csv` (each kind of state), to `results/zero/`.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, as results/ is not installed
from results.page import RESULTS, origin

HERE = RESULTS / "zero"
UPDATES = 20
BASE = {
    "model.config.hidden_size": 64,
    "model.config.intermediate_size": 176,
    "model.config.num_hidden_layers": 2,
    "data.num_rows": 400,
    "data.eval_size": 0,
    "data.max_length": 512,
    "data.overflow": "drop",
    "batching.examples_per_step": 16,
    "batching.max_tokens": 512,  # small, for several micro-batches per update
    "training.eval_strategy": "no",
    "training.max_steps": UPDATES,
    "training.logging_steps": 1,
    "training.save_steps": UPDATES,
    "training.report_to": "none",
}
RECIPE = "recipes/quickstart.yaml"
TRAINED = {"full": {}, "LoRA": {"lora": "{r: 8, lora_alpha: 16, target_modules: all-linear, init_lora_weights: false}"}}
TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Run:
    """How an engine is started: a file of launch/, or torchrun with overrides."""

    name: str
    launch: str | None = None
    overrides: Mapping[str, Any] = ()
    ranks: int = 2

    def command(self, overrides: Mapping[str, Any]) -> list[str]:
        sets = [f"{key}={value}" for key, value in (overrides | dict(self.overrides)).items()]
        program = ["-m", "packtrain", "train", RECIPE, *(word for one in sets for word in ("--set", one))]
        if self.launch:
            launcher = ["-m", "accelerate.commands.launch", "--config_file", f"launch/{self.launch}.yaml"]
            return [sys.executable, *launcher, "--num_processes", str(self.ranks), *program]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.ranks}"]
        return [sys.executable, *(launcher if self.ranks > 1 or self.overrides else []), *program]


def runs(ranks: int) -> list[Run]:
    """List the runs, the reference first.

    FSDP2 is among them only where there are GPUs: on CPUs accelerate would run DDP under its name. NVMe offload is not:
    DeepSpeed puts nothing of so small a model on the drive (`tests/launch` covers it).
    """
    import torch

    x = f" x{ranks}"
    found = [Run(name="single process", ranks=1), Run(name="DDP" + x, launch="ddp", ranks=ranks)]
    if find_spec("deepspeed") is not None:
        found += [
            Run(name="ZeRO-0" + x, overrides={"deepspeed": "{zero_optimization: {stage: 0}}"}, ranks=ranks),
            *(Run(name=f"ZeRO-{stage}" + x, launch=f"zero{stage}", ranks=ranks) for stage in (1, 2, 3)),
            Run(name="ZeRO-3, CPU offload" + x, launch="zero3_offload_cpu", ranks=ranks),
        ]
    if torch.cuda.device_count() >= ranks:
        found.append(Run(name="FSDP2" + x, launch="fsdp2", ranks=ranks))
    return found


# --------------------------------------------------------------------------------------------------------- losses


def losses(ranks: int, scratch: Path, extra: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Train every run, and return one row for each: the largest relative differences of loss and gradient norm from the
    single process, the largest difference of a weight of the saved model, and the curve."""
    rows = []
    for trained, lora in TRAINED.items():
        reference = None
        for run in runs(ranks):
            output = scratch / f"{trained} {run.name}".replace(",", "").replace(" ", "_")
            overrides = BASE | lora | {"training.output_dir": output} | dict(one.split("=", 1) for one in extra)
            _start(run.command(overrides), f"{trained}, {run.name}", environment(run.ranks))
            state = json.loads((output / f"checkpoint-{UPDATES}" / "trainer_state.json").read_text(encoding="utf-8"))
            curve = [entry for entry in state["log_history"] if "loss" in entry]
            assert len(curve) == UPDATES, f"{len(curve)} updates of {run.name}"
            result = {"curve": curve, "weights": _weights(output / "model")}
            reference = reference or result
            rows.append(
                {
                    "trained": trained,
                    "engine": run.name,
                    "first loss": curve[0]["loss"],
                    "last loss": curve[-1]["loss"],
                    "loss differs by": _difference(curve, reference["curve"], "loss"),
                    "norm differs by": _difference(curve, reference["curve"], "grad_norm"),
                    "weights differ by": _weight_difference(result["weights"], reference["weights"]),
                    "curve": curve,
                }
            )
    return rows


def _weights(directory: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    files = sorted(directory.glob("*.safetensors"))
    assert files, f"no model in {directory}"
    return {name: tensor.float() for file in files for name, tensor in load_file(file).items()}


def _weight_difference(weights: dict[str, Any], reference: dict[str, Any]) -> float:
    """Find the largest absolute difference; DeepSpeed's models have tied weights twice, the others once."""
    assert reference.keys() <= weights.keys()
    return max(float((weights[name] - weight).abs().max()) for name, weight in reference.items())


def _difference(curve: list[dict], reference: list[dict], key: str) -> float | None:
    """Find the largest relative difference over the updates; None where an engine logs no such figure (ZeRO-0, the norm)."""
    if any(key not in entry for entry in curve):
        return None
    return max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(curve, reference, strict=True))


# ---------------------------------------------------------------------------------------------------------- bytes


def state_rows(scratch: Path, worlds: Iterable[int] = (1, 2, 4)) -> list[dict[str, Any]]:
    """Measure on each number of ranks, by `measure_bytes.py`."""
    rows = []
    for ranks in worlds:
        path = scratch / f"bytes-{ranks}.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        _start([*launcher, str(HERE / "measure_bytes.py"), str(path)], f"bytes on {ranks} ranks")
        rows += json.loads(path.read_text(encoding="utf-8"))
    return rows


def environment(ranks: int) -> dict[str, str]:
    """Return the environment of a run: one thread per rank, and one GPU for a single process, which drives no more."""
    found = os.environ | {"OMP_NUM_THREADS": "1"}
    if ranks == 1:
        found["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return found


def _start(command: list[str], what: str, env: Mapping[str, str] | None = None) -> None:
    """Run to the end in the checkout; the output is shown when it fails."""
    print(f"{what} ...", flush=True)
    env = environment(2) if env is None else env
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=RESULTS.parent)
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-4000:], sep="\n")
        raise SystemExit(f"{what}: exit code {done.returncode}")


# -------------------------------------------------------------------------------------------------------- results


def write_losses(rows: list[dict[str, Any]], directory: Path) -> None:
    fields = ["trained", "engine", "update", "loss", "grad_norm"]
    with (directory / "losses.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(fields)
        for row in rows:
            for entry in row["curve"]:
                writer.writerow([row["trained"], row["engine"], entry["step"], entry["loss"], entry.get("grad_norm")])


def write_bytes(rows: list[dict[str, Any]], directory: Path) -> None:
    with (directory / "bytes.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def loss_table(rows: list[dict[str, Any]]) -> str:
    """Write the table of losses."""
    lines = ["| trained | engine | first loss | last loss | loss | gradient norm | weight |", "|---" * 7 + "|"]
    for row in rows:
        norm = "not logged" if row["norm differs by"] is None else f"{row['norm differs by']:.1e}"
        lines.append(
            f"| {row['trained']} | {row['engine']} | {row['first loss']:.6f} | {row['last loss']:.6f} "
            f"| {row['loss differs by']:.1e} | {norm} | {row['weights differ by']:.1e} |"
        )
    return "\n".join(lines)


def byte_table(rows: list[dict[str, Any]], *, dtype: str = "bf16", trained: str = "full") -> str:
    """Write the table of bytes: measured / formula, per engine, kind and number of ranks."""
    chosen = [row for row in rows if row["trained"] == trained and row["dtype"] in (dtype, _of_ddp(row, dtype))]
    worlds = sorted({row["ranks"] for row in chosen})
    head = " | ".join(f"{ranks} rank{'s' * (ranks > 1)}" for ranks in worlds)
    lines = [f"| engine | kind | {head} |", "|---|---|" + "---:|" * len(worlds)]
    for key in dict.fromkeys((row["engine"], row["kind"], row["moment"]) for row in chosen):
        cells = {row["ranks"]: row for row in chosen if (row["engine"], row["kind"], row["moment"]) == key}
        shown = [f"{cells[n]['measured']:,} / {cells[n]['formula']:,}" for n in worlds]
        lines.append(f"| {key[0]} | {key[1]}, {key[2]} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _of_ddp(row: Mapping[str, Any], dtype: str) -> str:
    """Choose float32 for DDP, whose mixed precision keeps such weights."""
    return "float32" if row["engine"] == "ddp" else dtype


app = typer.Typer(add_completion=False, help="Run every engine, compare, and write the tables.")
Out = Annotated[Path, typer.Option(metavar="DIR", help="Where the table goes.", show_default="results/zero")]


@app.command("losses")
def losses_command(
    out: Out = HERE,
    ranks: Annotated[int, typer.Option(min=2)] = 2,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None,
) -> None:
    """Compare the losses of every engine. Exits with 1 if one differs by more than 1e-4."""
    with tempfile.TemporaryDirectory(prefix="packtrain-zero-") as scratch:
        rows = losses(ranks, Path(scratch), overrides or ())
    out.mkdir(parents=True, exist_ok=True)
    write_losses(rows, out)
    _write("losses", f"# The same recipe on every engine\n\n{LOSSES_TEXT}\n\n{loss_table(rows)}", out)
    raise typer.Exit(int(max(row["loss differs by"] for row in rows) > TOLERANCE))


@app.command("bytes")
def bytes_command(out: Out = HERE) -> None:
    """Measure the bytes of every kind of state on 1, 2 and 4 ranks, next to the formulas."""
    with tempfile.TemporaryDirectory(prefix="packtrain-zero-") as scratch:
        rows = state_rows(Path(scratch))
    out.mkdir(parents=True, exist_ok=True)
    write_bytes(rows, out)
    tables = [f"## {trained}\n\n{byte_table(rows, trained=trained)}" for trained in TRAINED]
    _write("bytes", "\n\n".join([f"# Bytes per rank\n\n{BYTES_TEXT}", *tables]), out)


def _write(name: str, text: str, directory: Path) -> None:
    """Write the table, the command and the machine to `name.md`."""
    found = origin("zero")
    command, about = (
        found["command"],
        json.dumps({"machine": found["machine"], "versions": found["packages"]}, indent=1),
    )
    (directory / f"{name}.md").write_text(f"{text}\n\n`{command}`\n\n```json\n{about}\n```\n", encoding="utf-8")
    print(text)


LOSSES_TEXT = (
    f"A Llama of two layers on generated arithmetic in float32: {UPDATES} updates of 16 examples in micro-batches of at "
    "most 512 tokens, every run started through `launch/` where it has a file. The last three columns are differences "
    "from the single process: the largest relative one of the loss and of the gradient norm over all updates, and the "
    "largest absolute one of a weight of the saved model."
)
BYTES_TEXT = (
    "Measured / formula, in bytes, for a tiny Llama in bfloat16 (DDP: float32); `bytes.csv` has float32, too. ZeRO-2 "
    "keeps the gradients of whole parameters: one on the border of two shards is on both ranks."
)

if __name__ == "__main__":
    app()
