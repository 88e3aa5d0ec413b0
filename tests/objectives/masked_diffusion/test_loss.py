"""Masked diffusion: noise from (seed, epoch, example), LLaDA's loss, and packed = separate."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from packtrain.data.examples import Examples
from packtrain.errors import ModelError
from packtrain.modeling.attention.varlen import NAME, register
from packtrain.objectives.causal import CAUSAL_LM
from packtrain.objectives.masked_diffusion.loss import make_bidirectional, masked_diffusion, sums_by_part
from packtrain.objectives.masked_diffusion.noise import Masking, NoisingCollator, draw_masks
from packtrain.objectives.masked_diffusion.tails import CONTENT, EOS, PROMPT, TAIL, Canvas, Tail, TailedExamples
from packtrain.packing.collator import MicroBatches, PackCollator
from packtrain.packing.plan import MicroBatch
from tests.tiny import CONFIGS, random_documents, tiny_model

E, MASK, PADS = 2, 63, (60, 61, 62)
TAIL_OF_THREE = Tail(kind="rainbow", eos_token_id=E, pad_token_ids=PADS)
VOID = Tail(kind="void", eos_token_id=E, pad_token_ids=PADS[:1])
SINGLE = Tail(kind="single", eos_token_id=E, pad_token_ids=PADS[:1])


def tailed_examples(lengths=(9, 4, 14, 6, 7), canvas=16, tail=TAIL_OF_THREE) -> TailedExamples:
    rows = random_documents(list(lengths), prompt=3, seed=1)
    for row in rows:  # keep eos, pads and mask out of the text
        row["input_ids"] = [3 + (token - 3) % 57 for token in row["input_ids"]]
        row["labels"] = [-100] * 3 + row["input_ids"][3:]
    examples = Examples.from_dataset(datasets.Dataset.from_list(rows))
    return TailedExamples(examples, tail, Canvas(policy="sampled", size=canvas))


def collator(
    masking: Masking | None = None, *, layout="flat", seed=5, epoch=0, tail=TAIL_OF_THREE, **options
) -> NoisingCollator:
    masking = masking or Masking(mask_token_id=MASK)
    return NoisingCollator(masking, tail, seed=seed, epoch=epoch, layout=layout, **options)


def micro_batch(examples: TailedExamples, ids) -> MicroBatch:
    ids = np.array(ids, dtype=np.int64)
    return MicroBatch(example_ids=ids, starts=np.zeros_like(ids), stops=examples.lengths[ids])


def batch_of(examples, ids, *args, **options):
    return MicroBatches(examples, collator(*args, tail=examples.tail, **options))[micro_batch(examples, ids)]


def bidirectional(family: str = "llama"):
    register()
    return make_bidirectional(tiny_model(family, attn_implementation=NAME))


def loss_and_gradient(model, batches, objective):
    """Loss of one step over `batches`, and all gradients as one vector."""
    model.zero_grad()
    total = sum(objective.denominator(batch) for batch in batches)
    loss = sum(objective.losses(model, batch).weighted_sum() for batch in batches) / total
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


# ----------------------------------------------------------------------------------------------------- noise


def test_a_noised_batch_literally():
    """One document of two prompt tokens, an answer of three, eos and two pads."""
    ids = np.array([7, 8, 10, 11, 12, E, 60, 61])
    labels = np.array([-100, -100, 10, 11, 12, E, 60, 61])
    example, length = np.array([4]), np.array([8])
    levels, coins = draw_masks(length, example, seed=5, epoch=2)
    batch = collator(epoch=2).collate(ids, labels, length, example)
    masked = coins & np.array([0, 0, 1, 1, 1, 1, 1, 1], dtype=bool)
    assert 0 < masked.sum() < 6, "choose a seed that shows something"
    assert batch["input_ids"].tolist() == [np.where(masked, MASK, ids).tolist()]
    assert batch["labels"].tolist() == [labels.tolist()]
    assert batch["parts"].tolist() == [[PROMPT, PROMPT, CONTENT, CONTENT, CONTENT, EOS, TAIL, TAIL]]
    expected = np.where(masked, 1 / (levels[0] * 6), 0)
    np.testing.assert_allclose(batch["loss_weights"][0], expected, rtol=1e-6)


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_rows_of_a_stock_trainer_have_no_first_label(layout):
    """Without labels a row is canvas from its second token on."""
    rows = [{"input_ids": [7, 8, 10, E], "example_id": i} for i in range(20)]
    batch = collator(layout=layout)(rows)
    firsts = batch["position_ids"] == 0
    if layout == "padded":
        firsts &= batch["attention_mask"].bool()
    assert (batch["input_ids"][firsts] == 7).all() and (batch["loss_weights"][firsts] == 0).all()
    assert (batch["labels"][firsts] == -100).all() and (batch["parts"][firsts] == PROMPT).all()
    assert (batch["loss_weights"] > 0).any() and ((batch["loss_weights"] > 0) <= (batch["labels"] != -100)).all()
    levels, coins = draw_masks(np.full(20, 4), np.arange(20), seed=5, epoch=0)
    masked = coins.reshape(20, 4) & [False, True, True, True]
    per_document = masked.sum(axis=1) / (3 * levels)  # three tokens of canvas
    assert batch["loss_weights"].sum().item() == pytest.approx(per_document.sum(), rel=1e-5)
    assert coins.reshape(20, 4)[:, 0].any(), "control: a first token would have been masked"


def test_draws_depend_on_seed_epoch_and_example_alone():
    lengths, ids = np.array([40, 30]), np.array([11, 12])
    levels, coins = draw_masks(lengths, ids, seed=1, epoch=2)
    alone, its_coins = draw_masks(lengths[1:], ids[1:], seed=1, epoch=2)
    assert alone[0] == levels[1] and its_coins.tolist() == coins[40:].tolist()
    longer = draw_masks(np.array([50]), ids[:1], seed=1, epoch=2)[1]
    assert longer[:40].tolist() == coins[:40].tolist(), "a longer tail changes nothing before it"
    for seed, epoch, example in ((0, 2, 11), (1, 0, 11), (1, 2, 10), (2, 1, 11)):
        other = draw_masks(lengths[:1], np.array([example]), seed=seed, epoch=epoch)
        assert other[0][0] != levels[0] and other[1].tolist() != coins[:40].tolist()


def test_levels_are_uniform_and_tokens_are_masked_at_their_level():
    count = 4000
    levels, coins = draw_masks(np.full(count, 50), np.arange(count), seed=0, epoch=0, eps=0.1)
    assert levels.min() >= 0.1 and levels.max() <= 1
    histogram, _ = np.histogram(levels, bins=9, range=(0.1, 1.0))
    assert np.all(np.abs(histogram - count / 9) < 5 * np.sqrt(count / 9))
    standardised = (coins.reshape(count, 50).mean(axis=1) - levels) / np.sqrt(levels * (1 - levels) / 50 + 1e-9)
    assert abs(standardised.mean()) < 0.1 and abs(standardised.std() - 1) < 0.05


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_a_document_is_noised_the_same_in_every_batch(layout):
    examples = tailed_examples()
    alone = batch_of(examples, [2])
    together = batch_of(examples, [0, 3, 2, 1], layout=layout)
    length = int(examples.lengths[2])
    where = np.s_[0, int(examples.lengths[[0, 3]].sum()) :][:2] if layout == "flat" else np.s_[2, :]
    for key in ("input_ids", "labels", "loss_weights", "parts"):
        assert together[key][where][:length].tolist() == alone[key][0].tolist(), key


def test_the_prompt_is_never_masked_and_the_tail_is():
    examples = tailed_examples()
    seen = torch.zeros(4, dtype=torch.long)
    for epoch in range(30):
        batch = batch_of(examples, range(5), epoch=epoch)
        masked = batch["input_ids"] == MASK
        assert torch.equal(masked, batch["loss_weights"] > 0)
        seen += torch.bincount(batch["parts"][masked].long(), minlength=4)
    assert seen[PROMPT] == 0 and (seen[[CONTENT, EOS, TAIL]] > 30).all()


def test_the_end_before_void_is_masked_in_every_example_and_nowhere_else():
    ends = {tail.kind: [0, 0] for tail in (VOID, SINGLE)}
    for tail in (VOID, SINGLE):
        examples = tailed_examples(tail=tail)
        for epoch in range(20):
            batch = batch_of(examples, range(5), epoch=epoch)
            end = batch["parts"] == EOS
            ends[tail.kind][0] += int(end.sum())
            ends[tail.kind][1] += int((batch["input_ids"][end] == MASK).sum())
    assert ends["void"] == [100, 100] and 30 < ends["single"][1] < 70, "control: by a coin"
    pair = [batch_of(tailed_examples(tail=tail), range(5)) for tail in (VOID, SINGLE)]
    rest = pair[0]["parts"] != EOS
    for key in ("input_ids", "loss_weights"):
        assert torch.equal(pair[0][key][rest], pair[1][key][rest]), "answer and tail have the same noise and weights"


@pytest.mark.parametrize(("weight", "norm"), [("1/p", "sequence"), ("1/p", "token"), ("none", "sequence")])
def test_an_end_that_is_always_masked_weighs_one(weight, norm):
    examples = tailed_examples(tail=VOID)
    batch = batch_of(examples, range(5), Masking(mask_token_id=MASK, weight=weight, norm=norm))
    canvas = [(examples[i]["labels"] != -100).sum() if norm == "sequence" else 1 for i in range(5)]
    assert batch["loss_weights"][batch["parts"] == EOS].tolist() == pytest.approx([1 / size for size in canvas])


# ------------------------------------------------------------------------------------------------------ loss


def literal_loss(model, examples, ids, *, seed, epoch, weight="1/p", norm="sequence", shift=False):
    """LLaDA's published loss, document by document, from the definition."""
    total, canvases = 0.0, 0
    for i in ids:
        row = examples[i]
        clean, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        levels, coins = draw_masks(np.array([len(clean)]), np.array([i]), seed=seed, epoch=epoch)
        masked, share = torch.tensor(coins) & (labels != -100), torch.full(clean.shape, levels[0])
        if examples.tail.kind == "void":
            end = len(clean) - int((clean == PADS[0]).sum()) - 1
            masked[end], share[end] = True, 1.0
        noisy = torch.where(masked, MASK, clean)
        logits = model(noisy[None], use_cache=False).logits[0]
        if shift:
            logits = torch.cat([logits[:1], logits[:-1]])
        nll = F.cross_entropy(logits[masked], clean[masked], reduction="none")
        token_loss = nll / share[masked] if weight == "1/p" else nll
        canvas = int((labels != -100).sum())
        canvases += canvas
        total = total + token_loss.sum() / (canvas if norm == "sequence" else 1)
    return total / (len(ids) if norm == "sequence" else canvases)


@pytest.mark.parametrize("tail", [TAIL_OF_THREE, VOID], ids=lambda tail: tail.kind)
@pytest.mark.parametrize(
    "options",
    [{}, {"weight": "none"}, {"norm": "token"}, {"shift": True}, {"weight": "none", "norm": "token", "shift": True}],
    ids=str,
)
def test_the_loss_is_the_published_one(options, tail):
    """LLaDA's, and VoidPadding's (arXiv:2606.17999): the end masked with certainty, so its p is 1."""
    model, examples, ids = bidirectional(), tailed_examples(tail=tail), [0, 1, 2, 3, 4]
    masking = Masking(mask_token_id=MASK, **options)
    batches = [batch_of(examples, part, masking, epoch=3) for part in ([0, 1], [2, 3, 4])]
    loss, _ = loss_and_gradient(model, batches, masked_diffusion(masking))
    expected = literal_loss(model, examples, ids, seed=5, epoch=3, **options)
    torch.testing.assert_close(loss, expected.detach().double(), rtol=1e-6, atol=1e-6, check_dtype=False)


def test_options_change_the_loss():
    """Control: each option is a different loss, so agreeing with the literal one says something."""
    model, examples = bidirectional(), tailed_examples()
    results = set()
    for options in ({}, {"weight": "none"}, {"norm": "token"}, {"shift": True}):
        masking = Masking(mask_token_id=MASK, **options)
        loss, _ = loss_and_gradient(model, [batch_of(examples, range(5), masking)], masked_diffusion(masking))
        results.add(round(loss.item(), 4))
    assert len(results) == 4


@pytest.mark.parametrize(
    ("family", "tail"), [*((family, TAIL_OF_THREE) for family in sorted(CONFIGS)), ("llama", VOID)]
)
def test_packed_equals_separate(family, tail):
    """Loss and gradient of a step are those of its documents alone, in every layout."""
    model, examples = bidirectional(family), tailed_examples(tail=tail)
    masking = Masking(mask_token_id=MASK)
    objective = masked_diffusion(masking)
    separate = loss_and_gradient(model, [batch_of(examples, [i]) for i in range(5)], objective)
    assert separate[0] > 1
    for batches in (
        [batch_of(examples, range(5))],
        [batch_of(examples, [3, 0]), batch_of(examples, [1, 2, 4])],
        [batch_of(examples, range(5), layout="padded", pad_token_id=0)],
        [batch_of(examples, range(5), layout="padded", pad_token_id=0, padded_to="max_length", max_length=40)],
    ):
        loss, gradient = loss_and_gradient(model, batches, objective)
        assert abs(loss - separate[0]) < 1e-6 * separate[0]
        assert (gradient - separate[1]).norm() < 1e-5 * separate[1].norm()


@pytest.mark.parametrize("tail", [TAIL_OF_THREE, VOID], ids=lambda tail: tail.kind)
def test_leaking_documents_would_be_noticed(tail):
    """Control: the same tokens as one long document are another loss."""
    model, examples = bidirectional(), tailed_examples(tail=tail)
    objective = masked_diffusion(Masking(mask_token_id=MASK))
    batch = batch_of(examples, range(5))
    packed, _ = loss_and_gradient(model, [batch], objective)
    total = batch["input_ids"].shape[1]
    batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = torch.tensor([0, total], dtype=torch.int32)
    assert abs(loss_and_gradient(model, [batch], objective)[0] - packed) > 1e-4


def test_filler_is_nobodys_tail():
    model, examples = bidirectional(), tailed_examples()
    masking = Masking(mask_token_id=MASK)
    objective = masked_diffusion(masking)
    filler = MicroBatches(examples, collator())[micro_batch(examples, [])]
    assert objective.denominator(filler) == 0 and not filler["parts"].any()
    real = batch_of(examples, [0, 1])
    alone, with_filler = (loss_and_gradient(model, batches, objective)[0] for batches in ([real], [real, filler]))
    assert alone == with_filler
    padded = batch_of(examples, [0, 1], layout="padded", pad_token_id=PADS[0])
    on_filler = padded["attention_mask"] == 0
    assert on_filler.any() and not padded["parts"][on_filler].any() and not padded["loss_weights"][on_filler].any()


def test_a_rainbow_may_fill_padded_causal_batches():
    """There the fill is no tail: nobody attends it and nobody learns it, so the loss stays the same."""
    model, rows = tiny_model("llama"), random_documents([9, 4, 14])
    batch = PackCollator(layout="padded", pad_token_id=0)(rows)
    filler = batch["attention_mask"] == 0
    expected = CAUSAL_LM.losses(model, batch).nll
    length = int(filler.sum())
    batch["input_ids"][filler] = torch.from_numpy(TAIL_OF_THREE.tokens(length + 1)[1:])
    assert set(batch["input_ids"][filler].tolist()) == set(PADS)
    torch.testing.assert_close(CAUSAL_LM.losses(model, batch).nll, expected, atol=0, rtol=0)


def test_parts_split_the_loss():
    model, examples = bidirectional(), tailed_examples()
    batch = batch_of(examples, range(5))
    losses = masked_diffusion(Masking(mask_token_id=MASK)).losses(model, batch)
    sums = sums_by_part(losses, batch)
    assert set(sums) == {"content", "eos", "tail"} and all(pair[1] > 0 for pair in sums.values())
    total = sum(sums.values())
    assert total[0].item() == pytest.approx(losses.weighted_sum().item(), rel=1e-5)
    assert total[1].item() == pytest.approx(batch["loss_weights"].sum().item(), rel=1e-5)


# --------------------------------------------------------------------------------------------- both ways


def first_logits_change_with_the_last_token(model) -> bool:
    ids = torch.tensor([[5, 6, 7, 8]])
    other = torch.tensor([[5, 6, 7, 9]])
    return not torch.allclose(model(ids).logits[0, 0], model(other).logits[0, 0])


@pytest.mark.parametrize(
    ("family", "implementation"),
    [(f, a) for f in sorted(CONFIGS) for a in (NAME, "sdpa", "eager") if (f, a) != ("gemma2", "sdpa")],
)  # transformers refuses sdpa for Gemma 2: it has no softcap
def test_decoders_attend_both_ways(family, implementation):
    register()
    model = tiny_model(family, attn_implementation=implementation)
    assert not first_logits_change_with_the_last_token(model)
    assert first_logits_change_with_the_last_token(make_bidirectional(model))


def test_what_cannot_attend_both_ways_is_refused():
    from transformers import MambaConfig, MambaForCausalLM

    mamba = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(ModelError, match="bidirectional"):
        make_bidirectional(mamba)
