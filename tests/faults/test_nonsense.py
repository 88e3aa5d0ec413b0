"""Recipes of settings that are wrong, odd or contradict each other, up to the first update: our error, or a run.

pytest -m slow tests/faults/test_nonsense.py      # each by itself, and many pairs
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.faults.runs import log_of, run, write_recipe

SETTINGS = {
    "training": [
        "optim=nonsense", "optim=adafactor", "optim=adamw_bnb_8bit", "optim=galore_adamw", "learning_rate=-1",
        "learning_rate=1e400", "max_grad_norm=-1", "warmup_steps=-3", "warmup_steps=1e9",
        "lr_scheduler_kwargs={a: 1}", "lr_scheduler_type=cosine_with_min_lr", "save_steps=0", "save_steps=-1",
        "save_steps=0.5", "logging_steps=0", "eval_steps=0", "bf16=true", "fp16=true", "tf32=true", "seed=-1",
        "seed=99999999999999999999", "data_seed=-5", "max_steps=0", "num_train_epochs=1e-9", "num_train_epochs=1e9",
        "save_total_limit=-1", "save_total_limit=0", "weight_decay=-1", "adam_beta1=2", "adam_epsilon=0",
        "gradient_accumulation_steps=1", "gradient_accumulation_steps=1000", "dataloader_num_workers=-1",
        "dataloader_prefetch_factor=0", "torch_compile_backend=nonsense", "deepspeed=nonexistent.json",
        "deepspeed={}", "deepspeed={zero_optimization: 3}", "fsdp=nonsense", "fsdp=full_shard", "fsdp_config={a: 1}",
        "report_to=nonsense", "report_to=wandb", "hub_strategy=x", "neftune_noise_alpha=5", "optim_args=a=b",
        "optim_target_modules=[x]", "accelerator_config={x: 1}", "parallelism_config={x: 1}",
        "metric_for_best_model=loss", "load_best_model_at_end=true", "ddp_backend=nonsense", "label_names=[a]",
        "gradient_checkpointing=true", "gradient_checkpointing_kwargs={x: 1}", "full_determinism=true",
        "eval_strategy=steps", "save_strategy=best", "logging_strategy=epoch", "log_level=nonsense",
        "output_dir=/proc/x", "output_dir=/dev/null",
    ],
    "model": [
        "model.config.hidden_size=33", "model.config.hidden_size=0", "model.config.hidden_size=-4",
        "model.config.hidden_size=1.5", "model.config.hidden_size=many", "model.config.num_attention_heads=3",
        "model.config.num_attention_heads=0", "model.config.num_key_value_heads=3",
        "model.config.num_hidden_layers=0", "model.config.num_hidden_layers=-1", "model.config.num_hidden_layers=x",
        "model.config.hidden_act=nonsense", "model.config.rope_theta=x",
        "model.config.rope_parameters={rope_type: nonsense}", "model.config.vocab_size=3",
        "model.config.vocab_size=-3", "model.config.pad_token_id=100000", "model.config.attention_dropout=7",
        "model.config.rms_norm_eps=x", "model.config.initializer_range=-1", "model.config.max_position_embeddings=2",
        "model.config={model_type: bert}", "model.config={model_type: t5}", "model.config={model_type: clip}",
        "model.config={model_type: mamba}", "model.config={model_type: gpt2, n_embd: 30, n_head: 4}",
        "model.dtype=float16", "model.attn_implementation=nonsense", "model.attn_implementation=flash_attention_2",
        "model.attn_implementation=flex_attention", "model.tokenizer_name_or_path=nonexistent",
        "model.chat_template=nonexistent",
    ],
    "data": [
        "data.path=nonexistent.jsonl", "data.path=/dev/null", "data.path=packtrain:nonsense",
        "data.path=packtrain:long_tailed", "data.split=nonsense", "data.name=x", "data.format=nonsense",
        "data.format=messages", "data.max_length=1", "data.max_length=2", "data.overflow=error", "data.overflow=drop",
        "data.overflow=split", "data.completion_only_loss=true", "data.assistant_only_loss=true", "data.num_rows=1",
        "data.num_rows=2", "data.eval_size=59", "data.eval_size=60", "data.eval_size=0.999",
        "data.eval_path=nonexistent", "data.num_proc=1",
    ],
    "batching": [
        "batching.strategy=nonsense", "batching.strategy=os:system", "batching.strategy=nonexistent.module:f",
        "batching.strategy=bfd", "batching.strategy=wrapped", "batching.strategy=stream", "batching.strategy=optimal",
        "batching.strategy=pad_max", "batching.examples_per_step=1", "batching.examples_per_step=100000",
        "batching.max_tokens=512", "batching.tokens_per_step=1", "batching.tokens_per_step=100000",
        "batching.probe_memory=true",
    ],
    "objective": [
        "objective.name=masked_diffusion", "objective.name=block_diffusion",
        "objective={name: masked_diffusion, tail: rainbow, canvas: batch_max}", "objective.loss_weighting=example",
        "objective.mask_token=x",
    ],
    "lora": [
        "lora.r=0", "lora.r=-1", "lora.r=100000", "lora={}", "lora.target_modules=[nonsense]",
        "lora.target_modules=all-linear", "lora.target_modules='('", "lora.lora_alpha=0", "lora.lora_dropout=2",
        "lora.task_type=SEQ_CLS", "lora.task_type=nonsense", "lora.bias=all", "lora.use_dora=true",
        "lora.modules_to_save=[nonsense]", "lora.layers_to_transform=[99]", "lora.init_lora_weights=nonsense",
        "lora.rank_pattern={x: -1}", "lora.peft_type=nonsense", "lora.loftq_config={x: 1}", "lora.megatron_config={}",
        "lora.eva_config={}", "lora.target_parameters=[x]", "lora.trainable_token_indices=[100000]",
    ],
}  # fmt: skip
EVERY = [setting for section in SETTINGS.values() for setting in section]
PAIRS = [random.Random(seed).sample(EVERY, 2) for seed in range(40)]


def trains(directory: Path, overrides: list[str]) -> bool:
    """Whether the command made its one update, in a process of its own; a traceback fails the test."""
    recipe = write_recipe(directory)
    recipe.with_name("log.txt").unlink(missing_ok=True)
    code = run(recipe, *[word for setting in ["training.max_steps=1", *overrides] for word in ("--set", setting)])
    said = log_of(recipe)
    assert code in (0, 2) and "Traceback" not in said, (overrides, code, said[-2000:])
    assert code == 0 or "error: " in said, overrides
    return code == 0


@pytest.mark.ci
@pytest.mark.slow
@settings(max_examples=5)
@given(overrides=st.lists(st.sampled_from(EVERY), min_size=1, max_size=3))
def test_some_nonsense(tmp_path, overrides):
    trains(tmp_path, overrides)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("section", [*SETTINGS, "pairs"])
def test_much_nonsense(tmp_path, record_property, section):
    tried = PAIRS if section == "pairs" else [[setting] for setting in SETTINGS[section]]
    trained = [trains(tmp_path, overrides) for overrides in tried]
    record_property("times", len(tried))
    record_property("note", f"{len(tried) - sum(trained)} refused")
    assert any(trained) and not all(trained)  # control: not everything is refused
