"""Block diffusion: the properties that define it."""

from __future__ import annotations

import gc

import datasets
import numpy as np
import pytest
import torch

from packtrain.data.examples import Examples
from packtrain.errors import PlanError
from packtrain.modeling.attention.varlen import NAME
from packtrain.modeling.attention.varlen import register as register_varlen
from packtrain.objectives.block_diffusion import blocks
from packtrain.objectives.block_diffusion.blocks import (
    BLOCK_DIFFUSION,
    BlockCollator,
    ViewedExamples,
    draw_block_masks,
    register,
    view_mask,
)
from packtrain.objectives.masked_diffusion.loss import make_bidirectional
from packtrain.packing.collator import MicroBatches
from packtrain.packing.plan import MicroBatch
from tests.tiny import CONFIGS, random_documents, tiny_model

MASK, D = 63, 4


def rows(lengths=(10, 4, 15), prompt=3):
    made = random_documents(list(lengths), prompt=prompt, seed=2)
    for number, row in enumerate(made):
        row["input_ids"] = [3 + (token - 3) % 57 for token in row["input_ids"]]
        row["labels"] = [-100] * prompt + row["input_ids"][prompt:]
        row["example_id"] = number
    return made


def collator(**options) -> BlockCollator:
    return BlockCollator(MASK, **{"block_size": D, "seed": 1} | options)


def model_for(block_size: int = D, family: str = "llama"):
    return tiny_model(family, attn_implementation=register(block_size))


def copies_of(batch, document: int):
    """(view 1, view 2, clean) slices of a document."""
    start, stop = batch["cu_seq_lens_q"][document : document + 2].tolist()
    length = (stop - start) // 3
    return [slice(start + i * length, start + (i + 1) * length) for i in range(3)]


def logits_of(model, batch):
    keys = ("input_ids", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k")
    return model(**{key: batch[key] for key in keys}, use_cache=False).logits[0]


def test_a_batch_literally():
    """Five tokens, the first two of them prompt, in blocks of four."""
    masks = draw_block_masks(8, 4, 2, seed=1, epoch=0)
    one = collator()([{"input_ids": [11, 12, 13, 14, 15], "labels": [-100, -100, 13, 14, 15], "example_id": 2}])
    m = masks[2:5].tolist()
    assert 0 < sum(m) < 3, "choose a seed that shows something"
    view_1 = [11, 12, *(MASK if x else t for x, t in zip(m, (13, 14, 15), strict=True)), MASK, MASK, MASK]
    view_2 = [11, 12, *(t if x else MASK for x, t in zip(m, (13, 14, 15), strict=True)), MASK, MASK, MASK]
    clean = [11, 12, 13, 14, 15, MASK, MASK, MASK]
    assert one["input_ids"].tolist() == [view_1 + view_2 + clean]
    labels_1 = [-100, -100, *(t if x else -100 for x, t in zip(m, (13, 14, 15), strict=True)), -100, -100, -100]
    labels_2 = [-100, -100, *(-100 if x else t for x, t in zip(m, (13, 14, 15), strict=True)), -100, -100, -100]
    assert one["labels"].tolist() == [labels_1 + labels_2 + [-100] * 8]
    assert one["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 7] * 3]
    assert one["cu_seq_lens_q"].tolist() == [0, 24]


def test_stored_examples_and_rows_make_the_same_batch():
    documents = rows()
    columns = [{key: row[key] for key in ("input_ids", "labels")} for row in documents]
    stored = Examples.from_dataset(datasets.Dataset.from_list(columns))
    viewed = ViewedExamples(stored, MASK, block_size=D)
    ids = np.arange(3)
    part = MicroBatch(example_ids=ids, starts=np.zeros_like(ids), stops=viewed.lengths)
    gathered, called = MicroBatches(viewed, collator())[part], collator()(documents)
    assert gathered["input_ids"].shape[1] == viewed.lengths.sum() == 3 * (12 + 4 + 16)
    assert gathered["document_bounds"] == called.pop("document_bounds")
    for key, value in called.items():
        assert torch.equal(torch.as_tensor(gathered[key]), torch.as_tensor(value)), key
    other = MicroBatches(viewed, collator(seed=2))[part]
    assert not torch.equal(other["input_ids"], called["input_ids"]), "control: another seed"


def test_the_mask_literally():
    """Two blocks of two tokens; rows attend columns."""
    expected = """
        11..........
        11..........
        ..11....11..
        ..11....11..
        ....11......
        ....11......
        ......1111..
        ......1111..
        ........11..
        ........11..
        ........1111
        ........1111
    """.split()
    drawn = ["".join(".1"[int(x)] for x in row) for row in view_mask(4, 2)]
    assert drawn == expected


def test_masks_are_built_once_for_all_layers_and_kept_for_one_batch_only(monkeypatch):
    def alive() -> list[int]:
        tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.dtype == torch.bool and o.dim() == 2]
        return sorted({t.shape[0] // 3 for t in tensors if t.shape[0] == t.shape[1] > 3 * 500})

    model, built = model_for(16), []
    original = blocks.view_mask
    with torch.no_grad():
        for lengths in ((512,), (544, 560, 544), (528,)):
            logits_of(model, collator(block_size=16)(rows(lengths)))
        assert alive() == [528]
        monkeypatch.setattr(blocks, "view_mask", lambda *args: built.append(args[0]) or original(*args))
        logits_of(model, collator(block_size=16)(rows((16, 48, 32, 48))))
    assert sorted(built) == [16, 32, 48], "two layers, and two documents of one length"


@pytest.mark.parametrize("epoch", range(3))
def test_every_answer_token_is_supervised_exactly_once(epoch):
    documents = rows()
    batch = collator(epoch=epoch)(documents)
    for number, row in enumerate(documents):
        first, second, clean = copies_of(batch, number)
        labels = batch["labels"][0]
        counted = (labels[first] != -100).int() + (labels[second] != -100).int()
        expected = [int(label != -100) for label in row["labels"]]
        assert counted.tolist() == expected + [0] * (len(counted) - len(expected))
        assert (labels[clean] == -100).all()
        for view in (first, second):
            masked = batch["input_ids"][0][view] == MASK
            answer = torch.tensor(expected + [0] * (len(counted) - len(expected)), dtype=torch.bool)
            assert torch.equal(masked & answer, labels[view] != -100)
    assert batch["loss_weights"].sum() == sum(label != -100 for row in documents for label in row["labels"])


def test_masks_depend_on_seed_epoch_and_example_and_have_a_level_per_block():
    masks = draw_block_masks(400, 4, 7, seed=1, epoch=2)
    assert masks.tolist() == draw_block_masks(400, 4, 7, seed=1, epoch=2).tolist()
    for other in (dict(seed=0, epoch=2), dict(seed=1, epoch=0)):
        assert masks.tolist() != draw_block_masks(400, 4, 7, **other).tolist()
    assert masks.tolist() != draw_block_masks(400, 4, 8, seed=1, epoch=2).tolist()
    shares = np.concatenate([draw_block_masks(3200, 32, i, seed=0, epoch=0).reshape(-1, 32).mean(1) for i in range(20)])
    assert abs(shares.mean() - 0.5) < 0.03 and abs(shares.std() - 12**-0.5) < 0.03, "levels are uniform over blocks"


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_nothing_flows_from_later_blocks_from_the_other_view_or_from_other_documents(family):
    changes = {"sliding_window": 64} if family == "gemma2" else {}  # a window shorter than a document is refused
    model = tiny_model(family, attn_implementation=register(D), **changes)
    batch = collator()(rows())
    before = logits_of(model, batch)
    views = copies_of(batch, 2)
    changed_in = {}
    for copy, part in enumerate(views):
        other = dict(batch, input_ids=batch["input_ids"].clone())
        other["input_ids"][0, part.start + D : part.start + 2 * D] = 33  # block 1 of this copy, none of it 33
        moved = (logits_of(model, other) - before).abs().amax(dim=-1) > 1e-6
        changed_in[copy] = [moved[p].view(-1, D).any(dim=1).int().tolist() for p in views]
        assert not moved[: views[0].start].any(), "other documents"
    nothing, own = [0, 0, 0, 0], [0, 1, 0, 0]
    assert changed_in[0] == [own, nothing, nothing]
    assert changed_in[1] == [nothing, own, nothing]
    assert changed_in[2] == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]], "true text reaches later blocks only"


def test_one_clean_copy_is_the_published_layout():
    """[view; clean] twice, with the mask of the published code, by transformers' own sdpa attention."""
    model, row = model_for(), rows()[2]
    batch = collator()([row])
    logits = logits_of(model, batch)
    first, second, clean = copies_of(batch, 0)
    length = clean.stop - clean.start
    plain = tiny_model("llama", attn_implementation="sdpa")
    i = torch.arange(2 * length)
    is_clean, block = i >= length, i % length // D
    diagonal = (block[:, None] == block) & (is_clean[:, None] == is_clean)
    offset = (block[:, None] > block) & is_clean & ~is_clean[:, None]
    causal = (block[:, None] >= block) & is_clean & is_clean[:, None]
    mask = (diagonal | offset | causal)[None, None]
    for view in (first, second):
        ids = torch.cat([batch["input_ids"][:, view], batch["input_ids"][:, clean]], dim=1)
        positions = torch.arange(length).repeat(2)[None]
        expected = plain(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[0]
        torch.testing.assert_close(logits[view], expected[:length], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits[clean], expected[length:], atol=1e-5, rtol=1e-5)


def test_one_block_is_masked_diffusion():
    """With a block as long as the document, a view is what a bidirectional model sees of the noisy document alone."""
    row = rows()[2]
    batch = collator(block_size=16)([row])
    register_varlen()
    bidirectional = make_bidirectional(tiny_model("llama", attn_implementation=NAME))
    logits = logits_of(model_for(16), batch)
    for view in copies_of(batch, 0)[:2]:
        alone = bidirectional(batch["input_ids"][:, view], use_cache=False).logits[0]
        torch.testing.assert_close(logits[view], alone, atol=1e-5, rtol=1e-5)
    smaller = logits_of(model_for(8), collator(block_size=16)([row]))
    assert (smaller - logits).abs().max() > 1e-3, "control: smaller blocks are another model"


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_packed_equals_separate(family):
    model, documents = model_for(family=family), rows()

    def step(batches):
        model.zero_grad()
        total = sum(BLOCK_DIFFUSION.denominator(batch) for batch in batches)
        loss = sum(BLOCK_DIFFUSION.losses(model, batch).weighted_sum() for batch in batches) / total
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    packed, separate = step([collator()(documents)]), step([collator()([row]) for row in documents])
    assert packed[0] == pytest.approx(separate[0], rel=1e-6)
    assert (packed[1] - separate[1]).norm() < 1e-5 * separate[1].norm()
    filled = step([collator()(documents), collator().empty()])
    assert filled[0] == pytest.approx(packed[0], rel=1e-7)


def test_the_loss_predicts_the_next_token_from_the_noisy_view():
    model, row = model_for(), rows()[0]
    batch = collator()([row])
    logits, labels = logits_of(model, batch), batch["labels"][0]
    targets = (labels != -100).nonzero().flatten()
    expected = torch.nn.functional.cross_entropy(logits[targets - 1], labels[targets])
    loss = BLOCK_DIFFUSION.losses(model, batch).weighted_sum() / BLOCK_DIFFUSION.denominator(batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_padded_layouts_are_refused():
    with pytest.raises(PlanError):
        collator(layout="padded")
