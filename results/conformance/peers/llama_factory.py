"""LLaMA-Factory: its trainer, built as its `run_sft` builds it; imported in its own environment only."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

from results.conformance.arguments import COMMON, sizes, world_size
from results.conformance.questions import Setting
from results.conformance.rows import Job, as_texts, model_directory, write, write_lines


def trainer(job: Job, **options: Any) -> Any:
    from llamafactory.data import SFTDataCollatorWith4DAttentionMask, get_dataset, get_template_and_fix_tokenizer
    from llamafactory.data.formatter import StringFormatter
    from llamafactory.data.template import TEMPLATES, register_template
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_model, load_tokenizer
    from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer

    if "words" not in TEMPLATES:  # a prompt, an answer and the end token, without words of its own
        answer = StringFormatter(slots=["{{content}}", {"eos_token"}])
        register_template("words", format_user=StringFormatter(slots=["{{content}}"]), format_assistant=answer)
    root = Path(job.directory)
    columns = {"prompt": "prompt", "response": "completion"}
    files = {"rows": job.rows, "held_out": job.held_out}
    as_pairs = dataclasses.replace(job, everywhere=False)
    for name, rows in files.items():
        write_lines(root / f"{name}.jsonl", as_texts(as_pairs, rows))
    described = {name: {"file_name": f"{name}.jsonl", "columns": columns} for name in files}
    write(root / "dataset_info.json", json.dumps(described))
    counted = sizes(job, world_size(), lambda given: len(trainer(given, **options).train_dataset))
    given = COMMON | counted | dict(bf16=False, stage="sft", finetuning_type="full", do_train=True, template="words")
    given |= dict(model_name_or_path=model_directory(job, root.parent), infer_dtype="float32", flash_attn="sdpa")
    given |= dict(dataset_dir=job.directory, dataset="rows", cutoff_len=job.max_length, train_on_prompt=job.everywhere)
    given |= dict(overwrite_cache=True, disable_gradient_checkpointing=True) | options
    if job.held_out:
        given |= dict(eval_dataset="held_out", do_eval=True, eval_strategy="no")
    model_args, data_args, training_args, finetuning_args, _ = get_train_args(given)
    loaded = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(loaded["tokenizer"], data_args)
    made = get_dataset(template, model_args, data_args, training_args, stage="sft", **loaded)
    model = load_model(loaded["tokenizer"], model_args, finetuning_args, True)
    collator = SFTDataCollatorWith4DAttentionMask(
        template=template,
        model=model,
        pad_to_multiple_of=8,
        block_diag_attn=model_args.block_diag_attn,
        neat_packing=data_args.neat_packing,
        attn_implementation=model.config._attn_implementation,
        compute_dtype=model_args.compute_dtype,
        **loaded,
    )
    arguments = dict(model=model, args=training_args, finetuning_args=finetuning_args, data_collator=collator)
    return CustomSeq2SeqTrainer(**arguments, **made, **loaded)


def setting(name: str, **options: Any) -> Setting:
    packages = ("llamafactory", "transformers")
    return Setting(name=name, packages=packages, build=partial(trainer, **options), environment="llamafactory")


SETTINGS = (
    setting("LLaMA-Factory, padding"),
    setting("LLaMA-Factory, packing", packing=True),
    setting("LLaMA-Factory, neat_packing", neat_packing=True),
)
