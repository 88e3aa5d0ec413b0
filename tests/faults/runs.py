"""Runs in processes that may be killed: forked from one that has imported torch already.

`start` runs the command line. `start_ranks` runs the same on several ranks, and writes down what every update read:

    {"attempt": 9, "update": 3, "rank": 0, "ids": [17, 4], "memory": 412344320}      # a line of read.jsonl, when it is done
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainerCallback

import packtrain.training.run  # noqa: F401  what a run needs, before it is forked
from packtrain import cli
from packtrain.errors import PacktrainError
from packtrain.recipe.reader import load_recipe
from packtrain.training.run import train
from packtrain.training.sealing import is_sealed
from packtrain.training.trainer import PackTrainer

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.faults.runs"])
RECIPE = """
model:
  config: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 4,
           num_key_value_heads: 2, attention_dropout: 0.1}
  tokenizer_vocab_size: 300
data: {path: "packtrain:arithmetic", num_rows: 60, max_length: 512, overflow: truncate}
batching: {examples_per_step: 10, max_tokens: 1024}
training: {output_dir: OUT, use_cpu: true, learning_rate: 3e-3, num_train_epochs: 2, logging_steps: 1,
           report_to: none, save_strategy: steps, save_steps: 1}
"""
STEPS, ROWS = 12, 60
HELD_AFTER = 2  # updates


def write_recipe(directory: Path) -> Path:
    """A recipe of 12 updates, each saved, that trains into `directory / "run"`."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "tiny.yaml"
    path.write_text(RECIPE.replace("OUT", str(directory / "run")))
    return path


def start(recipe: Path, *words: str, more_memory: int | None = None) -> ForkServerProcess:
    """`packtrain train RECIPE words...` in a process of its own; its output is appended to log.txt beside the recipe.

    Args:
        more_memory: bytes of address space that it may take beyond what it begins with.
    """
    process = CONTEXT.Process(target=_command, args=(recipe, words, more_memory))
    process.start()
    return process


def run(recipe: Path, *words: str, **how) -> int:
    """The exit code of a whole command; see `start`."""
    process = start(recipe, *words, **how)
    process.join()
    return process.exitcode


def _command(recipe: Path, words: tuple[str, ...], more_memory: int | None) -> None:
    _say_into(recipe)
    if more_memory is not None:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + more_memory, -1))
    cli.main(["train", str(recipe), *words])


def _say_into(recipe: Path) -> None:
    log = os.open(recipe.with_name("log.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)


# ------------------------------------------------------------------------------------------- several ranks


def start_ranks(
    recipe: Path,
    ranks: int,
    *,
    resume: bool,
    overrides: Sequence[str] = (),
    trainer_class: type[PackTrainer] | None = None,
    of_rank: Mapping[int, Mapping[str, Any]] | None = None,
) -> list[ForkServerProcess]:
    """One process for each rank, as a launcher starts them; with `Reading` unless said otherwise.

    Args:
        of_rank: what one rank is started with instead: `resume`, more `overrides`, the `folder` that it runs in.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    attempt = time.monotonic_ns()
    processes = [
        CONTEXT.Process(
            target=_rank,
            args=(
                recipe,
                rank,
                ranks,
                port,
                resume,
                tuple(overrides),
                attempt,
                trainer_class,
                (of_rank or {}).get(rank),
            ),
        )
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


def run_ranks(recipe: Path, ranks: int, **how) -> list[int]:
    """The exit codes of a whole run; see `start_ranks`."""
    processes = start_ranks(recipe, ranks, **how)
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def hold(recipe: Path, *overrides: str, trainer_class: type[Held] | None = None) -> ForkServerProcess:
    """Start a run and wait until it waits in its third update, with the saves of the first two done; see `let_go`."""
    (process,) = start_ranks(recipe, 1, resume=False, overrides=overrides, trainer_class=trainer_class or Held)
    wait_for(process, recipe.with_name("held").exists)
    assert process.is_alive(), log_of(recipe)
    return process


def let_go(recipe: Path) -> None:
    recipe.with_name("let_go").touch()


def _rank(recipe, rank: int, ranks: int, port: int, resume, overrides, attempt: int, trainer_class, own) -> None:
    _say_into(recipe)
    own = own or {}
    os.chdir(own.get("folder", "."))
    resume, overrides = own.get("resume", resume), (*overrides, *own.get("overrides", ()))
    os.environ["ATTEMPT"] = str(attempt)
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        loaded = load_recipe(recipe, overrides)
        train(loaded, resume=resume, console=Console(quiet=rank > 0, width=200), trainer_class=trainer_class or Reading)
    except PacktrainError as error:
        print(error, flush=True)
        sys.exit(error.exit_code)


class Reading(PackTrainer):
    """Writes down what every update has read, once it is done."""

    def __init__(self, *args, recipe, **kwargs):
        super().__init__(*args, recipe=recipe, **kwargs)
        self.ids: list[int] = []
        self.recipe_path = Path(recipe.sources.path)
        self.add_callback(_Record(self, self.recipe_path.with_name("read.jsonl")))

    def get_batch_samples(self, *args):
        batches, total = super().get_batch_samples(*args)
        self.ids = [i for batch in batches for i in batch["example_ids"].tolist() if i >= 0]
        return batches, total


class Held(Reading):
    """Waits in its third update until `let_go`: what comes from outside then comes while it trains, on any machine."""

    def training_step(self, *args, **kwargs):
        if self.state.global_step == HELD_AFTER:
            self.recipe_path.with_name("held").touch()
            deadline = time.monotonic() + 200
            while not self.recipe_path.with_name("let_go").exists():
                assert time.monotonic() < deadline, "never let go"
                time.sleep(0.002)
        return super().training_step(*args, **kwargs)


class _Record(TrainerCallback):
    def __init__(self, trainer: Reading, path: Path):
        self.trainer, self.file = trainer, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def on_step_end(self, args, state, control, **kwargs):
        memory = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        line = {
            "attempt": int(os.environ["ATTEMPT"]),
            "update": state.global_step - 1,
            "rank": args.process_index,
            "ids": self.trainer.ids,
        }
        os.write(self.file, (json.dumps(line | {"memory": memory}) + "\n").encode())


def kill(processes: Sequence[ForkServerProcess], which: Sequence[int], patience: float = 60) -> None:
    """`kill -9` to some ranks; the others are told to stop, as launchers do, and killed if they don't in time."""
    for rank in which:
        if processes[rank].is_alive():
            os.kill(processes[rank].pid, signal.SIGKILL)
    for process in processes:
        if process.is_alive() and len(which) < len(processes):
            process.terminate()
    for process in processes:
        process.join(patience)
        if process.is_alive():
            process.kill()
            process.join()


def records(recipe: Path) -> list[dict]:
    return [json.loads(line) for line in recipe.with_name("read.jsonl").read_text().splitlines()]


def what_counts(recipe: Path) -> list[list[int]]:
    """The examples of every update that the last weights have seen, sorted: a resumed run undoes what it repeats."""
    updates: dict[int, dict[int, list[int]]] = {}
    for attempt, lines in groupby(records(recipe), key=lambda line: line["attempt"]):
        for number, line in enumerate(lines):
            if number == 0:  # it goes on from here
                assert line["update"] <= len(updates), f"{attempt} leaves out update {len(updates)}"
                updates = {update: read for update, read in updates.items() if update < line["update"]}
            updates.setdefault(line["update"], {})[line["rank"]] = line["ids"]
    assert list(updates) == list(range(len(updates)))
    return [sorted(i for ids in updates[update].values() for i in ids) for update in updates]


# ------------------------------------------------------------------------------------------------- waiting


def wait_for(process: ForkServerProcess, happened: Callable[[], bool], seconds: float = 200) -> None:
    """Until `happened`, or the process ends."""
    deadline = time.monotonic() + seconds
    while not happened() and process.is_alive():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.0005)


def updates_done(recipe: Path) -> int:
    """Lines of read.jsonl: updates, times ranks."""
    path = recipe.with_name("read.jsonl")
    return path.read_bytes().count(b"\n") if path.exists() else 0


def training(recipe: Path) -> bool:
    """Whether training has begun; the line is printed before the first update."""
    return recipe.with_name("log.txt").exists() and "per rank" in log_of(recipe)


def can_resume(recipe: Path) -> bool:
    return any(is_sealed(path) for path in (recipe.parent / "run").glob("checkpoint-*"))


def log_of(recipe: Path) -> str:
    return recipe.with_name("log.txt").read_text()


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model/model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bitwise."""
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
