"""The trainers of the study: people's own trainers, tasks and collators, on random texts of ragged lengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerFast,
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
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from packtrain.modeling.audit.models import tiny_model
from results.unpad.vision import pictured

SPECIAL = ["<pad>", "<s>", "</s>", "<mask>", "<unk>"]
COMMON: dict[str, Any] = dict(
    logging_steps=1,
    learning_rate=1e-3,
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    report_to="none",
    save_strategy="no",
    disable_tqdm=True,
)
Load = Callable[..., PreTrainedModel]  # (auto class, **changes of the configuration) -> a model with its first weights


class Words:
    """Random texts in which every word is one token, of the given lengths.

    Attributes:
        rows: how many rows a dataset has.
        tokenizer: with a pad, an end and a mask token; it adds none of them to a text.
    """

    def __init__(self, vocabulary: int, lengths: np.ndarray, rows: int):
        words = SPECIAL + [f"w{number}" for number in range(vocabulary - len(SPECIAL))]
        backend = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
        backend.pre_tokenizer = WhitespaceSplit()
        names = dict(zip(("pad_token", "bos_token", "eos_token", "mask_token", "unk_token"), SPECIAL, strict=True))
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
        self.rows, self._lengths = rows, lengths
        self._vocabulary, self._generator, self._drawn = vocabulary, np.random.default_rng(0), 0

    def ids(self) -> list[int]:
        """Draws the ids of a text of the next length."""
        length = int(self._lengths[self._drawn % len(self._lengths)])
        self._drawn += 1
        return self._generator.integers(len(SPECIAL), self._vocabulary, length).tolist()

    def text(self) -> str:
        return " ".join(f"w{number - len(SPECIAL)}" for number in self.ids())

    def table(self, row: Callable[[int], dict[str, Any]]) -> datasets.Dataset:
        return datasets.Dataset.from_list([row(number) for number in range(self.rows)])


def long_tailed(mean: float, longest: int, number: int, *, sigma: float = 1.15) -> np.ndarray:
    """Draws lognormal lengths, int64 `[number]`, between 2 and `longest`; `mean` is theirs before they are cut."""
    draws = np.random.default_rng(1).lognormal(0.0, sigma, number)
    return np.clip(draws / draws.mean() * mean, 2, longest).astype(np.int64)


def tiny(family: str, vocabulary: int) -> Load:
    """Returns what builds tiny models of an architecture, the same weights every time, in float32 and without dropout."""

    def load(auto: Any, **changes: Any) -> PreTrainedModel:
        config = tiny_model(family, vocab_size=vocabulary).config
        config.pad_token_id = 0
        for name, value in changes.items():
            setattr(config, name, value)
        torch.manual_seed(0)
        return auto.from_config(config)

    return load


# transformers' Trainer


def causal(load: Load, words: Words, settings: Mapping[str, Any]) -> Trainer:
    def row(_: int) -> dict[str, Any]:
        ids = words.ids()
        prompt = max(1, len(ids) // 3)
        return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}

    return _trainer(load(AutoModelForCausalLM), words, row, DataCollatorForSeq2Seq(words.tokenizer), settings)


def sequence(load: Load, words: Words, settings: Mapping[str, Any]) -> Trainer:
    model = load(AutoModelForSequenceClassification, num_labels=2)
    collator = DataCollatorWithPadding(words.tokenizer)
    return _trainer(model, words, lambda n: {"input_ids": words.ids(), "label": n % 2}, collator, settings)


def tokens(load: Load, words: Words, settings: Mapping[str, Any]) -> Trainer:
    def row(_: int) -> dict[str, Any]:
        ids = words.ids()
        return {"input_ids": ids, "labels": [token % 2 for token in ids]}

    model = load(AutoModelForTokenClassification, num_labels=2)
    return _trainer(model, words, row, DataCollatorForTokenClassification(words.tokenizer), settings)


def masked(load: Load, words: Words, settings: Mapping[str, Any]) -> Trainer:
    collator = DataCollatorForLanguageModeling(words.tokenizer, mlm_probability=0.3, seed=1)
    return _trainer(load(AutoModelForMaskedLM), words, lambda _: {"input_ids": words.ids()}, collator, settings)


def answering(load: Load, words: Words, settings: Mapping[str, Any]) -> Trainer:
    def row(_: int) -> dict[str, Any]:
        ids = words.ids()
        return {"input_ids": ids, "start_positions": len(ids) // 3, "end_positions": len(ids) - 1}

    collator = DataCollatorWithPadding(words.tokenizer)
    return _trainer(load(AutoModelForQuestionAnswering), words, row, collator, settings)


class Contrastive(Trainer):
    """Learns embeddings in which a text is nearest to its own pair among those of the batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mask = inputs["attention_mask"][..., None]
        hidden = model(**inputs).last_hidden_state
        embedded = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)  # [2B, D]
        texts, pairs = embedded.chunk(2)
        return F.cross_entropy(texts @ pairs.T / 0.05, torch.arange(len(texts), device=texts.device))


@dataclass(frozen=True)
class Pairs:
    """Collates texts and, behind them, their pairs to one padded batch."""

    tokenizer: PreTrainedTokenizerFast

    def __call__(self, rows: list[dict[str, Any]]) -> Mapping[str, torch.Tensor]:
        texts = [row["input_ids"] for row in rows] + [row["pair_ids"] for row in rows]
        return self.tokenizer.pad({"input_ids": texts}, return_tensors="pt")


def contrastive(load: Load, words: Words, settings: Mapping[str, Any]) -> Trainer:
    settings = dict(settings) | {"remove_unused_columns": False}
    rows = words.table(lambda _: {"input_ids": words.ids(), "pair_ids": words.ids()})
    arguments = TrainingArguments(**COMMON | settings)
    return Contrastive(load(AutoModel), arguments, train_dataset=rows, data_collator=Pairs(words.tokenizer))


def _trainer(
    model: PreTrainedModel, words: Words, row: Callable, collator: Any, settings: Mapping[str, Any]
) -> Trainer:
    arguments = TrainingArguments(**COMMON | dict(settings))
    return Trainer(model, arguments, train_dataset=words.table(row), data_collator=collator)


# TRL


def preferences(words: Words) -> datasets.Dataset:
    return words.table(lambda _: {"prompt": words.text(), "chosen": words.text(), "rejected": words.text()})


def saved(load: Load, settings: Mapping[str, Any]) -> PreTrainedModel:
    """Returns a language model that has been saved: TRL loads the reference model from where the model came from."""
    load(AutoModelForCausalLM).save_pretrained(f"{settings['output_dir']}/saved")
    return AutoModelForCausalLM.from_pretrained(f"{settings['output_dir']}/saved")


def _of_trl(trainer: type[Trainer], config: type[TrainingArguments]):
    """Returns a builder of a preference trainer of TRL, as a user would call it."""

    def build(
        load: Load, words: Words, settings: Mapping[str, Any], *, reference: bool = False, **more: Any
    ) -> Trainer:
        model = saved(load, settings)
        lora = {"peft_config": LoraConfig(target_modules=["q_proj", "v_proj"])} if more.pop("lora", False) else {}
        given = {"ref_model": load(AutoModelForCausalLM)} if reference else {}
        arguments = config(**COMMON | {"max_length": 1024} | dict(settings) | more)
        rows = preferences(words)
        return trainer(
            model=model, args=arguments, train_dataset=rows, processing_class=words.tokenizer, **given, **lora
        )

    return build


dpo, cpo, orpo = _of_trl(DPOTrainer, DPOConfig), _of_trl(CPOTrainer, CPOConfig), _of_trl(ORPOTrainer, ORPOConfig)


def reward(load: Load, words: Words, settings: Mapping[str, Any]) -> Trainer:
    model = load(AutoModelForSequenceClassification, num_labels=1)
    arguments = RewardConfig(**COMMON | {"max_length": 1024} | dict(settings))
    rows = words.table(lambda _: {"chosen": words.text(), "rejected": words.text()})
    return RewardTrainer(model=model, args=arguments, train_dataset=rows, processing_class=words.tokenizer)


def kto(load: Load, words: Words, settings: Mapping[str, Any]) -> Trainer:
    arguments = KTOConfig(**COMMON | {"max_length": 1024} | dict(settings))
    rows = words.table(lambda n: {"prompt": words.text(), "completion": words.text(), "label": n % 2 == 0})
    trained = dict(train_dataset=rows, processing_class=words.tokenizer)
    return KTOTrainer(model=saved(load, settings), args=arguments, **trained)


def high(completions: list[str], **_: Any) -> list[float]:
    """Rewards words of high numbers."""
    return [sum(int(word[1:]) for word in text.split() if word[1:].isdigit()) / 1000 for text in completions]


def _sampling(trainer: type[Trainer], config: type[TrainingArguments]):
    """Returns a builder of a trainer of TRL that samples completions, two for each prompt."""

    def build(load: Load, words: Words, settings: Mapping[str, Any]) -> Trainer:
        sampled = dict(num_generations=2, max_completion_length=8, beta=0.04, num_iterations=2)
        arguments = config(**COMMON | dict(settings) | sampled)
        rows = words.table(lambda _: {"prompt": words.text()})
        given = dict(train_dataset=rows, processing_class=words.tokenizer, reward_funcs=high)
        return trainer(model=saved(load, settings), args=arguments, **given)

    return build


grpo, rloo = _sampling(GRPOTrainer, GRPOConfig), _sampling(RLOOTrainer, RLOOConfig)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A trainer with a task, and the architectures it is tried on."""

    trainer: str
    build: Callable[..., Trainer]
    families: tuple[str, ...]
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def samples(self) -> bool:
        """Whether the trainer samples what it learns from."""
        return self.build in (grpo, rloo)

    def __call__(self, family: str, words: Words, settings: Mapping[str, Any]) -> Trainer:
        if self.build is pictured:
            return pictured(family, words, COMMON | dict(settings))
        return self.build(tiny(family, words._vocabulary), words, settings, **dict(self.options))


DECODERS = ("llama", "qwen3", "gemma3_text", "gpt2")
ENCODERS = ("bert", "roberta", "modernbert", "distilbert")
CASES = (
    Case(trainer="Trainer, causal language model", build=causal, families=(*DECODERS, "mixtral", "qwen3_moe")),
    Case(trainer="Trainer, sequence classification", build=sequence, families=(*DECODERS, *ENCODERS)),
    Case(trainer="Trainer, token classification", build=tokens, families=("llama", "qwen3", *ENCODERS)),
    Case(trainer="Trainer, masked language model", build=masked, families=ENCODERS),
    Case(trainer="Trainer, question answering", build=answering, families=("llama", *ENCODERS)),
    Case(trainer="Trainer, contrastive embedding", build=contrastive, families=("qwen3", "bert", "modernbert")),
    Case(trainer="DPOTrainer", build=dpo, families=(*DECODERS, "qwen3_moe")),
    Case(trainer="DPOTrainer, own reference model", build=dpo, families=("llama",), options=(("reference", True),)),
    Case(trainer="DPOTrainer, LoRA", build=dpo, families=("llama", "qwen3"), options=(("lora", True),)),
    Case(
        trainer="DPOTrainer, precomputed reference",
        build=dpo,
        families=("llama",),
        options=(("precompute_ref_log_probs", True),),
    ),
    Case(trainer="RewardTrainer", build=reward, families=("llama", "qwen3", "gemma3_text", "gpt2")),
    Case(trainer="KTOTrainer", build=kto, families=("llama", "qwen3")),
    Case(trainer="CPOTrainer", build=cpo, families=("llama",)),
    Case(trainer="ORPOTrainer", build=orpo, families=("llama",)),
    Case(trainer="GRPOTrainer", build=grpo, families=("llama", "qwen3")),
    Case(trainer="RLOOTrainer", build=rloo, families=("llama",)),
    Case(trainer="Trainer, images in every other row", build=pictured, families=("qwen2_5_vl", "qwen3_vl", "llava")),
)
