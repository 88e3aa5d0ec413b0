"""The sampler against LLaDA's algorithm, written out again token by token."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from packtrain.cli import options
from packtrain.errors import PacktrainError
from packtrain.modeling.attention.varlen import NAME, register
from packtrain.objectives.masked_diffusion.generation import _groups
from packtrain.objectives.masked_diffusion.loss import generate, make_bidirectional
from packtrain.objectives.masked_diffusion.sampling import (
    EndTokenPolicy,
    Remasking,
    Sampling,
    add_gumbel_noise,
    denoise,
    share_evenly,
    surest,
)
from tests.tiny import VOCABULARY, tiny_model

MASK, END, PAD = 63, 2, 60
PROMPT = [5, 9, 11, 7]


@pytest.fixture(scope="module")
def model():
    register()
    model = make_bidirectional(tiny_model("llama", attn_implementation=NAME))
    with torch.no_grad():
        model.lm_head.weight.mul_(40)  # far from uniform, as trained models are
    return model


def literal_llada(
    model, prompt, canvas_length, *, steps, block_length, remasking, temperature=0.0, cfg_scale=0.0, shift=False,
    policy="none", generator=None,
):  # fmt: skip
    """One row, plain Python: returns the tokens and the step in which each was written."""
    x = prompt + [MASK] * canvas_length
    when = [-1] * canvas_length
    blocks = canvas_length // block_length
    steps_per_block = steps // blocks

    def logits_of(tokens):
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0].double()
        return torch.cat([logits[:1], logits[:-1]]) if shift else logits

    for block in range(blocks):
        start = len(prompt) + block * block_length
        positions = list(range(start, start + block_length))
        to_write = sum(x[i] == MASK for i in positions)
        for step in range(steps_per_block):
            count = to_write // steps_per_block + (1 if step < to_write % steps_per_block else 0)
            logits = logits_of(x)
            if cfg_scale:
                blind = logits_of([MASK] * len(prompt) + x[len(prompt) :])
                logits = blind + (cfg_scale + 1) * (logits - blind)
            logits = logits[start : start + block_length]
            if policy == "suppress_logits":
                logits[:, END] = -math.inf
            noisy = logits.clone()
            if temperature:
                uniform = torch.rand(1, *logits.shape, dtype=torch.float64, generator=generator)[0]
                noisy = logits.exp() / (-uniform.log()) ** temperature
            if policy == "ban_pad":
                noisy[:, PAD] = -math.inf
            if remasking == "random":
                uniform = torch.rand(1, block_length, dtype=torch.float64, generator=generator)[0]
            candidates = []
            for j, i in enumerate(positions):
                if x[i] != MASK:
                    continue
                token = int(noisy[j].argmax())
                p = logits[j].softmax(0)
                if policy == "ban_pad":
                    p[PAD] = 0.0  # the others don't share out what it had
                if remasking == "low_confidence":
                    sure = p[token].item()
                elif remasking == "margin":
                    first, second = sorted(p.tolist(), reverse=True)[:2]
                    sure = first - second
                elif remasking == "entropy":
                    sure = sum(q * math.log(q) for q in p.tolist() if q > 0) / p.sum().item()
                else:
                    sure = uniform[j].item()
                if policy == "suppress_confidence" and token in (END, PAD):
                    sure = -1e9
                candidates.append((-sure, i, token))
            for _, i, token in sorted(candidates)[:count]:
                x[i] = token
                when[i - len(prompt)] = block * steps_per_block + step
    return x[len(prompt) :], when


CASES = [
    dict(remasking=remasking, temperature=temperature, steps=steps, block_length=block_length)
    for remasking in ("low_confidence", "random", "margin", "entropy")
    for temperature, steps, block_length in ((0.0, 12, 12), (0.0, 6, 4), (0.8, 10, 6))
]
CASES += [
    dict(remasking="low_confidence", steps=12, block_length=6, **more)
    for more in (
        dict(cfg_scale=1.5),
        dict(shift=True),
        dict(shift=True, cfg_scale=0.5, temperature=1.0),
        dict(policy="suppress_logits"),
        dict(policy="suppress_confidence"),
        dict(policy="ban_pad"),
        dict(policy="ban_pad", temperature=0.8),
    )
]
CASES += [dict(remasking=how, steps=12, block_length=6, policy="ban_pad") for how in ("margin", "entropy")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity_with_the_literal_algorithm(model, case):
    prompt = PROMPT
    if "policy" in case:  # a prompt after which this random model wants to write ends and pads
        with torch.no_grad():
            bias = torch.zeros(VOCABULARY)
            bias[[END, PAD]] = 9.0
        handle = model.lm_head.register_forward_hook(lambda module, args, output: output + bias)
    expected, when = literal_llada(model, prompt, 12, generator=torch.Generator().manual_seed(7), **case)
    options = {"end_token_policy": case["policy"]} if "policy" in case else {}
    options |= {key: value for key, value in case.items() if key not in ("policy", "shift")}
    sampling = Sampling(end_token_ids=(END,), pad_token_ids=(PAD,), **options)
    samples = generate(
        model,
        [prompt],
        12,
        sampling,
        mask_token_id=MASK,
        shift=case.get("shift", False),
        generator=torch.Generator().manual_seed(7),
    )
    if "policy" in case:
        plain = generate(model, [prompt], 12, Sampling(steps=12, block_length=6), mask_token_id=MASK)
        handle.remove()
        assert plain.tokens.tolist() != [expected], "control: the policy changes something"
    assert samples.tokens.tolist() == [expected]
    assert samples.unmasked_at.tolist() == [when]
    assert samples.evaluations.tolist() == [case["steps"] * (2 if case.get("cfg_scale") else 1)]


@pytest.mark.parametrize("implementation", [NAME, "sdpa"])
def test_rows_do_not_see_each_other(model, implementation):
    """Prompts of different lengths, alone and together, in one pass or in many, packed or not."""
    model.set_attn_implementation(implementation)
    prompts = [PROMPT, [8], [3, 4, 5, 6, 7, 8, 9], [9, 8, 7, 6]]
    sampling = Sampling(steps=8)
    alone = [generate(model, [prompt], 8, sampling, mask_token_id=MASK).tokens[0].tolist() for prompt in prompts]
    assert len({tuple(tokens) for tokens in alone}) == 4
    for max_tokens in (10_000, 20):
        together = generate(model, prompts, 8, sampling, mask_token_id=MASK, max_tokens=max_tokens)
        assert together.tokens.tolist() == alone
    model.set_attn_implementation(NAME)


def test_rows_that_share_a_pass():
    assert _groups([5, 3, 5, 4, 3], 100, packed=True) == [[0, 1, 2, 3, 4]]
    assert _groups([5, 3, 5, 4, 3], 9, packed=True) == [[0, 1], [2, 3], [4]]
    assert _groups([5, 3, 5, 4, 3], 9, packed=False) == [[1, 4], [3], [0], [2]]


def a_model_that_ends(rows, canvases, start, stop):
    """Sure of position i where i is small; row r ends at position r + 1."""
    logits = torch.zeros(len(rows), stop - start, VOCABULARY)
    for n, row in enumerate(rows.tolist()):
        for i in range(start, stop):
            logits[n, i - start, END if i == row + 1 else 10 + i] = 8.0 - 0.1 * i
    return logits


@pytest.mark.parametrize("block_length", [None, 4])
def test_early_stop_saves_evaluations_and_changes_no_answer(block_length):
    canvas = torch.full((3, 8), MASK)
    options = dict(steps=8, block_length=block_length, end_token_ids=(END,))
    full = denoise(a_model_that_ends, canvas, Sampling(**options), mask_token_id=MASK)
    early = denoise(a_model_that_ends, canvas, Sampling(**options, early_stop=True), mask_token_id=MASK)
    assert full.answers() == early.answers() == [[10], [10, 11], [10, 11, 12]]
    assert full.evaluations.tolist() == [8, 8, 8] and early.evaluations.tolist() == [2, 3, 4]
    assert full.lengths().tolist() == [1, 2, 3]
    assert (early.unmasked_at[0] == torch.tensor([0, 1, -1, -1, -1, -1, -1, -1])).all()


def a_model_of_mostly_void(rows, canvases, start, stop):
    """Position 0 is a word, the end is position 1 or, much less likely, 2; a pad is all but certain from there on."""
    table = {0: {10: 0.5, 11: 0.4, END: 0.1}, 1: {END: 0.6, 10: 0.4}, 2: {PAD: 0.8, END: 0.12, 10: 0.08}}
    probabilities = torch.zeros(len(rows), stop - start, VOCABULARY, dtype=torch.float64)
    for i in range(start, stop):
        for token, share in table.get(i, {PAD: 0.99, 10: 0.01}).items():
            probabilities[:, i - start, token] = share
    return probabilities.log()


@pytest.mark.parametrize("remasking", ["low_confidence", "margin", "entropy"])
def test_a_position_that_is_all_but_certainly_a_banned_pad_is_written_last(remasking):
    options = dict(steps=6, remasking=remasking, end_token_ids=(END,), pad_token_ids=(PAD,), early_stop=True)
    canvas = torch.full((1, 6), MASK)
    banning = Sampling(**options, end_token_policy="ban_pad")
    banned = denoise(a_model_of_mostly_void, canvas, banning, mask_token_id=MASK)
    assert banned.tokens.tolist() == [[10, END, MASK, MASK, MASK, MASK]] and banned.evaluations.tolist() == [2]
    plain = denoise(a_model_of_mostly_void, canvas, Sampling(**options), mask_token_id=MASK)
    assert plain.tokens[0, 3:].tolist() == [PAD] * 3 and plain.evaluations.tolist() == [6], "control: they come first"


def test_where_nothing_is_possible_but_a_banned_pad_nothing_breaks():
    """An exact denoiser gives probabilities of 0."""
    logits = torch.full((1, 3, VOCABULARY), -torch.inf, dtype=torch.float64)
    logits[0, :2, 10], logits[0, 2, PAD] = 0.0, 0.0
    for remasking in ("low_confidence", "margin", "entropy"):
        sampling = Sampling(steps=3, remasking=remasking, pad_token_ids=(PAD,), end_token_policy="ban_pad")
        samples = denoise(lambda *_: logits, torch.full((1, 3), MASK), sampling, mask_token_id=MASK)
        assert samples.unmasked_at[0, 2] == 2 and not (samples.tokens == PAD).any(), remasking


def test_written_tokens_are_never_changed_and_every_mask_is_written():
    canvas = torch.full((2, 8), MASK)
    canvas[0, 3] = 44
    samples = denoise(a_model_that_ends, canvas, Sampling(steps=3), mask_token_id=MASK)
    assert samples.tokens[0, 3] == 44 and samples.unmasked_at[0, 3] == -1
    assert not (samples.tokens == MASK).any()
    assert samples.unmasked_at[1].bincount().tolist() == [3, 3, 2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mask_is_never_written(temperature):
    """A model that finds the mask likeliest everywhere, in float64 as an exact denoiser gives it."""
    logits = torch.zeros(1, 8, VOCABULARY, dtype=torch.float64)
    logits[..., MASK], logits[..., 10] = 9.0, 5.0
    given = logits.clone()
    sampling = Sampling(steps=4, temperature=temperature, end_token_policy="ban_pad", pad_token_ids=(PAD,))
    generator = torch.Generator().manual_seed(0)
    samples = denoise(lambda *_: logits, torch.full((1, 8), MASK), sampling, mask_token_id=MASK, generator=generator)
    assert not (samples.tokens == MASK).any() and (samples.tokens == 10).any()
    assert samples.unmasked_at[0].bincount().tolist() == [2, 2, 2, 2]
    assert torch.equal(logits, given), "the caller's logits are left as they are"


def test_an_answer_without_end_is_the_whole_canvas():
    samples = denoise(a_model_that_ends, torch.full((1, 4), MASK), Sampling(steps=4), mask_token_id=MASK)
    assert samples.lengths().tolist() == [4]


def test_shares_and_ties_literally():
    assert share_evenly(torch.tensor([5, 6, 2]), 3).tolist() == [[2, 2, 1], [2, 2, 2], [1, 1, 0]]
    picked = surest(torch.tensor([[0.5, 0.7, 0.5, 0.5], [0.1, 0.2, 0.3, 0.4]]), torch.tensor([2, 1]))
    assert picked.int().tolist() == [[1, 1, 0, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_gumbel_noise_draws_from_the_softmax(temperature):
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5], dtype=torch.float64)
    drawn = add_gumbel_noise(logits.expand(40_000, 4), temperature, torch.Generator().manual_seed(0)).argmax(-1)
    shares = drawn.bincount(minlength=4) / len(drawn)
    torch.testing.assert_close(shares.double(), (logits / temperature).softmax(0), atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (dict(block_length=5), "block_length"),
        (dict(steps=3, block_length=4), "steps"),
        (dict(remasking="guess"), "remasking"),
        (dict(end_token_policy="ban_pads"), "end_token_policy"),
    ],
)
def test_refusals(options, key):
    with pytest.raises(PacktrainError, match=key):
        denoise(a_model_that_ends, torch.full((1, 8), MASK), Sampling(**{"steps": 8} | options), mask_token_id=MASK)


def test_the_command_line_names_what_the_sampler_knows():
    assert options.REMASKING == get_args(Remasking)
    assert options.END_TOKEN_POLICIES == get_args(EndTokenPolicy)
