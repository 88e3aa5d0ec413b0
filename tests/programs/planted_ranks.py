"""One rank, started by a launcher: resumes from each of the checkpoints in DIRECTORY, and writes what each came to.

accelerate launch --config_file launch/zero2.yaml -m tests.programs.planted_ranks RECIPE DIRECTORY [key=value ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from packtrain.errors import CheckpointError
from packtrain.recipe.reader import load_recipe
from packtrain.training.ranks import leave
from packtrain.training.run import build, fit


def main(recipe: str, directory: str, *settings: str) -> None:
    torch.set_num_threads(1)
    came_to = {}
    for path in sorted(Path(directory).glob("*/checkpoint-*")):
        trainer = build(load_recipe(recipe, settings))
        try:
            fit(trainer, str(path))
            came_to[path.parent.name] = "trained"
        except CheckpointError as error:
            came_to[path.parent.name] = str(error)
    Path(directory, f"rank{trainer.args.process_index}.json").write_text(json.dumps(came_to))
    leave(trainer.accelerator)


if __name__ == "__main__":
    main(*sys.argv[1:])
