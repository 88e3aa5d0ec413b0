"""The arms of the study of a real model, and what one of them does in its own process."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console

from packtrain.compare.flops import training_flops
from packtrain.compare.measure import HeldOut, Recorder, Timed, WriteUpdates, held_out_loss
from packtrain.compare.peers import as_peer, build_peer
from packtrain.compare.results import Update
from packtrain.compare.trainers import TRAINERS
from packtrain.generation.evaluation import evaluate, wilson
from packtrain.generation.scores import exact, number
from packtrain.objectives.task import load_task
from packtrain.recipe.recipe import Recipe
from packtrain.training.meters import peak_memory
from packtrain.training.run import build
from packtrain.training.trainer import PackTrainer
from results.real_claims.proofs import audit, unpadding
from results.real_model.prepare import MODEL, ROOT

GSM8K = Path(os.environ.get("PACKTRAIN_GSM8K", ROOT.parent / "shared/data/gsm8k/train.jsonl"))
FOLDER = ROOT / "out" / "real_claims"
HELD_OUT, RATES_HELD_OUT = 50, 24  # rows: the first ones, which no arm trains on; those that `rates` evaluates on
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
TUNINGS = ("lora", "full")
WAYS = ("pad_longest", "balanced", "trl:padding", "trl:packing_bfd")
SAME_UPDATES = ("pad_longest", "balanced", "trl:padding")
COST_RATES = {"lora": 1e-3, "full": 5e-5}
GRID_WAYS, GRID_RATES, GRID_SEEDS = ("balanced", "bfd"), (5e-4, 1e-3, 2e-3, 4e-3), (0, 1, 2)
COST, ANSWERS, RATES, PROOF = "cost", "answers", "rates", "proof"
PROOFS = ("audit", "unpad")
PROOF_ROWS = 6  # of the padded batch
BASE = "base"
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One run in its own process.

    Attributes:
        part: `cost` trains and measures, `answers` asks a model that `cost` has trained, `rates` trains for its loss,
            `proof` compares layouts on the model as it is.
        tuning: `lora`, `full`, or `base` for the model as it is.
        way: how it trains, or what is proved.
        tokens: to train on, about.
    """

    part: str
    tuning: str
    way: str = "balanced"
    rate: float = 0.0
    seed: int = 0
    tokens: int = 0

    @property
    def name(self) -> str:
        if self.part == ANSWERS:
            return f"{self.part}: {self.tuning}"
        if self.part == PROOF:
            return f"{self.part}: {self.way}"
        ending = f", {self.rate:g}, seed {self.seed}" if self.part == RATES else ""
        return f"{self.part}: {self.tuning}, {self.way}{ending}"

    @property
    def folder(self) -> Path:
        return FOLDER / re.sub(r"[^a-z0-9.]+", "-", self.name)

    @property
    def sizes(self) -> tuple[int, int]:
        """Examples of an update, and most tokens of a micro-batch: packing then makes a third of the updates in `rates`."""
        return (4, 2048) if self.part == RATES else (16, 4096)


def all_arms(tokens: int, grid_tokens: int) -> list[Arm]:
    """Returns the arms in the order in which they run."""
    arms: list[Arm] = []
    for tuning in TUNINGS:
        arms += [Arm(part=COST, tuning=tuning, way=way, rate=COST_RATES[tuning], tokens=tokens) for way in WAYS]
        asked = (BASE, tuning) if tuning == TUNINGS[0] else (tuning,)  # the base needs rows alone, which the first has
        arms += [Arm(part=ANSWERS, tuning=each, tokens=tokens) for each in asked]
    arms += [Arm(part=PROOF, tuning=BASE, way=way) for way in PROOFS]
    return arms + [
        Arm(part=RATES, tuning="lora", way=way, rate=rate, seed=seed, tokens=grid_tokens)
        for seed in GRID_SEEDS
        for rate in GRID_RATES
        for way in GRID_WAYS
    ]


def write_rows(folder: Path, held_out: Sequence[str], train: Sequence[str]) -> None:
    """Writes the rows to evaluate on and those to train on."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in (("held_out", held_out), ("train", train)):
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def rows_of(arm: Arm) -> tuple[list[str], list[str]]:
    """Returns the rows held out, and as many others as have the arm's tokens; another seed trains on others.

    Raises:
        AssertionError: GSM8K has too few.
    """
    lines = GSM8K.read_text(encoding="utf-8").splitlines()
    held_out, others = lines[:HELD_OUT], lines[HELD_OUT:]
    write_rows(FOLDER / "lengths", held_out, others[:1000])
    mean = float(load_task(recipe_of(arm, FOLDER / "lengths")).train.lengths.mean())
    count = max(arm.sizes[0], round(arm.tokens / mean))
    chosen = others[arm.seed * count : (arm.seed + 1) * count]
    assert len(chosen) == count, f"{count} rows for seed {arm.seed}, and there are {len(others)}"
    return held_out[: RATES_HELD_OUT if arm.part == RATES else HELD_OUT], chosen


def recipe_of(arm: Arm, folder: Path) -> Recipe:
    """The recipe of an arm over the rows in its folder: chats whose answers are supervised, float32, one epoch."""
    examples, max_tokens = arm.sizes
    strategy = TRAINERS[arm.way].like if arm.way in TRAINERS else arm.way
    return Recipe.model_validate({
        "model": {"model_name_or_path": str(MODEL)},
        "data": {"path": str(folder / "train.jsonl"), "eval_path": str(folder / "held_out.jsonl"), "max_length": 1024,
                 "completion_only_loss": True},
        "batching": {"strategy": strategy, "examples_per_step": examples, "max_tokens": max_tokens},
        "objective": {"name": "causal_lm"},
        "lora": LORA if arm.tuning == "lora" else None,
        "training": {
            "output_dir": str(folder), "learning_rate": arm.rate or 1e-4, "lr_scheduler_type": "linear", "warmup_steps": 0.1,
            "num_train_epochs": 1, "logging_steps": 1, "save_strategy": "no", "eval_strategy": "no", "eval_on_start": False,
            "report_to": "none", "use_cpu": True, "seed": arm.seed,
        },
    })  # fmt: skip


class TimedPackTrainer(Timed, PackTrainer):
    """PackTrainer, timed."""


def train_arm(arm: Arm) -> dict[str, Any]:
    """Trains by the arm's way; returns its updates, memory and held-out loss, and saves the model that is to answer."""
    write_rows(arm.folder, *rows_of(arm))
    recipe, peer = recipe_of(arm, arm.folder), arm.way in TRAINERS
    asked = as_peer(arm.way, recipe) if peer else recipe
    packtrain = build(asked, console=Console(quiet=True), trainer_class=TimedPackTrainer)
    assert isinstance(packtrain, TimedPackTrainer)
    trainer, dropped = build_peer(arm.way, asked, packtrain) if peer else (packtrain, 0)
    model, updates = packtrain.model, list[Update]()
    trainer.recorder = Recorder(
        write=updates.append,
        flops=training_flops(model.config, frozen=arm.tuning == "lora"),
        says_documents=True,
        device=trainer.args.device,
    )
    trainer.add_callback(WriteUpdates(trainer.recorder))
    trainer.train()
    memory, _ = peak_memory()
    after: HeldOut = held_out_loss(
        model, packtrain.get_eval_dataloader(), packtrain.loss, update=trainer.state.global_step
    )
    if arm.part == COST and arm.way == "balanced":
        packtrain.save_model(str(arm.folder / "model"))
        (arm.folder / "recipe.yaml").write_text(yaml.safe_dump(_given(recipe), sort_keys=False), encoding="utf-8")
    return {
        "updates": [asdict(update) for update in updates], "held_out": after.loss, "peak_memory": memory,
        "dropped": dropped, "examples": len(packtrain.train_dataset), "attention": model.config._attn_implementation,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad), "threads": torch.get_num_threads(),
    }  # fmt: skip


def _given(recipe: Recipe) -> dict[str, Any]:
    return {name: section for name, section in recipe.to_dict().items() if section is not None}


def answer_arm(arm: Arm) -> dict[str, Any]:
    """Answers the held-out questions by the base or a trained model, likeliest token by token, and counts right answers.

    Two counts: by the number behind `####`, which is how GSM8K marks an answer and a chat model does not by itself; and by
    that or else the last number of the answer.
    """
    trained = Arm(part=COST, tuning=TUNINGS[0] if arm.tuning == BASE else arm.tuning, rate=1e-4)
    assert (trained.folder / "recipe.yaml").exists(), f"{trained.name} comes first"
    recipe = recipe_of(trained, trained.folder)
    base = arm.tuning == BASE
    found = evaluate(recipe, prompts=HELD_OUT, max_new_tokens=256, base=base)
    file = trained.folder / "evaluation" / f"answers-{'base' if base else 'model'}.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    last = [last_number(row["answer"], row["reference"]) for row in rows]
    result = asdict(found) | {"last_number": float(np.mean(last)), "last_number_interval": list(wilson(last))}
    if base:
        packtrain = build(recipe.model_copy(update={"lora": None}), console=Console(quiet=True))
        loader = packtrain.get_eval_dataloader()
        result["held_out"] = held_out_loss(packtrain.model, loader, packtrain.loss, update=0).loss
    return result


def last_number(answer: str, reference: str) -> float:
    """Returns 1 where the number behind `####`, or else the last number, is that of the reference.

    >>> last_number("So she pays 3 x 4 = $1,200.", "3 * 400 = 1200 #### 1200")
    1.0
    """
    if "####" in answer:
        return exact(answer, reference)
    given = NUMBER.findall(answer)
    return exact(f"#### {number(given[-1])}", reference) if given else 0.0


def prove_arm(arm: Arm) -> dict[str, Any]:
    """Audits the model, or compares its gradients with and without padding on the first held-out rows."""
    if arm.way == PROOFS[0]:
        return audit()
    rows = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()[:PROOF_ROWS]]
    return unpadding([f"{row['question']} {row['answer']}" for row in rows])


def run_arm(arm: Arm) -> dict[str, Any]:
    """Does what an arm says, in this process."""
    return {ANSWERS: answer_arm, PROOF: prove_arm}.get(arm.part, train_arm)(arm)
