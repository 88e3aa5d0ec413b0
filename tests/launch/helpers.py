"""Starting runs as users do, and reading what they left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
RECIPE = """
model:
  config: {model_type: llama, hidden_size: 32, intermediate_size: 88, num_hidden_layers: 2, num_attention_heads: 4,
           num_key_value_heads: 2, tie_word_embeddings: true, max_position_embeddings: 1024}
  tokenizer_vocab_size: 320
data: {path: "packtrain:arithmetic", num_rows: 48, max_length: 512, overflow: drop}
batching: {strategy: balanced, examples_per_step: 8, max_tokens: 512}
training: {output_dir: unset, learning_rate: 3e-3, weight_decay: 0.1, num_train_epochs: 2, logging_steps: 1,
           save_strategy: "no", report_to: none, use_cpu: true}
"""
LORA = "lora={r: 4, target_modules: all-linear, init_lora_weights: false}"
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")


def skip_without_libaio() -> None:
    """For states on a drive."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if shutil.which("g++") is None or not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("needs g++ and libaio's headers (Debian: libaio-dev)")


def launcher(config: str | None, ranks: int) -> list[str]:
    """`accelerate launch` with a file of launch/, or nothing: one plain process."""
    if config is None:
        return [sys.executable]
    file = str(ROOT / "launch" / f"{config}.yaml")
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file, "--num_processes", str(ranks)]


def start(directory: Path, config: str | None, ranks: int, *options: str) -> subprocess.Popen:
    """Start the worker; its output goes to `directory/log.txt`."""
    directory.mkdir(parents=True, exist_ok=True)
    recipe = directory / "recipe.yaml"
    recipe.write_text(RECIPE)
    command = [*launcher(config, ranks), "-m", "tests.programs.worker", str(recipe), str(directory)]
    return subprocess.Popen(
        [*command, f"training.output_dir={directory / 'run'}", *options],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=(directory / "log.txt").open("w"),
        stderr=subprocess.STDOUT,
    )


def run(directory: Path, config: str | None, ranks: int, *options: str) -> list[dict]:
    """Run the worker to its end, and return what each rank wrote."""
    code = start(directory, config, ranks, *options).wait()
    assert code == 0, log(directory)[-4000:]
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def say(line: str) -> None:
    """A measured figure, for whoever runs pytest with -s."""
    print(f"\n  {line}", flush=True)


def log(directory: Path) -> str:
    return (directory / "log.txt").read_text()


def weights(directory: Path) -> dict:
    files = sorted((directory / "model").glob("*.safetensors"))
    assert files, f"no model in {directory}"
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def difference(one: dict, other: dict) -> float:
    """Largest absolute difference of a weight; DeepSpeed's models have tied weights twice, the others once."""
    common = one.keys() & other.keys()
    assert common and {name for name in one.keys() ^ other.keys()} <= {"lm_head.weight"}
    return max(float((one[name] - other[name]).abs().max()) for name in common)
