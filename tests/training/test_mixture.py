"""A mixture, trained: what is read of each source, over two epochs and after a resume."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from packtrain.errors import CheckpointError
from packtrain.recipe.reader import load_recipe
from packtrain.training.run import train
from packtrain.training.trainer import PackTrainer

RECIPE = """
model:
  config: {model_type: llama, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 2}
  tokenizer_vocab_size: 300
data:
  mixture:
    - {path: a.jsonl, weight: 3}
    - {path: b.jsonl, weight: 1}
  max_length: 64
batching: {examples_per_step: 8, max_tokens: 512}
training: {output_dir: run, use_cpu: true, num_train_epochs: 2, report_to: none, save_strategy: steps, save_steps: 1}
"""
STEPS = 5  # of an epoch: 40 examples, 8 at a time


class Recording(PackTrainer):
    """Keeps the examples of every update, and the source rows of all examples."""

    read: list[list[int]] = []
    rows: np.ndarray

    def get_batch_samples(self, *args):
        batches, total = super().get_batch_samples(*args)
        Recording.rows = self.train_dataset.rows
        if batches:
            Recording.read.append([i for batch in batches for i in batch["example_ids"].tolist()])
        return batches, total


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"alpha {i} one two"}) + "\n" for i in range(10)))
    (tmp_path / "b.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{i}?", "completion": "b"}) + "\n" for i in range(30))
    )
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def run(*overrides: str, **options) -> tuple[list[list[int]], dict]:
    Recording.read = []
    summary = train(load_recipe("recipe.yaml", overrides), trainer_class=Recording, **options)
    return Recording.read, summary.data


def sources(updates: list[list[int]]) -> list[int]:
    """Examples of a, which has the first 10 rows, and of b."""
    rows = Recording.rows[np.concatenate(updates)]
    return [int((rows < 10).sum()), int((rows >= 10).sum())]


def test_every_epoch_has_the_counts_also_after_a_resume(folder):
    updates, data = run()
    assert len(updates) == 2 * STEPS
    for epoch in (updates[:STEPS], updates[STEPS:]):
        assert sources(epoch) == [30, 10] and sorted(sum(epoch, [])) == list(range(40))
        assert np.bincount(Recording.rows[np.concatenate(epoch)])[:10].tolist() == [3] * 10
    assert len({tuple(sources([update])) for update in updates}) > 1, "control: counts differ where they may"
    shares = json.loads((folder / "run/summary.json").read_text())["data"]["mixture"]
    assert [(share["path"], share["examples"], share["available"]) for share in shares] == [
        ("a.jsonl", 30, 10),
        ("b.jsonl", 10, 30),
    ]
    assert shares[0]["tokens"] + shares[1]["tokens"] == data["tokens"]

    whole = load_file(folder / "run/model/model.safetensors")
    for checkpoint in (3, 7):
        resumed, _ = run(resume=f"run/checkpoint-{checkpoint}")
        assert resumed == updates[checkpoint:]
        again = load_file(folder / "run/model/model.safetensors")
        assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_another_mixture_is_not_resumed(folder):
    run("training.max_steps=2")
    for change in (
        "data.mixture=[{path: a.jsonl, weight: 2}, {path: b.jsonl, weight: 1}]",
        "data.mixture=[{path: a.jsonl, weight: 3}]",
        "training.seed=7",
    ):
        with pytest.raises(CheckpointError, match="examples|mixture"):
            run("training.max_steps=3", change, resume="run/checkpoint-2", allow_changes=True)
    updates, _ = run("training.max_steps=3", resume="run/checkpoint-2", allow_changes=True)  # control
    assert len(updates) == 1
