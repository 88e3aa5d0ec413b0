"""Pairs, recipes and curves for the tests of objectives for pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import SequentialSampler

from packtrain.modeling.attention.prefixes import KEY as SHARED
from packtrain.modeling.attention.prefixes import SharedPrefixes
from packtrain.objectives.pairs import PairCollator
from packtrain.recipe.recipe import Recipe
from packtrain.training.trainer import PackTrainer

UPDATES, PER_UPDATE, RATE = 20, 6, 3e-4
WORDS = "the plot is thin fine a long and winding tale of very little not bad at all".split()
LORA = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}


def pair_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Pairs of words drawn at random; answers of 1 to 12 words, prompts of 2 to 20."""
    draw = np.random.default_rng(seed)

    def text(low: int, high: int) -> str:
        return " ".join(draw.choice(WORDS, size=draw.integers(low, high)))

    return [
        {"prompt": text(2, 21) + "\n", "chosen": f"{text(1, 13)} {number}", "rejected": f"{text(1, 13)} {number + 1}"}
        for number in range(count)
    ]


def write_pairs(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pair_recipe(path: Path, output_dir: Path, *, lora: bool = False, **changes: Any) -> Recipe:
    """A recipe over the pairs of a file; `changes` are `section__key=value`."""
    sections: dict[str, dict[str, Any]] = {
        "model": {"config": dict(CONFIG), "tokenizer_vocab_size": 300},
        "data": {"path": str(path)},
        "batching": {"examples_per_step": PER_UPDATE, "max_tokens": 400},
        "objective": {"name": "preference"},
        "training": {
            "output_dir": str(output_dir),
            "learning_rate": RATE,
            "max_steps": UPDATES,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "seed": 42,
        },
    }
    if lora:
        sections["lora"] = dict(LORA)
    for key, value in changes.items():
        section, _, name = key.partition("__")
        sections[section][name] = value
    return Recipe.model_validate(sections)


FIGURES = ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


def curves(trainer: PackTrainer | Any, figures: tuple[str, ...] = FIGURES) -> np.ndarray:
    """Trains, and returns `[updates, figures]`."""
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return np.array([[entry[name] for name in figures] for entry in logs])


def leaking(batch: dict[str, Any]) -> dict[str, Any]:
    """Entries for a batch with shared prefixes by which documents go on from all of the one before, its answer included."""
    if SHARED not in batch:
        return {}
    found: list[int] = []
    whole = 0
    for length, prefix in zip(batch[SHARED].lengths, batch[SHARED].prefixes, strict=True):
        found.append(whole if prefix else 0)
        whole = found[-1] + length
    shared = SharedPrefixes(batch[SHARED].lengths, found)
    return {SHARED: shared, **shared.entries()}


class LeakingPairs(PairCollator):
    """Shared prompts in which the rejected answer also sees the chosen one; nothing else is changed."""

    def collate(self, *args, **kwargs):
        batch = super().collate(*args, **kwargs)
        return batch | leaking(batch)


def in_order(cls: type) -> type:
    """The trainer that reads its rows in their order."""

    class InOrder(cls):
        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(self.train_dataset)

    return InOrder
