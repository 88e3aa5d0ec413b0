"""One rank of a run, started by a launcher: trains a recipe and writes down what it read and every loss.

    accelerate launch --config_file launch/zero2.yaml -m tests.programs.worker RECIPE OUT [key=value ...]

`resume=PATH` goes on from a checkpoint, `stop=N` leaves after update N with the schedule of the whole run,
`die=RANK:N` kills a rank when it begins update N, and `chunk=BYTES` is what the losses' chunks may take.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from packtrain.objectives import chunks
from packtrain.objectives.logits import computes_in_chunks, output_head
from packtrain.recipe.reader import load_recipe
from packtrain.training.ranks import leave
from packtrain.training.run import build, fit


class Leave(TrainerCallback):
    """Stop after an update, or be killed at the beginning of one."""

    def __init__(self, stop: int | None, die: tuple[int, int] | None, out: Path):
        self.stop, self.die, self.out = stop, die, out

    def on_step_begin(self, args, state, control, **kwargs):
        if self.die == (args.process_index, state.global_step + 1):
            (self.out / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.stop:
            control.should_save = control.should_training_stop = True


def main(recipe: str, out: str, *words: str) -> None:
    torch.set_num_threads(1)
    options = dict(word.split("=", 1) for word in words)
    resume, stop, die, chunk = (options.pop(name, None) for name in ("resume", "stop", "die", "chunk"))
    if chunk:
        chunks.CHUNK_BYTES = int(chunk)
    trainer = build(load_recipe(recipe, [f"{key}={value}" for key, value in options.items()]))
    rank, at = (int(part) for part in die.split(":")) if die else (None, None)
    trainer.add_callback(Leave(int(stop) if stop else None, (rank, at) if die else None, Path(out)))
    read: dict[int, list[int]] = {}
    fetch = trainer.get_batch_samples

    def fetch_and_record(*args):
        batches, total = fetch(*args)
        read[trainer.state.global_step] = [i for batch in batches for i in batch["example_ids"].tolist() if i >= 0]
        return batches, total

    trainer.get_batch_samples = fetch_and_record
    fit(trainer, resume)
    trainer.save_model(str(Path(out) / "model"))
    logs = {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}
    result = {
        "read": read,
        "losses": {step: logs[step + 1]["loss"] for step in read},
        "norms": {step: logs[step + 1].get("grad_norm") for step in read},
        "epochs": {step: trainer.plan.locate(step)[0] for step in read},
        "examples": len(trainer.train_dataset),
        "total_steps": trainer.plan.total_steps,
        "in_chunks": computes_in_chunks(output_head(trainer.accelerator.unwrap_model(trainer.model))),
        "attention": trainer.model.config._attn_implementation,
    }
    Path(out, f"rank{trainer.args.process_index}.json").write_text(json.dumps(result))
    leave(trainer.accelerator)


if __name__ == "__main__":
    main(*sys.argv[1:])
