"""Run under torchrun by plugin/test_ranks.py: rank 1 alone has built another trainer, and every rank says what it hears."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainingArguments

import packtrain
from packtrain.errors import LaunchError
from packtrain.training.ranks import settle
from tests.plugin.helpers import COMMON, pad
from tests.tiny import random_documents, tiny_model
from tests.training.helpers import long_tailed_lengths

EXAMPLES = 29


def make(output_dir: Path, *, rows: Callable = lambda rows: rows, **changes: Any):
    documents = rows(random_documents(long_tailed_lengths(EXAMPLES)))
    args = TrainingArguments(output_dir=str(output_dir), **COMMON | changes)
    return Trainer(tiny_model("llama"), args, train_dataset=datasets.Dataset.from_list(documents), data_collator=pad)


def with_token(rows: list[dict]) -> list[dict]:
    rows[-3]["input_ids"][1] = 4 + rows[-3]["input_ids"][1] % 2
    return rows


def move_weights(model: nn.Module) -> None:
    with torch.no_grad():
        next(model.parameters()).add_(0.01)


def nothing(folder: Path, odd: bool) -> Trainer:
    """What hosts may have apart."""
    own = {"run_name": "second", "dataloader_pin_memory": False, "log_level": "error"} if odd else {}
    return make(folder / str(odd), **own)


def weights(folder: Path, odd: bool) -> Trainer:
    trainer = make(folder)
    if odd:
        move_weights(trainer.model)
    return trainer


def reference(folder: Path, odd: bool) -> Trainer:
    trainer: Any = make(folder)
    trainer.ref_model = tiny_model("llama")
    if odd:
        move_weights(trainer.ref_model)
    return trainer


def frozen(folder: Path, odd: bool) -> Trainer:
    trainer = make(folder)
    next(trainer.model.parameters()).requires_grad_(not odd)
    return trainer


def seed(folder: Path, odd: bool) -> Trainer:
    """accelerate takes the order of examples from torch's seed."""
    trainer = make(folder)
    torch.manual_seed(100 + odd)
    return trainer


def later_seed(folder: Path, odd: bool) -> Trainer:
    return make(folder)


CASES: dict[str, Callable[[Path, bool], Trainer]] = {
    "nothing": nothing,
    "weights": weights,
    "learning_rate": lambda folder, odd: make(folder, learning_rate=0.02 if odd else 0.01),
    "save_steps": lambda folder, odd: make(folder, save_steps=3 if odd else 4),
    "max_steps": lambda folder, odd: make(folder, max_steps=3 if odd else 4),
    "rows": lambda folder, odd: make(folder, rows=lambda rows: rows[odd:]),
    "tokens": lambda folder, odd: make(folder, rows=with_token if odd else list),
    "reference": reference,
    "frozen": frozen,
    "seed": seed,
    "later seed": later_seed,
    "strategy": lambda folder, odd: make(folder),
}


class Logged(logging.Handler):
    def __init__(self):
        super().__init__()
        self.said: list[str] = []

    def emit(self, record):
        self.said.append(record.getMessage())


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    logged, told = Logged(), {}
    logging.getLogger("packtrain").addHandler(logged)
    for layout in ("auto", "unpad"):
        for case in CASES:
            logged.said.clear()
            told[f"{layout} {case}"] = " ".join([attached(folder, case, layout), *logged.said])
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(told))
    dist.barrier()
    settle()
    dist.destroy_process_group()


def attached(folder: Path, case: str, layout: Any) -> str:
    odd = os.environ["RANK"] == "1"
    trainer = CASES[case](folder, odd)
    before, attention = trainer.args.to_dict(), trainer.model.config._attn_implementation
    try:
        packtrain.attach(trainer, layout=layout, strategy="padding_free" if odd and case == "strategy" else "balanced")
    except LaunchError as error:
        assert trainer.args.to_dict() == before and "get_train_dataloader" not in vars(trainer)
        assert trainer.model.config._attn_implementation == attention
        assert not any(module._forward_pre_hooks for module in trainer.model.modules())
        return str(error)
    if layout == "unpad" or case not in ("nothing", "later seed"):
        return "attached"
    if case == "later seed":
        torch.manual_seed(100 + odd)
    try:
        trainer.train()
    except LaunchError as error:
        assert not trainer.state.global_step
        return f"attached {error}"
    return "attached and trained"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
