"""Masked language modelling: whose tokens are masked, and losses that are transformers' own in every layout."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from packtrain.data.formats import IGNORED
from packtrain.objectives.masking import MaskingCollator
from packtrain.packing.collator import MicroBatches
from packtrain.packing.scopes import MicroBatch
from packtrain.recipe.recipe import Recipe
from packtrain.training.run import build
from tests.objectives.preference.helpers import curves, pair_rows
from tests.training.helpers import LeakingCollator

MASK, VOCABULARY, SPECIAL = 99, 100, (0, 1, 2, 99)
BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
FIGURES = ("loss", "grad_norm")


def collator(layout: str = "flat", **changes) -> MaskingCollator:
    options = {"mask_token_id": MASK, "vocabulary": VOCABULARY, "special_ids": SPECIAL, "share": 0.15, "seed": 0}
    return MaskingCollator(**options | changes, layout=layout)


def documents(lengths: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    ids = np.concatenate([[1, *draw.integers(3, 98, length - 2), 2] for length in lengths])
    return ids, ids.copy(), np.array(lengths), np.arange(len(lengths))


def test_shares_are_those_of_bert():
    ids, labels, lengths, numbers = documents([400] * 100)
    batch = collator().collate(ids, labels, lengths, numbers)
    chosen = batch["labels"][0] != IGNORED
    assert (batch["labels"][0][chosen] == torch.from_numpy(ids)[chosen]).all()
    before, after = torch.from_numpy(ids)[chosen], batch["input_ids"][0][chosen]
    assert abs(chosen.double().mean() - 0.15) < 0.01
    assert abs((after == MASK).double().mean() - 0.8) < 0.02
    assert abs((after == before).double().mean() - 0.1) < 0.02
    assert (batch["input_ids"][0][~chosen] == torch.from_numpy(ids)[~chosen]).all()
    assert not np.isin(before.numpy(), SPECIAL).any()


def test_masks_are_drawn_by_seed_epoch_and_example():
    ids, labels, lengths, numbers = documents([30, 5, 17, 3])
    flat = collator().collate(ids, labels, lengths, numbers)
    padded = collator("padded").collate(ids, labels, lengths, numbers)
    real = padded["attention_mask"].bool()
    for key in ("input_ids", "labels", "loss_weights"):
        assert torch.equal(padded[key][real], flat[key][0])
    assert (flat["cu_seq_lens_q"].diff() == torch.tensor([30, 5, 17, 3])).all()
    supervised = torch.bucketize(flat["supervised_index"], flat["cu_seq_lens_q"], right=True) - 1
    assert set(supervised.tolist()) == {0, 1, 2, 3}, "a short document has a token to restore, too"
    alone = collator().collate(ids[30:35], labels[30:35], lengths[1:2], numbers[1:2])
    assert torch.equal(alone["input_ids"], flat["input_ids"][:, 30:35])
    for other in (collator(seed=1), collator().at_epoch(1)):
        assert not torch.equal(other.collate(ids, labels, lengths, numbers)["labels"], flat["labels"])
    assert not len(collator().empty()["supervised_index"])


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": row["prompt"] + row["chosen"]}) + "\n" for row in pair_rows(24)))
    return path


def made(rows, output_dir, strategy: str, **config):
    return build(
        Recipe.model_validate({
            "model": {"config": BERT | config, "tokenizer_vocab_size": 300},
            "data": {"path": str(rows)},
            "batching": {"strategy": strategy, "examples_per_step": 6, "max_tokens": 90},
            "objective": {"name": "masked_lm"},
            "training": {
                "output_dir": str(output_dir), "seed": 42, "max_steps": 8, "logging_steps": 1, "learning_rate": 3e-4,
                "save_strategy": "no", "report_to": "none", "use_cpu": True,
            },
        })
    )  # fmt: skip


def test_losses_are_those_of_transformers(rows, tmp_path):
    trainer = made(rows, tmp_path, "pad_longest")
    trainer.model.eval()
    batch = next(iter(trainer.get_train_dataloader()))
    losses = trainer.loss.losses(trainer.model, batch, head=trainer._head)
    own = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])
    torch.testing.assert_close(losses.nll.mean(), own.loss, rtol=1e-6, atol=1e-6)
    assert trainer.loss.denominator(batch) == len(losses.nll) > 0


def test_layouts_train_the_same(rows, tmp_path):
    expected = curves(made(rows, tmp_path, "pad_longest"), FIGURES)
    flat = made(rows, tmp_path, "balanced")
    assert flat.plan.layout == "flat" and flat.plan.gradient_accumulation_steps > 1
    np.testing.assert_allclose(curves(flat, FIGURES), expected, rtol=1e-5)
    leaking = made(rows, tmp_path, "balanced")
    plain = leaking.collator

    class Leaking(LeakingCollator, MaskingCollator):
        """The masks of the run, in rows whose documents see each other."""

        def at_epoch(self, epoch):
            return self

    leaking.collator = Leaking(
        mask_token_id=plain.mask_token_id, vocabulary=plain.vocabulary, special_ids=plain.special_ids, share=plain.share,
        seed=plain.seed, **plain._layout,
    )  # fmt: skip
    assert np.abs(curves(leaking, FIGURES)[:, 0] / expected[:, 0] - 1).max() > 1e-4


def test_a_tokenizer_with_a_separator_ends_texts_by_it(tmp_path):
    """BERT's has no eos."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from packtrain.data.encoder import Encoder

    words = {word: n for n, word in enumerate("[PAD] [UNK] [CLS] [SEP] [MASK] one two".split())}
    backend = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", sep_token="[SEP]", cls_token="[CLS]", mask_token="[MASK]"
    )
    (row,) = Encoder(tokenizer, "text")([{"text": "one two"}]).to_pylist()
    assert tokenizer.decode(row["input_ids"]) == "one two [SEP]"


def test_a_document_of_a_plan_has_the_masks_of_its_epoch(rows, tmp_path):
    trainer = made(rows, tmp_path, "balanced")
    examples, ids = trainer.train_dataset, np.array([3])
    chosen = MicroBatch(example_ids=ids, starts=np.zeros(1, np.int64), stops=examples.lengths[ids].astype(np.int64))
    batches = MicroBatches(examples, trainer.collator)
    first, second = (batches.at_epoch(epoch)[chosen]["labels"] for epoch in (0, 1))
    assert not torch.equal(first, second) and torch.equal(first, batches[chosen]["labels"])
