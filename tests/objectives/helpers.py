"""Batches and gradients of examples of several answers, and what a model is asked by them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from packtrain.data.examples import build_examples
from packtrain.data.sources import open_rows
from packtrain.objectives.groups import GroupCollator, GroupExamples
from packtrain.packing.collator import MicroBatches
from packtrain.packing.scopes import MicroBatch
from packtrain.training.run import build
from tests.objectives.preference.helpers import leaking, pair_recipe


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers_of(path: Path, tokenizer, *rows: dict, **options):
    """Examples of the rows, which are written to a file."""
    return build_examples(
        open_rows(write(path, list(rows))), tokenizer, completion_only_loss=True, kind="answers", **options
    )


def batch_of(examples, *, layout="flat", shared=False, **options) -> dict:
    groups = GroupExamples(examples, layout=layout, shared=shared)
    ids = np.arange(len(groups))
    batch = MicroBatches(groups, GroupCollator(layout=layout, pad_token_id=0, shared=shared, **options))[
        MicroBatch(example_ids=ids, starts=np.zeros_like(ids), stops=groups.lengths)
    ]
    if layout == "flat":
        assert batch["input_ids"].numel() == groups.lengths.sum()
    longest = (batch["cu_seq_lens_k"].diff() if layout == "flat" else batch["attention_mask"].sum(dim=1)).max()
    assert groups.longest == longest
    return batch


def asked(batch) -> list[tuple[list[int], int, float]]:
    """What the model is asked at every supervised position: tokens that it sees, the token to predict, its weight."""
    ids, found = batch["input_ids"], []
    for target, predictor in zip(batch["supervised_index"].tolist(), batch["predictors"].tolist(), strict=True):
        row, column = divmod(predictor, ids.shape[1])
        if "cu_seq_lens_q" not in batch:
            seen = ids[row, : column + 1]
        else:
            document = int(torch.searchsorted(batch["cu_seq_lens_q"], target, right=True)) - 1
            start, stop = batch["cu_seq_lens_k"][document : document + 2].tolist()
            keys = batch["key_index"][start:stop] if "key_index" in batch else torch.arange(start, stop)
            seen = ids[0, keys[keys <= predictor]]
        assert int(batch["position_ids"][row, column]) == len(seen) - 1
        label, weight = (batch[name].flatten()[target] for name in ("labels", "loss_weights"))
        found.append((seen.tolist(), int(label), float(weight)))
    return found


def made(rows, output_dir, *, name="several_answers", shared=False, weighting="token", **changes):
    objective = {"name": name, "loss_weighting": weighting} | ({"shared_prefix": True} if shared else {})
    recipe = pair_recipe(rows, output_dir, **changes).to_dict(given=True)
    return build(type(pair_recipe(rows, output_dir)).model_validate(recipe | {"objective": objective}))


def gradients(trainer, batch) -> tuple[float, dict[str, torch.Tensor]]:
    trainer.model.zero_grad()
    losses = trainer.loss.losses(trainer.model, batch, head=trainer._head)
    loss = losses.weighted_sum() / trainer.loss.denominator(batch).float()
    loss.backward()
    return float(loss.detach()), {name: weight.grad.clone() for name, weight in trainer.model.named_parameters()}


def whole_batch(trainer, collator=None) -> dict:
    examples, ids = trainer.train_dataset, np.arange(len(trainer.train_dataset))
    stops = np.asarray(examples.lengths, dtype=np.int64)
    part = MicroBatch(example_ids=ids, starts=np.zeros_like(ids), stops=stops)
    return MicroBatches(examples, collator or trainer.collator)[part]


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return max(float((found[name] - one).norm() / one.norm()) for name, one in expected.items())


class Leaking(GroupCollator):
    """Shared prefixes that go on to the end of the document before, so that answers see others; nothing else is changed."""

    def collate(self, *args, **kwargs):
        batch = super().collate(*args, **kwargs)
        return batch | leaking(batch)
