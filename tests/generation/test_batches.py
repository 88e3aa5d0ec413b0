"""Prompts answered together are answered as each alone, in batches within the budget."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from packtrain.errors import PacktrainError
from packtrain.generation.batches import batches, generate
from packtrain.modeling.audit.models import enlarge
from tests.data.helpers import make_tokenizer
from tests.tiny import tiny_model


@given(st.lists(st.integers(1, 90), max_size=40), st.integers(1, 20), st.integers(20, 400))
def test_every_prompt_is_dealt_once_and_batches_fit(lengths, new, budget):
    dealt = batches(lengths, new_tokens=[new] * len(lengths), max_tokens=budget)
    assert sorted(number for batch in dealt for number in batch) == list(range(len(lengths)))
    for batch in dealt:
        assert len(batch) == 1 or len(batch) * (max(lengths[number] for number in batch) + new) <= budget


def prompts(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 64, (length,), generator=generator).tolist() for length in (1, 17, 5, 40, 6, 2, 23)]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_answers_are_those_of_each_prompt_alone(family):
    """Ragged prompts, padded to the left. Control: of another prompt the answers differ."""
    model = tiny_model(family)
    enlarge(model)  # so that the likeliest token is likelier by more than rounding
    tokenizer = make_tokenizer()
    together = dict(generate(model, tokenizer, prompts(), max_new_tokens=12))
    alone = {n: dict(generate(model, tokenizer, [p], max_new_tokens=12))[0] for n, p in enumerate(prompts())}
    assert together == alone
    assert dict(generate(model, tokenizer, prompts(1), max_new_tokens=12)) != alone
    assert len(set(map(tuple, alone.values()))) > 1


def test_a_model_that_reads_padding_is_asked_prompts_of_one_length(caplog):
    """RWKV takes no mask. Control: in one batch with others it writes something else."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "rwkv", vocab_size=64, hidden_size=32, attention_hidden_size=32, intermediate_size=48, num_hidden_layers=2
    )
    model, tokenizer = AutoModelForCausalLM.from_config(config).eval(), make_tokenizer()
    enlarge(model)
    asked = prompts()
    together = dict(generate(model, tokenizer, asked, max_new_tokens=8))
    assert "reads the padding of a batch" in caplog.text
    assert together == {n: dict(generate(model, tokenizer, [p], max_new_tokens=8))[0] for n, p in enumerate(asked)}
    behind = [[tokenizer.pad_token_id] * (40 - len(prompt)) + prompt for prompt in asked]  # as one batch would be
    assert dict(generate(model, tokenizer, behind, max_new_tokens=8)) != together


def test_a_long_prompt_leaves_others_their_room():
    """An answer is as long as behind its prompt alone."""
    model, tokenizer = tiny_model("gpt2"), make_tokenizer()
    enlarge(model)
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    long = [3 + n % 60 for n in range(230)]
    short, last = dict(sorted(generate(model, tokenizer, [[5, 9, 30], long]))).values()
    assert len(last) == 26 and len(short) == 253
    assert short == dict(generate(model, tokenizer, [[5, 9, 30]]))[0]


def test_an_answer_stops_at_its_end():
    """Whatever the others of its batch go on with."""
    model, tokenizer = tiny_model("llama"), make_tokenizer()
    enlarge(model)
    whole = dict(generate(model, tokenizer, prompts(), max_new_tokens=12))
    end = whole[3][4]
    model.generation_config.eos_token_id = [end]
    cut = dict(generate(model, tokenizer, prompts(), max_new_tokens=12))
    assert cut == {n: answer[: answer.index(end)] if end in answer else answer for n, answer in whole.items()}
    assert cut != whole


def test_the_defaults_of_a_model_change_nothing():
    """Penalties and sampling that a model's generation_config asks for."""
    model, tokenizer = tiny_model("llama"), make_tokenizer()
    enlarge(model)
    plain = dict(generate(model, tokenizer, prompts(), max_new_tokens=12))
    model.generation_config.update(repetition_penalty=3.0, do_sample=True, top_k=5, num_beams=2, no_repeat_ngram_size=1)
    assert dict(generate(model, tokenizer, prompts(), max_new_tokens=12)) == plain


def test_sampling_follows_the_seed():
    model, tokenizer = tiny_model("llama"), make_tokenizer()
    first, again, other = (
        dict(generate(model, tokenizer, prompts(), max_new_tokens=12, temperature=1.0, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("asked", "new", "message"), [([[3], []], 4, "prompt 2: is empty"), ([[3] * 250], 10, "6 fit")]
)
def test_prompts_that_cannot_be_answered(asked, new, message):
    with pytest.raises(PacktrainError, match=message):
        list(generate(tiny_model("llama"), make_tokenizer(), asked, max_new_tokens=new))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"temperature": float("nan")}, "--temperature: can't be sampled at"),
        ({"temperature": float("inf")}, "--temperature: can't be sampled at"),
        ({"temperature": 1e-320}, "--temperature: can't be sampled at"),
        ({"seed": 2**70}, "--seed: must be from 0"),
    ],
)
def test_how_nothing_can_be_sampled(how, message):
    with pytest.raises(PacktrainError, match=message):
        list(generate(tiny_model("llama"), make_tokenizer(), [[3]], max_new_tokens=2, **how))
