"""Run under torchrun by plugin/test_ranks.py: rank 1 alone cannot be attached, and every rank writes what it is told."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import Trainer

import packtrain
from packtrain.training.ranks import settle
from tests.plugin.trainers import classification


class Fails(Trainer):
    """Raises in its loss, on the last rank only."""

    error: Exception | None = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.error is not None and self.args.process_index == 1:
            raise self.error
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class OutOfMemory(Fails):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class MissesAKey(Fails):
    error = KeyError("image")


class ReadsPadding(Fails):
    """Its gradients come from padding, too, on the last rank only."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.args.process_index != 1:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        hidden = model.bert(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
        return hidden.pow(2).mean()


def cannot_collate(features):
    raise KeyError("image")


HOW = {"nobody": Fails, "out of memory": OutOfMemory, "loss": MissesAKey, "padding": ReadsPadding, "collator": Fails}


def main(output_dir: Path) -> None:
    torch.set_num_threads(1)
    for layout in ("auto", "unpad"):
        said = [f"{how}: {attached(output_dir, how, layout)}" for how in HOW]
        (output_dir / f"{layout}{dist.get_rank()}.txt").write_text("\n".join(said))
        dist.barrier()
    settle()
    dist.destroy_process_group()


def attached(output_dir: Path, how: str, layout: str) -> str:
    trainer = classification(output_dir, cls=HOW[how])
    if how == "collator" and trainer.args.process_index == 1:
        trainer.data_collator = cannot_collate
    try:
        packtrain.attach(trainer, layout=layout)
    except Exception as error:
        assert not any(module._forward_pre_hooks for module in trainer.model.modules())
        return f"{type(error).__name__}: {error}".replace("\n", " ")
    return "attached"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
