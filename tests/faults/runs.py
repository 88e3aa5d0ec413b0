"""Runs of the command line in processes that may be killed: forked from one that has imported torch already."""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch
from safetensors.torch import load_file

import packtrain.training.run  # noqa: F401  what a run needs, before it is forked
from packtrain import cli

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
STEPS = 12


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
    log = os.open(recipe.with_name("log.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    if more_memory is not None:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + more_memory, -1))
    cli.main(["train", str(recipe), *words])


def wait_for(process: ForkServerProcess, happened: Callable[[], bool], seconds: float = 200) -> None:
    """Until `happened`, or the process ends."""
    deadline = time.monotonic() + seconds
    while not happened() and process.is_alive():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.0005)


def log_of(recipe: Path) -> str:
    return recipe.with_name("log.txt").read_text()


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model/model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bitwise."""
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
