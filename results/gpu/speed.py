"""Trains random models of known shapes on log-normal lengths, one way of laying out updates per part.

Runs are those of `packtrain compare`: the same worker, trainers, clock and FLOPs, on a model and rows of the drive. Weights
are drawn on the device once and loaded by every part of the shape.
"""

from __future__ import annotations

import json
import os
import random
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from packtrain.compare.comparison import rate, window
from packtrain.compare.experiment import load_experiment, with_settings
from packtrain.compare.flops import peak_flops
from packtrain.compare.results import Run, read_run, run_path, slug, write_atomically
from packtrain.compare.worker import Job, work
from results.gpu.parts import IBM, SHAPES, WAYS, config_of
from results.gpu.schedule import Task, TimeUp, weights_of

SHORTEST, LONGEST = 16, 1024
EXAMPLES, UPDATES, WARMUP = 32, 50, 5
MAX_TOKENS = 8192  # eight rows of the longest, as in the pull request
SMALL = {"examples": 8, "updates": 4, "longest": 64, "max_tokens": 256}
REFERENCE = "pad_longest"


def draw_lengths(number: int, *, longest: int = LONGEST, seed: int = 0) -> np.ndarray:
    """Draw `lognormvariate(5.0, 1.0)` cut to 16..`longest`, int64 `[number]`."""
    generator = random.Random(seed)
    return np.array([min(max(round(generator.lognormvariate(5.0, 1.0)), SHORTEST), longest) for _ in range(number)])


# ---------------------------------------------------------------------------------------------- models and rows


def make_weights(task: Task, shape: str) -> dict[str, Any]:
    """Draw the weights of a shape on the device, and keep them in bfloat16 on the drive, with a tokenizer of numbers."""
    path = weights_of(task.scratch, shape)
    part = path.with_suffix(".part")
    config = AutoConfig.for_model(**config_of(shape, small=task.small), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    with torch.device(task.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(part)
    numbers = {str(number): number for number in range(config.vocab_size)}
    names = {"pad_token": "0", "bos_token": "1", "eos_token": "2", "unk_token": "3"}
    backend = Tokenizer(WordLevel(numbers, unk_token="3"))
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(part)
    os.replace(part, path)
    return {"parameters": sum(weight.numel() for weight in model.parameters())}


def make_rows(task: Task, name: str, lengths: np.ndarray, vocabulary: int) -> Path:
    """Write random ids of these lengths as rows, all supervised; what is there already stays."""
    path = task.scratch / "rows" / f"{slug(name)}.jsonl"
    if not path.exists():
        generator = np.random.default_rng(0)
        rows = [{"input_ids": generator.integers(4, vocabulary, length).tolist()} for length in lengths.tolist()]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


# ------------------------------------------------------------------------------------------------------- the runs


def measure(task: Task, shape: str, way: str) -> dict[str, Any]:
    """Train 50 updates of a shape in one way, and return its speed, memory and losses.

    Raises:
        RuntimeError: the run failed, with its reason; what it measured before is kept.
    """
    examples, longest = (SMALL["examples"], SMALL["longest"]) if task.small else (EXAMPLES, LONGEST)
    updates = SMALL["updates"] if task.small else UPDATES
    vocabulary = config_of(shape, small=task.small)["vocab_size"]
    if way == "dense":  # about as many tokens in an update
        rows, changes = examples // 4, {"batching.examples_per_step": examples // 4}
        path = make_rows(task, f"dense {shape}", np.full(rows * updates, longest), vocabulary)
    else:
        path = make_rows(task, f"log-normal {shape}", draw_lengths(examples * updates, longest=longest), vocabulary)
        changes = {"batching.examples_per_step": examples}
    if task.small and "compiled" in way:
        changes["training.torch_compile_backend"] = "eager"
    changes |= {
        "data.path": str(path),
        "data.max_length": longest,
        "batching.max_tokens": SMALL["max_tokens"] if task.small else MAX_TOKENS,
        "training.max_steps": updates,
        "training.learning_rate": 1e-5,
    }
    return _run(task, shape, f"{shape} {way}", WAYS[way] | changes)


def measure_ibm(task: Task, row: str) -> dict[str, Any]:
    """Train 12 updates of a 7B with LoRA as one row of the padding-free paper's table, and return the same figures.

    As in `recipes/compare/ibm_packing.yaml`: 16 examples an update, and packed rows of full length where rows of one example
    were.
    """
    shape, updates = "Mistral-7B", SMALL["updates"] if task.small else 12
    longest = SMALL["longest"] if task.small else LONGEST
    lengths = draw_lengths(4 * 16 * updates, longest=longest)
    path = make_rows(task, f"log-normal {shape}", lengths, config_of(shape, small=task.small)["vocab_size"])
    changes: dict[str, Any] = {
        "lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
        "data.path": str(path),
        "data.max_length": longest,
        "batching.examples_per_step": 16,
        "batching.max_tokens": 4 * longest,
        "training.max_steps": updates,
        "training.learning_rate": 1e-4,
    }
    if "batching.tokens_per_step" in IBM[row] and task.small:
        changes["batching.tokens_per_step"] = 16 * longest
    return _run(task, shape, f"{shape} {row}", IBM[row] | changes)


def _run(task: Task, shape: str, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Run a variant in this process by the worker of comparisons, and return its figures."""
    directory = task.scratch / "compare"
    base = {
        "model": {
            "model_name_or_path": str(weights_of(task.scratch, shape)),
            "dtype": "float32" if task.small else SHAPES[shape].dtype,
        },
        "batching": {"probe_memory": False},
        "training": {
            "output_dir": str(task.scratch / "unused"),
            "seed": 0,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "bf16": True,
            "use_cpu": task.small,
            "gradient_checkpointing": False,
        },
    }
    updates, trainer = settings["training.max_steps"], {key: settings[key] for key in settings if key == "trainer"}
    write_atomically(directory / f"{slug(name)}-base.yaml", yaml.safe_dump(_nested(base, settings)))
    comparison = {
        "base": f"{slug(name)}-base.yaml",
        "reference": name,
        "variants": [{"name": name} | trainer],
        "seeds": [0],
        "repeats": 1,
        "warmup_steps": min(WARMUP, updates // 4),
        "measure_steps": updates,
    }
    write_atomically(directory / f"{slug(name)}.yaml", yaml.safe_dump(comparison))
    (variant,) = load_experiment(directory / f"{slug(name)}.yaml").variants
    path, recipe = run_path(directory, 0, name), with_settings(variant.recipe, seed=0)
    path.unlink(missing_ok=True)
    try:
        work(Job(trainer=variant.trainer, recipe=recipe, path=path, updates=None, eval_every=None))
    except SystemExit:
        pass  # the run says why
    run = read_run(path, round=0, variant=name)
    found = figures(run, comparison, "cpu" if task.small else torch.cuda.get_device_name())
    task.keep(found)
    if run.failed:
        kind, _, said = (run.end.reason or "it failed").partition(": ")
        raise TimeUp(said) if kind == TimeUp.__name__ else RuntimeError(run.end.reason)
    return found


def _nested(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Put `section.key` values into the sections of a recipe; `trainer` is none of its keys."""
    merged = {name: dict(section) for name, section in tree.items()}
    for key, value in ((key, changes[key]) for key in changes if key != "trainer"):
        section, _, inner = key.partition(".")
        if inner:
            merged.setdefault(section, {})[inner] = value
        else:
            merged[section] = value
    return merged


def figures(run: Run, settings: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Return what a page says of a run: rates over the updates behind the warm-up, and the loss of every update."""
    timed = window(run, settings)
    if not timed:
        return {"updates": len(run.updates)}
    seconds = sorted(update.seconds for update in timed)
    flops, peak = rate(run, settings, "flops"), peak_flops(device, "bfloat16")
    total = sum(seconds)
    phases = ("data", "forward", "backward", "optimizer")
    return {
        "updates": len(run.updates),
        "timed_updates": len(timed),
        "real_tokens": sum(update.real_tokens for update in timed),
        "real_tokens_per_second": rate(run, settings, "real_tokens"),
        "flops_per_second": flops,
        "mfu": flops / peak if flops and peak else None,
        "padding": 1 - sum(u.real_tokens for u in timed) / sum(u.computed_tokens for u in timed),
        "seconds_median": statistics.median(seconds),
        "seconds_p90": seconds[int(0.9 * (len(seconds) - 1))],
        "shares": {phase: sum(getattr(update, f"{phase}_seconds") for update in timed) / total for phase in phases},
        "micro_batches": statistics.mean(update.micro_batches for update in timed),
        "examples": statistics.mean(update.examples for update in timed if update.examples is not None),
        "peak_memory": run.end.peak_memory,
        "startup_seconds": run.end.startup_seconds,
        "attention": run.end.attention,
        "losses": [update.loss for update in run.updates],
    }
