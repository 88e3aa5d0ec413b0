"""Trains 20 updates padded, flat, and by a literal loop over single documents: are they the same updates?

A control trains flat with documents that are said to be one, and must differ.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PrinterCallback, TrainingArguments

from packtrain.data.examples import Examples
from packtrain.modeling.attention.varlen import NAME, register
from packtrain.modeling.audit.models import tiny_model
from packtrain.modeling.audit.settings import switchable
from packtrain.modeling.isolation import check_isolation
from packtrain.packing.collator import PackCollator
from packtrain.packing.plan import Plan, make_plan
from packtrain.training.trainer import PackTrainer

FAMILIES = (  # model types of transformers
    *("qwen3_next", "qwen3_5_text", "olmo_hybrid", "lfm2", "lfm2_moe", "minimax"),
    *("falcon_h1", "jamba", "mamba", "mamba2", "bamba", "granitemoehybrid", "nemotron_h"),
    *("recurrent_gemma", "rwkv", "xlstm"),
    *("bloom", "mpt", "falcon", "gpt_neox", "gpt_neox_japanese", "gptj", "codegen", "bart"),
)
DELTA_RULES = ("olmo_hybrid", "qwen3_5_text", "qwen3_next")
VOCABULARY, LONGEST, EXAMPLES = 64, 48, 60
UPDATES, PER_UPDATE, CAPACITY, RATE = 20, 3, 120, 0.02  # the tables of positions of tiny models have 128
Way = Literal["pad_longest", "balanced", "leaking"]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What every update computed: its loss, and the norm of its gradient before clipping."""

    losses: list[float]
    norms: list[float]
    inside: str = ""  # what was padded inside

    def difference(self, other: Curve) -> float:
        """Largest relative difference, over both figures and all updates."""
        pairs = ((self.losses, other.losses), (self.norms, other.norms))
        return max(float(np.max(np.abs(np.divide(mine, theirs) - 1))) for mine, theirs in pairs)


@dataclass(frozen=True, kw_only=True)
class Found:
    """The largest relative difference of a loss or gradient norm to the loop over single documents.

    Attributes:
        pad_longest, balanced: both are to be the same.
        leaking: the control, `balanced` with documents that are said to be one.
        inside: what is padded inside.
        losses: the smallest and the largest of the loop.
    """

    family: str
    pad_longest: float
    balanced: float
    leaking: float
    inside: str
    losses: tuple[float, float]


class LeakingCollator(PackCollator):
    """Says that the documents of a flat batch are one: its bounds, sequence numbers and positions."""

    def collate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        batch = super().collate(*args, **kwargs)
        total = batch["input_ids"].shape[1]
        for side in "qk":
            batch[f"cu_seq_lens_{side}"] = batch[f"cu_seq_lens_{side}"].new_tensor([0, total])
            batch[f"max_length_{side}"] = total
        return batch | {
            "position_ids": torch.arange(total)[None],
            "seq_idx": torch.zeros_like(batch["seq_idx"]),
        }


def examine(family: str) -> Found:
    """Trains the ways one after the other, each from the same weights."""
    alone = one_by_one(family)
    found = {way: train(family, way) for way in ("pad_longest", "balanced", "leaking")}
    return Found(
        family=family,
        **{way: curve.difference(alone) for way, curve in found.items()},
        inside=found["balanced"].inside,
        losses=(min(alone.losses), max(alone.losses)),
    )


def model_of(family: str) -> nn.Module:
    """Makes the model. Delta rules with large random weights multiply rounding, padded as well as flat: theirs are small."""
    model = tiny_model(family, vocab_size=VOCABULARY)
    if family in DELTA_RULES:
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.mul_(0.3)
    return model


def documents() -> Examples:
    """Draws random documents of 4 to 48 tokens, most of them short; the first two tokens are not supervised."""
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(2.3, 0.7, EXAMPLES), 4, LONGEST).astype(int)
    rows = [draw.integers(3, VOCABULARY, length).tolist() for length in lengths]
    return Examples.from_dataset(
        datasets.Dataset.from_list([{"input_ids": ids, "labels": [-100, -100, *ids[2:]]} for ids in rows])
    )


def plan_of(examples: Examples, strategy: str) -> Plan:
    return make_plan(
        examples.lengths,
        strategy=strategy,
        seed=0,
        examples_per_step=PER_UPDATE,
        max_tokens=CAPACITY,
        max_length=LONGEST,
        num_epochs=2.0,
        max_steps=UPDATES,
        world_size=1,
    )


def train(family: str, way: Way) -> Curve:
    """Trains as a recipe does, after the check of its documents."""
    examples, model = documents(), model_of(family)
    plan = plan_of(examples, "pad_longest" if way == "pad_longest" else "balanced")
    inside = ""
    if plan.layout == "flat":
        if switchable(model, register()):
            model.set_attn_implementation(NAME)
        said = check_isolation(model, "flat", torch.device("cpu")).says
        assert said.startswith("isolated"), said
        inside = said.partition("padded inside: ")[2]
    with tempfile.TemporaryDirectory() as directory:
        args = TrainingArguments(
            output_dir=directory,
            use_cpu=True,
            gradient_accumulation_steps=plan.gradient_accumulation_steps,
            per_device_train_batch_size=1,
            max_steps=UPDATES,
            ignore_data_skip=True,
            disable_tqdm=True,
            logging_steps=1,
            optim="sgd",
            learning_rate=RATE,
            lr_scheduler_type="constant",
            report_to="none",
            save_strategy="no",
        )
        kind = LeakingCollator if way == "leaking" else PackCollator
        collator = kind(layout=plan.layout, pad_token_id=0, padded_to=None, max_length=LONGEST)
        trainer = PackTrainer(model, args, train_examples=examples, plan=plan, collator=collator)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return Curve(losses=[entry["loss"] for entry in logs], norms=[entry["grad_norm"] for entry in logs], inside=inside)


def one_by_one(family: str) -> Curve:
    """Trains the same updates by a literal loop over single documents."""
    examples, model = documents(), model_of(family).train()
    plan = plan_of(examples, "pad_longest")
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses, norms = [], []
    for step in range(UPDATES):
        rows = [examples[int(number)] for number in plan.examples(step)]
        supervised = sum(int((row["labels"][1:] >= 0).sum()) for row in rows)
        optimizer.zero_grad()
        total = 0.0
        for row in rows:
            loss = _summed(model, torch.as_tensor(row["input_ids"]), torch.as_tensor(row["labels"])) / supervised
            loss.backward()
            total += loss.item()
        losses.append(total)
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
    return Curve(losses=losses, norms=norms)


def _summed(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    return cross_entropy(logits, labels[1:].long(), reduction="sum")


def lines(found: Sequence[dict[str, Any]], command: str) -> list[str]:
    """Writes the section of the page."""
    most = max(max(one["pad_longest"], one["balanced"]) for one in found)
    least = min(one["leaking"] for one in found)
    return [
        "",
        "## The same updates",
        "",
        f"{UPDATES} updates of {PER_UPDATE} documents each of tiny models in float32: `balanced`, `pad_longest` and a",
        "literal loop over single documents. Entries are the largest relative difference of a loss or gradient norm to the",
        f"loop: at most **{most:.0e}**. The control, flat batches with documents that are said to be one, differs by at",
        f"least {least:.0e}.",
        "",
        "| architecture | padded inside | losses | pad_longest | balanced | control |",
        "|---|---|---|---|---|---|",
        *(
            f"| {one['family']} | {one['inside'] or '-'} | {one['losses'][0]:.2f}-{one['losses'][1]:.2f} "
            f"| {one['pad_longest']:.0e} | {one['balanced']:.0e} | {one['leaking']:.0e} |"
            for one in found
        ),
        "",
        f"    {command}",
    ]
