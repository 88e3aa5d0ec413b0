"""The table of settings: those of transformers, TRL and packtrain, of peers, and a control that fails every question.

What is settled for a trainer is on this page, and in `arguments.py` what is settled for all.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml
from torch.nn.functional import cross_entropy
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

from results.conformance.arguments import COMMON, parts, sizes, world_size
from results.conformance.peers import PEERS
from results.conformance.questions import Setting
from results.conformance.rows import EOS, PACK, Job, as_ids, as_texts, model_directory, write, write_lines

# transformers


def stock(job: Job, collator: str, trainer: type[Trainer] = Trainer, **options: Any) -> Trainer:
    model, tokenizer = parts(job)
    made = {
        "seq2seq": lambda: DataCollatorForSeq2Seq(tokenizer),
        "language": lambda: DataCollatorForLanguageModeling(tokenizer, mlm=False),
        "flattening": lambda: DataCollatorWithFlattening(return_flash_attn_kwargs=True),
        "leaking": lambda: leaking,
    }[collator]()
    rows = datasets.Dataset.from_list(as_ids(job, job.rows, labels=collator != "language"))
    arguments = COMMON | sizes(job, world_size(), lambda _: len(rows)) | options
    return trainer(
        model,
        TrainingArguments(**arguments),
        train_dataset=rows,
        eval_dataset=datasets.Dataset.from_list(as_ids(job, job.held_out, labels=collator != "language"))
        if job.held_out
        else None,
        data_collator=made,
        processing_class=tokenizer,
    )


# TRL


def sft(job: Job, *, attached: bool = False, **options: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = parts(job)
    counted = partial(sft, attached=False, **options)
    settings = COMMON | sizes(job, world_size(), lambda given: len(counted(given).train_dataset))
    settings |= dict(max_length=job.max_length, bf16=False, gradient_checkpointing=False) | options
    trainer = SFTTrainer(
        model,
        SFTConfig(**settings),
        train_dataset=datasets.Dataset.from_list(as_texts(job, job.rows)),
        eval_dataset=datasets.Dataset.from_list(as_texts(job, job.held_out)) if job.held_out else None,
        processing_class=tokenizer,
    )
    if attached:
        import packtrain

        return packtrain.attach(trainer)
    return trainer


# packtrain


def recipe(job: Job, strategy: str) -> Any:
    """Builds the trainer of a recipe; `max_tokens` stands for the size of a micro-batch."""
    from packtrain.recipe.reader import load_recipe
    from packtrain.training.run import build

    directory, ranks = Path(job.directory), world_size()
    lengths = [len(row.ids) for row in job.rows]
    if job.parts:
        examples, tokens = len(job.rows), -(-sum(lengths) // (job.parts * ranks))
    else:
        examples = job.per_device * job.accumulation * ranks
        tokens = job.max_length * (1 if strategy == "bfd" else job.per_device)
    if job.held_out:
        tokens = PACK * job.per_device_eval
    saving = dict(save_strategy="steps", save_steps=job.save) if job.save else dict(save_strategy="no")
    sections: dict[str, Any] = {
        "model": {"model_name_or_path": model_directory(job, directory.parent)},
        "data": {"path": write_lines(directory / "rows.jsonl", as_texts(job, job.rows)), "max_length": job.max_length},
        "batching": {"strategy": strategy, "examples_per_step": examples, "max_tokens": tokens},
        "training": COMMON
        | dict(output_dir=str(directory / "run"), max_steps=job.updates, num_train_epochs=1)
        | saving,
    }
    if job.held_out:
        sections["data"]["eval_path"] = write_lines(directory / "held_out.jsonl", as_texts(job, job.held_out))
    return build(load_recipe(write(directory / "recipe.yaml", yaml.safe_dump(sections))))


# The control


def leaking(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Lays rows end to end without a word of where they begin, cut at `PACK` tokens each; every other end is not learnt."""
    ids = [token for row in rows for token in row["input_ids"][:PACK]]
    labels = [label for row in rows for label in row["labels"][: PACK - 1] + [-100] * (len(row["labels"]) >= PACK)]
    ends = [place for place, token in enumerate(ids) if token == EOS]
    for place in ends[::2]:
        labels[place] = -100
    return {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}


class Broken(Trainer):
    """Averages micro-batches, sees one example too few in an update, and begins anew when it is resumed."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        logits, labels = outputs.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
        loss = cross_entropy(logits.float(), labels, ignore_index=-100) / self.args.gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss


def broken(job: Job) -> Trainer:
    short = {} if job.parts else {"per_device_train_batch_size": max(1, job.per_device - 1)}
    return stock(job, "leaking", Broken, ignore_data_skip=True, **short)


def on_transformers(name: str, collator: str, **options: Any) -> Setting:
    everywhere = collator == "language"
    build = partial(stock, collator=collator, **options)
    return Setting(name=name, packages=("transformers",), build=build, everywhere=everywhere)


def on_trl(name: str, **options: Any) -> Setting:
    return Setting(name=name, packages=("trl", "transformers"), build=partial(sft, **options))


def on_packtrain(name: str, strategy: str) -> Setting:
    return Setting(name=name, packages=("packtrain", "transformers"), build=partial(recipe, strategy=strategy))


_LIBRARIES = (
    on_transformers("Trainer, DataCollatorForSeq2Seq", "seq2seq"),
    on_transformers("Trainer, DataCollatorForLanguageModeling", "language"),
    on_transformers("Trainer, group_by_length", "seq2seq", train_sampling_strategy="group_by_length"),
    on_transformers("Trainer, batch_rebalance", "seq2seq", train_sampling_strategy="batch_rebalance"),
    on_transformers("Trainer, DataCollatorWithFlattening", "flattening"),
    on_trl("SFTTrainer, padding"),
    on_trl("SFTTrainer, padding_free", padding_free=True, max_length=None),
    on_trl("SFTTrainer, packing bfd", packing=True, packing_strategy="bfd"),
    on_trl("SFTTrainer, packing bfd_split", packing=True, packing_strategy="bfd_split"),
    on_trl("SFTTrainer, packing wrapped", packing=True, packing_strategy="wrapped"),
)
_OURS = (
    Setting(name="SFTTrainer, attached", packages=("packtrain", "trl"), build=partial(sft, attached=True)),
    on_packtrain("packtrain, balanced", "balanced"),
    on_packtrain("packtrain, bfd", "bfd"),
)
_CONTROL = Setting(name="control", packages=("transformers",), build=broken)
SETTINGS = {setting.name: setting for setting in (*_LIBRARIES, *PEERS, *_OURS, _CONTROL)}
