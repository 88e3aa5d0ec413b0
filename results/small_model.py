"""Makes a small Llama that has learnt GSM8K's text, once, and trains it further: for studies of what an update sees.

The base has read other rows than those that a study trains on, a dozen times as many, so that its loss falls slowly: what a
study finds is then no race of a model that learns its first words, in which whoever makes more updates wins. Its learning
rate was never lowered: with a base at the end of a schedule, a study's few rows lowered the loss by 0.005 and told nothing.
It lies in `out/`, and studies of one checkout share it.

    ground = prepare_ground()                                   # once: about three minutes on one core
    model = load_base(ground)
    losses = fine_tune(model, updates_of(ground, plan, rows), rate=1e-3)
    loss = held_out_loss(model, ground.held_out)

Training is a loop of a few lines over packtrain's plan, collator and loss; a trainer would do the same more slowly.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

from packtrain.data.examples import AnyExamples
from packtrain.modeling.attention.varlen import register
from packtrain.objectives.causal import CAUSAL_LM
from packtrain.objectives.task import load_task
from packtrain.packing.collator import Batch, MicroBatches, PackCollator
from packtrain.packing.plan import Plan, make_plan
from packtrain.recipe.recipe import Recipe
from packtrain.training.run import build, fit

ROOT = Path(__file__).resolve().parents[1]
GSM8K = Path(os.environ.get("PACKTRAIN_GSM8K", ROOT.parent / "shared/data/gsm8k/train.jsonl"))
FOLDER = ROOT / "out" / "small_model"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the base depends on. Of GSM8K's rows, in its order, come first those held out, those to tune learning rates
    by, those to train on further (the pool), and those of the base."""

    held_out: int = 200
    tuning: int = 120
    pool: int = 1920
    base: int = 5233
    vocabulary: int = 1024
    hidden: int = 96
    layers: int = 2
    epochs: int = 1
    examples: int = 8  # of an update of the base
    rate: float = 4e-3


@dataclass(frozen=True, kw_only=True)
class Ground:
    """The base and the rows to train it further.

    Attributes:
        model: its folder.
        base: rows, tokens and updates of the base, and its held-out loss before, while and after it was trained.
    """

    model: Path
    pool: AnyExamples
    tuning: AnyExamples
    held_out: AnyExamples
    base: dict[str, Any]


def missing_rows() -> str | None:
    """Returns why there are no rows to use, or None where they are there."""
    return None if GSM8K.exists() else f"no {GSM8K}: set PACKTRAIN_GSM8K to the train.jsonl of GSM8K"


def prepare_ground(folder: Path = FOLDER, settings: Settings | None = None) -> Ground:
    """Returns the base, trained now or before, and the rows of a study."""
    settings, file = settings or Settings(), folder / "base.json"
    asked = json.loads(json.dumps(asdict(settings)))
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    if kept is None or kept["settings"] != asked:
        write_rows(folder, settings)
        kept = {"settings": asked, "found": train_base(folder, settings)}
        file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    model = {"model_name_or_path": str(folder / "model")}
    parts = {name: load_task(recipe_of(folder, name, model)).train for name in ("pool", "tuning", "held_out")}
    return Ground(model=folder / "model", base=kept["found"], **parts)


def write_rows(folder: Path, settings: Settings) -> None:
    """Writes the rows of the four parts."""
    folder.mkdir(parents=True, exist_ok=True)
    lines, start = GSM8K.read_text(encoding="utf-8").splitlines(), 0
    for name in ("held_out", "tuning", "pool", "base"):
        stop = start + getattr(settings, name)
        assert stop <= len(lines), f"{stop} rows of {len(lines)}"
        (folder / f"{name}.jsonl").write_text("\n".join(lines[start:stop]) + "\n", encoding="utf-8")
        start = stop


def recipe_of(folder: Path, rows: str, model: dict[str, Any], *, evaluate: bool = False, **training: Any) -> Recipe:
    """A recipe over one part of the rows; question and answer are both learnt."""
    fixed = {
        "output_dir": str(folder / "run"), "warmup_steps": 0.05, "lr_scheduler_type": "constant_with_warmup", "seed": 0,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "logging_steps": 40,
    }  # fmt: skip
    data = {"path": str(folder / f"{rows}.jsonl"), "max_length": 1024, "completion_only_loss": False}
    data |= {"eval_path": str(folder / "held_out.jsonl")} if evaluate else {}
    return Recipe.model_validate({
        "model": model, "data": data, "objective": {"name": "causal_lm"}, "training": fixed | training,
        "batching": {"examples_per_step": Settings().examples, "max_tokens": 8192},
    })  # fmt: skip


def train_base(folder: Path, settings: Settings) -> dict[str, Any]:
    """Trains the base from scratch by packtrain's trainer and saves it with its tokenizer; returns its figures."""
    config = {
        "model_type": "llama", "vocab_size": settings.vocabulary, "hidden_size": settings.hidden,
        "intermediate_size": 3 * settings.hidden, "num_hidden_layers": settings.layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 1024, "tie_word_embeddings": True,
    }  # fmt: skip
    model = {"config": config, "tokenizer_vocab_size": settings.vocabulary}
    updates = settings.epochs * math.ceil(settings.base / settings.examples)
    recipe = recipe_of(
        folder, "base", model, evaluate=True, learning_rate=settings.rate, num_train_epochs=settings.epochs,
        eval_strategy="steps", eval_steps=math.ceil(updates / 4), eval_on_start=True,
    )  # fmt: skip
    trainer = build(recipe)
    fit(trainer)
    trainer.save_model(str(folder / "model"))
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    return {
        "rows": settings.base, "epochs": settings.epochs, "updates": trainer.state.global_step,
        "tokens": settings.epochs * int(trainer.plan.lengths.sum()),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "held_out": {str(entry["step"]): entry["eval_loss"] for entry in evaluations},
    }  # fmt: skip


def load_base(ground: Ground) -> nn.Module:
    """Loads a copy of the base, in float32, with packtrain's attention for flat batches."""
    model = AutoModelForCausalLM.from_pretrained(ground.model, dtype=torch.float32, attn_implementation=register())
    model.config.use_cache = False
    return model


def draw_rows(ground: Ground, seed: int, rows: int) -> np.ndarray:
    """Draws rows of the pool, int64 `[rows]`, each once: another seed trains on others, in another order."""
    return np.random.default_rng([seed, 0x726F7773]).permutation(len(ground.pool))[:rows]


def updates_of(
    ground: Ground, plan: Plan, rows: np.ndarray, change: Callable[[Batch], Batch] | None = None
) -> Iterator[list[Batch]]:
    """Yields the micro-batches of every update of a plan over some rows of the pool.

    Args:
        rows: int64 `[n]`, of the pool; the plan's example i is row `rows[i]`.
        change: of a flat batch, before it is trained on.
    """
    batches = MicroBatches(ground.pool, PackCollator(layout="flat"))
    for step in range(plan.total_steps):
        parts = [batches[replace(part, example_ids=rows[part.example_ids])] for part in plan.layout_of(step)]
        yield parts if change is None else [change(batch) for batch in parts]


def fine_tune(model: nn.Module, updates: Iterator[list[Batch]], *, count: int, rate: float) -> list[float]:
    """Trains in place by AdamW, a tenth of the updates warming up to `rate`, then linearly down to 0.

    Args:
        count: of the updates.

    Returns:
        The loss of every update before it is made, nats per supervised token.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(0.1 * count), count)
    losses: list[float] = []
    model.train()
    for parts in updates:
        whole = sum(float(CAUSAL_LM.denominator(batch)) for batch in parts)
        optimizer.zero_grad()
        losses.append(0.0)
        for batch in parts:
            loss = CAUSAL_LM.losses(model, batch).weighted_sum() / whole
            loss.backward()
            losses[-1] += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    assert len(losses) == count, f"{len(losses)} updates, and a schedule of {count}"
    return losses


@torch.no_grad()
def held_out_loss(
    model: nn.Module, examples: AnyExamples, change: Callable[[Batch], Batch] | None = None, *, max_tokens: int = 8192
) -> float:
    """Returns the mean loss of all supervised tokens of some rows, nats; every document by itself, without `change`.

    Args:
        max_tokens: of the packs in which the rows are laid out, which matters with `change` alone.
    """
    plan = make_plan(examples.lengths, strategy="bfd", max_tokens=max_tokens, gradient_accumulation_steps=1)
    batches = MicroBatches(examples, PackCollator(layout="flat"))
    model.eval()
    total = weights = 0.0
    for step in range(plan.total_steps):
        for part in plan.layout_of(step):
            batch = batches[part] if change is None else change(batches[part])
            total += float(CAUSAL_LM.losses(model, batch).weighted_sum())
            weights += float(CAUSAL_LM.denominator(batch))
    return total / weights


def mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
