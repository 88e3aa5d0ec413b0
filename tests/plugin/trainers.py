"""Trainers of many tasks over tiny models, as a user would build them; `TASKS[name](output_dir)` makes one."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
)

from packtrain.modeling.audit.models import tiny_model
from tests.data.helpers import CHAT_TEMPLATE, make_tokenizer
from tests.plugin.helpers import COMMON

EXAMPLES = 22  # of batches of 4 in updates of 2: the last update has six
COMMON = COMMON | dict(max_steps=4, seed=3)
TOKENIZER = make_tokenizer(chat_template=CHAT_TEMPLATE)
MASKING = make_tokenizer()
MASKING.add_special_tokens({"mask_token": "<|end|>"})
WORDS = "one two three four five six seven sum of the numbers it is What Question Answer".split()


def texts(count: int = EXAMPLES, seed: int = 0) -> list[str]:
    """Texts of one to some forty words."""
    draw = random.Random(seed)
    lengths = [max(1, int(draw.lognormvariate(2.0, 0.9))) for _ in range(count)]
    return [" ".join(draw.choice(WORDS) for _ in range(length)) for length in lengths]


def tiny(family: str, kind: Any, **changes: Any) -> Any:
    room = {"max_position_embeddings": 512} if family in ("bert", "roberta") else {}
    config = tiny_model(family, vocab_size=max(len(TOKENIZER), 320), **room).config
    config.pad_token_id = TOKENIZER.pad_token_id
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return kind.from_config(config)


def rows(**columns: list) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


def ids(seed: int = 0) -> list[list[int]]:
    return [TOKENIZER(text)["input_ids"] for text in texts(seed=seed)]


def stock(output_dir: Path, model: nn.Module, data: datasets.Dataset, collator: Any, cls: type = Trainer, **changes):
    args = TrainingArguments(output_dir=str(output_dir), **COMMON | changes)
    return cls(model, args, train_dataset=data, eval_dataset=data.select(range(9)), data_collator=collator)


def classification(output_dir: Path, family: str = "bert", adapter: Any = None, **changes) -> Trainer:
    model = tiny(family, AutoModelForSequenceClassification, num_labels=3)
    model = model if adapter is None else adapter(model)
    data = rows(input_ids=ids(), label=[i % 3 for i in range(EXAMPLES)])
    return stock(output_dir, model, data, DataCollatorWithPadding(TOKENIZER), **changes)


def tagging(output_dir: Path, family: str = "bert", **changes) -> Trainer:
    model = tiny(family, AutoModelForTokenClassification, num_labels=2)
    data = rows(input_ids=ids(), labels=[[token % 2 for token in row] for row in ids()])
    return stock(output_dir, model, data, DataCollatorForTokenClassification(TOKENIZER), **changes)


def masking(output_dir: Path, family: str = "roberta") -> Trainer:
    collator = DataCollatorForLanguageModeling(MASKING, mlm_probability=0.3, seed=1)
    return stock(output_dir, tiny(family, AutoModelForMaskedLM), rows(input_ids=ids()), collator)


class MaskedSpans(Trainer):
    """A span begins and ends at real tokens only; transformers' own loss takes a softmax over padding, too."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ends = {side: inputs.pop(f"{side}_positions") for side in ("start", "end")}
        outputs, padding = model(**inputs), inputs["attention_mask"] == 0
        return sum(
            nn.functional.cross_entropy(outputs[f"{side}_logits"].masked_fill(padding, -1e4), at)
            for side, at in ends.items()
        )


def answering(output_dir: Path, cls: type = MaskedSpans) -> Trainer:
    def collate(features: list[dict]) -> dict[str, torch.Tensor]:
        batch = TOKENIZER.pad([{"input_ids": feature["input_ids"]} for feature in features], return_tensors="pt")
        return dict(batch) | {
            name: torch.tensor([feature[name] for feature in features]) for name in ("start_positions", "end_positions")
        }

    data = rows(
        input_ids=ids(),
        start_positions=[len(row) // 3 for row in ids()],
        end_positions=[len(row) - 1 for row in ids()],
    )
    model = tiny("bert", AutoModelForQuestionAnswering)
    model.qa_outputs.bias.requires_grad_(
        False
    )  # a softmax over positions cancels it: Adam would step by rounding alone
    return stock(output_dir, model, data, collate, cls, remove_unused_columns=False)


class Contrastive(Trainer):
    """Each text shall be nearer to its own partner than to those of the others in the micro-batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        one, other = (self.embed(model, inputs[side]) for side in ("one", "other"))
        return nn.functional.cross_entropy(20 * one @ other.T, torch.arange(len(one), device=one.device))

    def embed(self, model, batch):
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def embedding(output_dir: Path) -> Trainer:
    def collate(features: list[dict]) -> dict[str, dict[str, torch.Tensor]]:
        return {
            side: dict(TOKENIZER.pad([{"input_ids": feature[side]} for feature in features], return_tensors="pt"))
            for side in ("one", "other")
        }

    model, data = tiny("bert", AutoModel), rows(one=ids(1), other=ids(2))
    return stock(output_dir, model, data, collate, Contrastive, remove_unused_columns=False)


PAIRS = dict(chosen=[f" {text}" for text in texts(seed=2)], rejected=[f" {text}" for text in texts(seed=3)])
PROMPTS = texts(seed=1)
TRL = dict(bf16=False, gradient_checkpointing=False)


def preference(
    output_dir: Path,
    reference: bool = False,
    lora: bool = False,
    cls: Any = DPOTrainer,
    args: Any = DPOConfig,
    **changes,
) -> Trainer:
    model: Any = tiny("llama", AutoModelForCausalLM)
    if not reference and cls is DPOTrainer:  # it loads the reference model from there
        model.save_pretrained(output_dir / "model")
        model = AutoModelForCausalLM.from_pretrained(output_dir / "model")
    options: dict[str, Any] = {"ref_model": tiny("llama", AutoModelForCausalLM)} if reference else {}
    if lora:
        options["peft_config"] = LoraConfig(target_modules=["q_proj", "v_proj"])
    return cls(
        model=model,
        args=args(output_dir=str(output_dir), max_length=64, **COMMON | TRL | changes),
        train_dataset=rows(prompt=PROMPTS, **PAIRS),
        processing_class=TOKENIZER,
        **options,
    )


def reward(output_dir: Path) -> Trainer:
    return RewardTrainer(
        model=tiny("qwen3", AutoModelForSequenceClassification, num_labels=1),
        args=RewardConfig(output_dir=str(output_dir), max_length=64, **COMMON | TRL),
        train_dataset=rows(**PAIRS),
        processing_class=TOKENIZER,
    )


def kto(output_dir: Path) -> Trainer:
    tiny("llama", AutoModelForCausalLM).save_pretrained(output_dir / "model")
    return KTOTrainer(
        model=AutoModelForCausalLM.from_pretrained(output_dir / "model"),
        args=KTOConfig(output_dir=str(output_dir), max_length=64, **COMMON | TRL),
        train_dataset=rows(prompt=PROMPTS, completion=PAIRS["chosen"], label=[i % 2 == 0 for i in range(EXAMPLES)]),
        processing_class=TOKENIZER,
    )


def odds(output_dir: Path) -> Trainer:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return preference(output_dir, cls=ORPOTrainer, args=ORPOConfig, remove_unused_columns=False)


def contrastive_preference(output_dir: Path) -> Trainer:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    return preference(output_dir, cls=CPOTrainer, args=CPOConfig, remove_unused_columns=False)


def sampled(output_dir: Path, cls: Any = GRPOTrainer, args: Any = GRPOConfig) -> Trainer:
    """It generates: there the model runs with padding and a cache, and the passes for log-probabilities without."""
    config = args(
        output_dir=str(output_dir),
        num_generations=2,
        max_completion_length=6,
        beta=0.0,
        **COMMON | TRL | {"max_steps": 2},
    )
    return cls(
        model=tiny("llama", AutoModelForCausalLM),
        reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
        args=config,
        train_dataset=rows(prompt=PROMPTS),
        processing_class=TOKENIZER,
    )


QUICK: dict[str, Callable[[Path], Trainer]] = {
    "sequence classification": classification,
    "masked language modelling": masking,
    "DPO with a reference model": partial(preference, reference=True),
}
LONG: dict[str, Callable[[Path], Trainer]] = {
    "question answering": answering,
    "embedding": embedding,
    "sequence classification with a decoder": partial(classification, family="llama"),
    "token classification": tagging,
    "token classification with ModernBERT": partial(tagging, family="modernbert"),
    "DPO": preference,
    "DPO with LoRA": partial(preference, reference=False, lora=True),
    "DPO with precomputed references": partial(preference, precompute_ref_log_probs=True),
    "reward": reward,
    "KTO": kto,
    "ORPO": odds,
    "CPO": contrastive_preference,
    "GRPO": sampled,
    "RLOO": partial(sampled, cls=RLOOTrainer, args=RLOOConfig),
}
