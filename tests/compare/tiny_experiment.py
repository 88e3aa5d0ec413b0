"""Comparisons that take seconds: a model of 10k weights on generated arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BASE = """
model:
  config: {model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2,
    num_key_value_heads: 1, max_position_embeddings: 512, tie_word_embeddings: true}
  tokenizer_vocab_size: 300
data: {path: packtrain:arithmetic, num_rows: 60, max_length: 512, eval_size: 10, overflow: drop}
batching: {strategy: balanced, examples_per_step: 8, max_tokens: 1024}
training: {output_dir: unused, learning_rate: 3e-3, num_train_epochs: 1, lr_scheduler_type: constant, use_cpu: true,
  eval_strategy: steps, eval_steps: 2}
"""


def write_experiment(directory: Path, **changes: Any) -> Path:
    """`tiny.yaml` and its base recipe in `directory`; keyword arguments are keys of the comparison."""
    (directory / "base.yaml").write_text(BASE)
    settings = {
        "base": "base.yaml",
        "reference": "pad_longest",
        "variants": ["pad_longest", "balanced"],
        "seeds": [0],
        "repeats": 1,
        "warmup_steps": 1,
        "measure_steps": 2,
    } | changes
    path = directory / "tiny.yaml"
    path.write_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in settings.items()) + "\n")
    return path
