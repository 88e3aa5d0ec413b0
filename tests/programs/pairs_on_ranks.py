"""Run under torchrun by objectives/preference/test_runs.py: trains on pairs, and writes what each rank read and found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from packtrain.recipe.recipe import Recipe
from packtrain.training.ranks import leave
from packtrain.training.run import build
from tests.objectives.preference.helpers import curves, pair_recipe

FIGURES = {"preference": ("loss", "grad_norm", "rewards/margins"), "reward": ("loss", "grad_norm", "margin")}


def main(rows: Path, output_dir: Path, objective: str) -> None:
    torch.set_num_threads(1)
    recipe = pair_recipe(rows, output_dir, training__max_steps=6).to_dict()
    recipe = Recipe.model_validate(recipe | {"objective": {"name": objective, "shared_prefix": True}})
    trainer = build(recipe)
    read: list[list[int]] = []
    fetch = trainer.get_batch_samples

    def fetch_and_record(*args):
        batches, total = fetch(*args)
        read.append([i for batch in batches for i in batch["example_ids"].tolist() if i >= 0])
        return batches, total

    trainer.get_batch_samples = fetch_and_record
    found = curves(trainer, FIGURES[objective]).tolist()
    output_dir.mkdir(parents=True, exist_ok=True)
    reference = trainer.train_dataset.reference
    result = {"read": read, "curves": found, "reference": [] if reference is None else reference.tolist()}
    (output_dir / f"rank{trainer.args.process_index}.json").write_text(json.dumps(result))
    leave(trainer.accelerator)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
