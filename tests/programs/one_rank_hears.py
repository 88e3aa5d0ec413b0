"""Run under torchrun by faults/test_stops.py: rank 1 alone gets SIGTERM in its third update."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from packtrain.errors import Stopped
from packtrain.training.run import fit
from tests.training.helpers import make_trainer


class Terminate(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if args.process_index == 1 and state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def main(output_dir: Path) -> None:
    torch.set_num_threads(1)
    trainer = make_trainer(output_dir, strategy="balanced", world_size=2)
    trainer.add_callback(Terminate())
    try:
        fit(trainer)
    except Stopped as stopped:
        (output_dir / f"rank{trainer.args.process_index}.txt").write_text(str(stopped))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
