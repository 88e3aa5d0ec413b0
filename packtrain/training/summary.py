"""The summary that is printed and stored at the end of a run. Every number in it was measured by that run."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.table import Table

PACKAGES = ("packtrain", "torch", "transformers", "accelerate", "datasets", "peft", "trl", "deepspeed", "flash-attn")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A finished run. Absent figures are None and left out of the table.

    Tokens are counted over all ranks and, like `seconds`, over all processes of a resumed run; `seconds` is the wall time
    of the updates without evaluation and saving; `peak_memory` is in bytes, of rank 0.
    """

    recipe: str
    strategy: str
    output_dir: str
    model_dir: str
    held_out_loss_before: float | None
    held_out_loss_after: float | None
    best_step: int | None = None  # whose weights were loaded at the end; None: the last update's are there
    train_loss_first: float | None
    train_loss_last: float | None
    updates: int
    skipped_updates: int = 0  # of these, left out because they were not finite
    micro_batches_per_update: int
    examples: int
    examples_seen: int  # with repetitions: by the updates of the run, also those before it was resumed
    epochs: float
    world_size: int
    measured_after: int = 0  # tokens, padding and seconds are those after this update; 0: of the whole run
    real_tokens: int
    supervised_tokens: int
    padding_share: float | None
    seconds: float
    real_tokens_per_second: float | None
    peak_memory: int
    peak_memory_of: str
    trainable_parameters: int
    frozen_parameters: int
    attn_implementation: str
    data: dict
    evaluation_data: dict | None = None
    held_out_fingerprint: str | None = None  # of the held-out examples
    machine: dict
    versions: dict

    def table(self) -> Table:
        """Returns the summary as a person reads it."""
        table = Table(title=f"{self.recipe}: {self.strategy}", show_header=False, title_justify="left")
        table.add_column(style="bold")
        table.add_column()
        for name, text in self._lines():
            table.add_row(name, text)
        return table

    @property
    def since(self) -> str:
        """Says, after figures that a resumed checkpoint did not carry, from where on they count; "" for the whole run."""
        return f" (since the resume after update {self.measured_after:,})" if self.measured_after else ""

    @property
    def of_best(self) -> str:
        """Says which step's weights the model has, where they are not those of the last."""
        return f" (step {self.best_step:,}, the best)" if self.best_step is not None else ""

    def _lines(self) -> list[tuple[str, str]]:
        lines = []
        if self.held_out_loss_before is not None and self.held_out_loss_after is not None:
            losses = f"{self.held_out_loss_before:.4f} -> {self.held_out_loss_after:.4f}{self.of_best}"
            lines.append(("held-out loss", losses))
        if self.train_loss_first is not None and self.train_loss_last is not None:
            lines.append(("training loss", f"{self.train_loss_first:.4f} -> {self.train_loss_last:.4f}"))
        if self.real_tokens_per_second is not None:
            lines.append(("real tokens/s", f"{self.real_tokens_per_second:,.0f}{self.since}"))
        if self.padding_share is not None:
            lines.append(("padding", f"{self.padding_share:.2%}{self.since}"))
        frozen = f", {self.frozen_parameters:,} frozen" if self.frozen_parameters else ""
        return lines + [
            ("updates", f"{self.updates:,} of {self._micro_batches()}"),
            *([("skipped", f"{self.skipped_updates:,} updates that were not finite")] if self.skipped_updates else []),
            ("examples", self._examples()),
            ("time in updates", f"{self.seconds:.1f} s{self.since}"),
            ("peak memory", f"{self.peak_memory / 2**20:,.0f} MiB ({self.peak_memory_of})"),
            ("parameters", f"{self.trainable_parameters:,} trained{frozen}"),
            ("attention", self.attn_implementation),
            ("model saved in", self.model_dir),
        ]

    def _examples(self) -> str:
        if not self.epochs:
            return f"{self.examples:,}, streamed"
        if self.examples_seen < self.examples:
            return f"{self.examples_seen:,} of {self.examples:,} seen"
        times = round(self.examples_seen / self.examples, 4)
        return f"{self.examples:,} x {times:g} epoch{'s' if times != 1 else ''}"

    def _micro_batches(self) -> str:
        each = self.micro_batches_per_update
        ranks = f" on each of {self.world_size} ranks" if self.world_size > 1 else ""
        return f"{each} micro-batch{'es' if each != 1 else ''}{ranks}"

    def save(self, directory: Path) -> None:
        """Writes `summary.json` into `directory`."""
        (directory / "summary.json").write_text(json.dumps(asdict(self), indent=2) + "\n")


def describe_machine() -> dict:
    """Returns CPU model, cores, memory and devices; no host name."""
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    machine = {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
    if hasattr(os, "sysconf"):
        machine["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    if torch.cuda.is_available():
        machine["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return machine


def name_machine(machine: dict, threads: int | None = None) -> str:
    """Says what `describe_machine` found, in a few words: the devices, or the processor and its cores.

    >>> name_machine({"cpu": "AMD EPYC", "cores": 2}, threads=1)
    'AMD EPYC, 2 cores, 1 thread'
    """
    words = machine.get("devices") or [machine["cpu"]]
    counts = {"thread": threads} if machine.get("devices") else {"core": machine["cores"], "thread": threads}
    return ", ".join([*words, *(f"{n} {name}{'s' * (n != 1)}" for name, n in counts.items() if n)])


def package_versions() -> dict[str, str]:
    """Returns the versions of the packages a result depends on, Python included."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
