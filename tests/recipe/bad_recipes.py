"""Recipes that are wrong, each with what its error must say, and the right one that they are made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from packtrain.errors import RecipeError
from packtrain.recipe.reader import load_recipe

GOOD = """\
model: {model_name_or_path: org/model}
data: {path: rows.jsonl}
training: {output_dir: results/run}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(path: Path, overrides: list[str] | None = None) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides or [])
    return caught.value


# (what follows GOOD or replaces it, overrides, parts of the message)
BAD: dict[str, tuple[str, list[str], list[str]]] = {
    "empty": ("", [], ["is empty", "model, data, batching"]),
    "comment only": ("# nothing\n", [], ["is empty"]),
    "list": ("- a\n- b\n", [], ["is not a mapping of sections"]),
    "word": ("quickstart\n", [], ["is not a mapping of sections"]),
    "unclosed": ("model: {a: 1\n", [], ["cannot be read as YAML", "recipe.yaml:"]),
    "tab": ("model:\n\tdtype: auto\n", [], ["cannot be read as YAML", ":2", "indent with spaces"]),
    "two documents": (GOOD + "---\n" + GOOD, [], ["cannot be read as YAML"]),
    "alias": (GOOD + "batching: &b {max_tokens: 4096}\nobjective: *b\n", [], ["alias", "write the value out"]),
    "python object": (GOOD + "lora: !!python/object/apply:os.system [id]\n", [], ["tag", "plain values only"]),
    "timestamp tag": (GOOD + "batching: {strategy: !!timestamp 2024-01-01}\n", [], ["tag"]),
    "nested too deep": ("model: " + "[" * 500 + "]" * 500, [], ["nested deeper"]),
    "lone surrogate": (GOOD + 'objective: {name: "\\ud800"}\n', [], ["cannot be read as str"]),
    "impossible escape": (GOOD + 'objective: {name: "\\UFFFFFFFF"}\n', [], ["cannot be read as YAML"]),
    "key is a number": (GOOD + "batching: {1: 2}\n", [], ["a key must be a plain word", ":4", "got '1'"]),
    "key is a list": (GOOD + "batching: {[1, 2]: 2}\n", [], ["a key must be a plain word"]),
    "twice in a section": (
        GOOD + "batching:\n  max_tokens: 4096\n  max_tokens: 8192\n",
        [],
        ["recipe.yaml:6: batching.max_tokens: is given twice (got 8192)", "recipe.yaml:5"],
    ),
    "output_dir leads out": (
        GOOD,
        ["training.output_dir=runs/../../x"],
        ["training.output_dir: must be printable", "a plain path"],
    ),
    "run_name of two lines": (GOOD, ['training.run_name="a\\nb"'], ["training.run_name: must be printable"]),
    "section twice": (GOOD + "data: {path: other}\n", [], ["data: is given twice", "recipe.yaml:2"]),
    "unknown section": (GOOD + "bathcing: {}\n", [], ["bathcing: is not a section", "did you mean `batching`?"]),
    "key at the top": (
        GOOD + "learning_rate: 1e-4\n",
        [],
        ["recipe.yaml:4: learning_rate: is not a section", "it belongs under `training:`"],
    ),
    "misspelled key": (
        GOOD + "batching: {max_token: 4096}\n",
        [],
        ["recipe.yaml:4: batching.max_token: is not a key (got 4096)", "did you mean `max_tokens`?"],
    ),
    "key in the wrong section": (
        GOOD + "batching: {max_length: 512}\n",
        [],
        ["batching.max_length: is not a key", "it belongs under `data:`"],
    ),
    "near a key of another section": (
        GOOD + "batching: {lerning_rate: 1}\n",
        [],
        ["did you mean `training.learning_rate`?"],
    ),
    "unknown everywhere": (
        GOOD + "batching: {zzz: 1}\n",
        [],
        ["its keys are strategy, examples_per_step, max_tokens, tokens_per_step"],
    ),
    "older training key": (
        GOOD,
        ["training.evaluation_strategy=steps"],
        ["--set: training.evaluation_strategy: is not a key", "did you mean `eval_strategy`?"],
    ),
    "unknown training key": (GOOD, ["training.zzzz=1"], ["takes the fields of TrainingArguments"]),
    "misspelled lora key": (GOOD, ["lora.lora_alhpa=1"], ["did you mean `lora_alpha`?"]),
    "unknown lora key": (GOOD, ["lora.zzzz=1"], ["takes the fields of LoraConfig"]),
    "word of other trainers": (GOOD + "data2: {}\n", ["training.packing=true"], ["use `batching.strategy`"]),
    "section is a word": (GOOD + "batching: fast\n", [], ["batching: must be a mapping of keys"]),
    "lora without keys": (GOOD + "lora:\n", [], ["lora: is empty", "write `lora: {}`"]),
    "text for a whole number": (GOOD, ["batching.max_tokens=many"], ["must be a whole number above 0 (got 'many')"]),
    "grouped digits": (GOOD, ["batching.max_tokens=16_384"], ["must be a whole number above 0", "write 16384"]),
    "half a token": (GOOD, ["batching.max_tokens=10.5"], ["must be a whole number above 0 (got 10.5)"]),
    "bool for a whole number": (GOOD, ["batching.max_tokens=true"], ["must be a whole number above 0 (got True)"]),
    "no tokens": (GOOD, ["batching.max_tokens=0"], ["must be a whole number above 0 (got 0)"]),
    "list for a number": (GOOD, ["data.max_length=[1]"], ["must be a whole number above 0 (got [1])"]),
    "text for a number": (GOOD, ["training.learning_rate=fast"], ["must be a number (got 'fast')"]),
    "not a number": (GOOD, ["training.learning_rate=.nan"], ["must be a number (got nan)"]),
    "bool for a number": (GOOD, ["training.weight_decay=false"], ["must be a number (got False)"]),
    "yes": (GOOD, ["training.bf16=yes"], ["must be true or false (got 'yes')", "write true"]),
    "one": (GOOD, ["training.bf16=1"], ["must be true or false (got 1)"]),
    "number for text": (GOOD, ["training.run_name=2024"], ["must be text (got 2024)", 'quotes: "2024"']),
    "unknown choice": (GOOD, ["data.overflow=truncat"], ["must be one of error, truncate", "did you mean truncate?"]),
    "unknown choice of a library": (GOOD, ["lr_scheduler_type=cosin"], ["did you mean cosine?"]),
    "unknown bias": (GOOD, ["lora.bias=some"], ["must be one of none, all, lora_only"]),
    "too long a share": (GOOD, ["data.eval_size=1.5"], ["a whole number of rows or a share below 1"]),
    "fewer than no rows": (GOOD, ["data.eval_size=-1"], ["a whole number of rows or a share below 1"]),
    "empty path": (GOOD, ["data.path=''"], ["data.path: must not be empty"]),
    "blank output": (GOOD, ["training.output_dir='  '"], ["training.output_dir: must not be empty"]),
    "an empty list": (GOOD, ["data.path=[]"], ["data.path: must be text or a list of text"]),
    "a mixture and a path": (
        GOOD,
        ["data.mixture=[{path: a, weight: 1}]", "data.num_rows=3", "data.name=x", "data.eval_split=test"],
        [
            "data.path: contradicts",
            "data.num_rows: contradicts",
            "data.name: contradicts",
            "data.eval_split: does not say",
        ],
    ),
    "keys of a source": (
        GOOD.replace(
            "path: rows.jsonl", "mixture: [{path: a, weight: 0}, {path: 3, wieght: 1}, b, {weight: .inf, path: a}]"
        ),
        [],
        [
            "data.mixture.0.weight: must be a number above 0 (got 0)",
            "data.mixture.1.path: must be text or a list of text (got 3)",
            "data.mixture.1.wieght: is not a key (got 1)\n    fix: did you mean `weight`?",
            "data.mixture.1.weight: is missing",
            "data.mixture.2: must be a mapping of keys to values (got 'b')",
            "data.mixture.3.weight: must be a number above 0",
        ],
    ),
    "no source": (GOOD.replace("path: rows.jsonl", "mixture: []"), [], ["data.mixture: must be a list of mappings"]),
    "one source twice": (
        GOOD.replace(
            "path: rows.jsonl",
            "mixture: [{path: a, weight: 1}, {path: ./a, weight: 2}, {path: a, weight: 1, split: test}]",
        ),
        [],
        ["data.mixture.1: is the same source as `data.mixture.0`"],
    ),
    "nothing to keep by": (GOOD, ["data.keep={}"], ["data.keep.by: is missing", "data.keep.share: is missing"]),
    "a share that is all": (
        GOOD,
        ["data.keep={by: random, share: 1, whihc: low}"],
        ["share: must be a number above 0 and below 1 (got 1)", "keep.whihc: is not a key", "did you mean `which`?"],
    ),
    "a share alone": (GOOD, ["data.keep=0.7"], ["data.keep: must be a mapping with by and share (got 0.7)"]),
    "kept by nothing": (
        GOOD,
        ["data.keep={by: el2n, share: 0.7, seed: 3}"],
        ["data.keep.scores: is missing: there is no `el2n`", "packtrain score", "data.keep.seed: has no effect"],
    ),
    "kept at random by scores": (
        GOOD.replace("path: rows.jsonl", "mixture: [{path: a, weight: 1}]"),
        ["data.keep={by: random, share: 0.7, which: low, scores: x}"],
        ["keep.scores: has no effect", "keep.which: has no effect", "data.keep: contradicts `data.mixture`"],
    ),
    "streamed as if it were counted": (
        GOOD,
        [
            "data.streaming=true",
            "data.eval_size=5",
            "data.num_proc=2",
            "data.keep={by: random, share: 0.5}",
            "batching.strategy=bfd",
            "batching.shapes=4",
            "batching.schedule=[{until: 0.3, max_length: 8}]",
            "objective.name=masked_lm",
            "training.save_strategy=epoch",
            "training.dataloader_num_workers=2",
        ],
        [
            "training.max_steps: must be set with `data.streaming`",
            "data.eval_size: chooses among all rows",
            "name rows to evaluate on in `data.eval_path`",
            "data.num_proc: has no effect with `data.streaming`",
            "data.keep: chooses among all examples",
            "batching.strategy: packs the whole epoch, and streamed rows",
            "fix: choose a strategy that keeps the examples of each update: pad_max, pad_longest",
            "batching.shapes: is found from the lengths of all examples",
            "batching.schedule: takes the short examples",
            "objective.name: `masked_lm` looks at all examples first",
            "choose one that takes streamed rows (causal_lm)",
            "training.save_strategy: cannot be `epoch` with `data.streaming`",
            "fix: set it to `steps`, with `training.save_steps`",
            "training.dataloader_num_workers: has no effect with `data.streaming`",
        ],
    ),
    "a streamed mixture": (
        GOOD.replace("path: rows.jsonl", "mixture: [{path: a, weight: 1}]"),
        ["data.streaming=true", "training.max_steps=5"],
        ["data.mixture: cannot be streamed", "name the rows in `data.path`, which takes a list"],
    ),
    "a buffer of nothing": (GOOD, ["data.buffer_size=5"], ["data.buffer_size: has no effect without `data.streaming`"]),
    "a path taken away": (GOOD, ["data.path=null"], ["data.path: is missing"]),
    "no path": ("model: {model_name_or_path: m}\ntraining: {output_dir: x}\n", [], ["data.path: is missing"]),
    "no output": (
        "model: {model_name_or_path: m}\ndata: {path: x}\n",
        [],
        ["training.output_dir: is missing", "results/my_run"],
    ),
    "no model": ("data: {path: x}\ntraining: {output_dir: x}\n", [], ["model: names no model"]),
    "two models": (GOOD, ["model.config={model_type: llama}"], ["contradicts `model.model_name_or_path`"]),
    "config without type": (
        GOOD,
        ["model.model_name_or_path=null", "model.config={hidden_size: 64}", "model.tokenizer_vocab_size=300"],
        ["model.config: lacks `model_type`"],
    ),
    "config without tokenizer": (
        GOOD,
        ["model.model_name_or_path=null", "model.config={model_type: llama}"],
        ["comes without a tokenizer", "model.tokenizer_vocab_size"],
    ),
    "two tokenizers": (
        GOOD,
        ["tokenizer_vocab_size=300", "tokenizer_name_or_path=gpt2"],
        ["model.tokenizer_vocab_size: contradicts `model.tokenizer_name_or_path`"],
    ),
    "new tokenizer for an old model": (GOOD, ["tokenizer_vocab_size=300"], ["keeps its own tokenizer"]),
    "tiny vocabulary": (GOOD, ["tokenizer_vocab_size=100"], ["must be a whole number from 264 on (got 100)"]),
    "remote code": (GOOD, ["trust_remote_code=true"], ["must be pinned", "full commit hash"]),
    "remote code of a branch": (GOOD, ["trust_remote_code=true", "revision=main"], ["must be pinned"]),
    "revision of nothing": (
        GOOD,
        ["model_name_or_path=null", "config={model_type: llama}", "tokenizer_vocab_size=300", "revision=main"],
        ["model.revision: has no effect"],
    ),
    "two evaluation sets": (GOOD, ["eval_size=10", "eval_split=test"], ["contradicts `data.eval_split`"]),
    "evaluation on training data": (GOOD, ["eval_split=train"], ["data.eval_split: names the training data"]),
    "evaluation on the training file": (GOOD, ["eval_path=rows.jsonl"], ["data.eval_path: names the training data"]),
    "evaluation without data": (
        GOOD,
        ["training.eval_strategy=steps"],
        ["training.eval_strategy: needs evaluation data", "data.eval_size"],
    ),
    "best model without data": (GOOD, ["load_best_model_at_end=true"], ["needs evaluation data"]),
    "an example that can't fit": (
        GOOD,
        ["max_tokens=1024"],
        ["batching.max_tokens: is below `data.max_length` (2048)", "lower `data.max_length` to 1024"],
    ),
    "batch size": (
        GOOD,
        ["training.per_device_train_batch_size=4"],
        ["cannot be set", "batching.examples_per_step", "batching.max_tokens"],
    ),
    "sampling": (GOOD, ["train_sampling_strategy=group_by_length"], ["set `batching.strategy`"]),
    "group_by_length": (GOOD, ["training.group_by_length=true"], ["use `batching.strategy: group_by_length`"]),
    "batch size by trial": (GOOD, ["auto_find_batch_size=true"], ["lower `batching.max_tokens`"]),
    "unused columns": (GOOD, ["remove_unused_columns=true"], ["must stay False", "packed batches"]),
    "nan filter": (GOOD, ["logging_nan_inf_filter=true"], ["a loss of NaN would be logged as 0.0"]),
    "averaging": (GOOD, ["average_tokens_across_devices=false"], ["must stay True"]),
    "label smoothing": (GOOD, ["label_smoothing_factor=0.1"], ["must stay 0.0", "no label smoothing"]),
    "cache": (GOOD, ["training.use_cache=true"], ["joins the documents"]),
    "an update that the scaler would miss": (
        GOOD,
        ["fp16=true", "on_nonfinite=skip"],
        ["batching.on_nonfinite: cannot be `skip` with `training.fp16`"],
    ),
    "evaluation batches": (GOOD, ["per_device_eval_batch_size=4"], ["cannot be set", "set `batching.max_tokens`"]),
    "evaluation in halves": (GOOD, ["bf16_full_eval=true", "fp16_full_eval=true"], ["bf16_full_eval: must", "fp16_f"]),
    "evaluation by a switch": (GOOD, ["do_eval=true"], ["training.do_eval: cannot be set", "data.eval_size"]),
    "kept predictions": (GOOD, ["eval_accumulation_steps=4"], ["keeps no predictions"]),
    "wanted predictions": (GOOD, ["prediction_loss_only=false"], ["must stay True: evaluation sums losses"]),
    "inputs for metrics": (GOOD, ["include_for_metrics=[inputs]"], ["must stay []"]),
    "other metrics": (GOOD, ["batch_eval_metrics=true", "eval_use_gather_object=true"], ["batch_eval_m", "eval_use_g"]),
    "apart": (GOOD, ["eval_do_concat_batches=false"], ["must stay True: evaluation keeps no predictions"]),
    "lasting workers": (GOOD, ["dataloader_persistent_workers=true"], ["every epoch starts its own workers"]),
    "other workers": (GOOD, ["dataloader_multiprocessing_context=spawn"], ["Python's default method"]),
    "batches out of order": (GOOD, ["dataloader_in_order=false"], ["must stay True"]),
    "batches read again": (GOOD, ["ignore_data_skip=false"], ["must stay True", "resumes at the update"]),
    "another bar": (GOOD, ["disable_tqdm=false"], ["must stay True", "its own progress bar"]),
    "accelerate's loader": (
        GOOD,
        ["accelerator_config={split_batches: true, non_blocking: true}"],
        ["accelerator_config: cannot set `split_batches`", "leave `non_blocking` out"],
    ),
    "noise by rows": (GOOD, ["neftune_noise_alpha=5"], ["a row of this strategy holds many documents", "pad_longest"]),
    "fewer than no steps": (GOOD, ["max_steps=-5"], ["training.max_steps: must be greater than 0 (got -5)"]),
    "no steps": (GOOD, ["max_steps=0"], ["training.max_steps: must be greater than 0 (got 0)"]),
    "longer than any": (GOOD, ["max_length=100000000", "max_tokens=100000000"], ["data.max_length: must be at most"]),
    "a variable": (GOOD, ["output_dir=$HOME/out"], ["training.output_dir: has a `$` in it"]),
    "two precisions": (GOOD, ["bf16=true", "fp16=true"], ["contradicts `training.bf16`"]),
    "no epochs": (GOOD, ["num_train_epochs=0"], ["trains for no epoch"]),
    "accumulation": (GOOD, ["gradient_accumulation_steps=some"], ["must be a whole number above 0 or auto"]),
    "override without value": (
        GOOD,
        ["batching.max_tokens"],
        ["--set: is not an override (got 'batching.max_tokens')"],
    ),
    "override without key": (GOOD, ["=3"], ["is not an override"]),
    "override with a hole": (GOOD, ["batching..max_tokens=3"], ["is not an override"]),
    "override of nothing": (GOOD, ["max_lenght=3"], ["not a key of any section", "did you mean `data.max_length`?"]),
    "override below a leaf": (
        GOOD,
        ["data.path.x=3"],
        ["data.path: is a value, not a mapping of keys (got 'rows.jsonl')"],
    ),
    "override that is no YAML": (
        GOOD,
        ["lora.target_modules=[q"],
        ["--set: lora.target_modules: cannot be read as YAML"],
    ),
}
