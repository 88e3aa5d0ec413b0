"""What the hooks do to a model: nothing that lasts, and nothing to calls that need padding."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import DynamicCache

from packtrain.errors import ModelError
from packtrain.modeling.attention.varlen import NAME
from packtrain.modeling.flatten import Flatten, RefuseLabels, Scatter
from packtrain.modeling.unpad import unpad
from tests.modeling.unpad.helpers import EXACT, apart, flat_calls, given, headed, ragged


def hooks_of(model):
    found = [
        hook
        for module in model.modules()
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    ]
    return [hook for hook in found if isinstance(hook, Flatten | Scatter | RefuseLabels)]


def implementations(model):
    return {
        name: module.config._attn_implementation for name, module in model.named_modules() if hasattr(module, "config")
    }


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(part, other[name]) for name, part in one.items())


# ------------------------------------------------------------------------------------------- as it was before


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("leave", ["remove", "with", "failure"])
def test_leaving_gives_the_model_back(implementation, leave):
    model, batch = headed("llama", "causal"), ragged()
    model.set_attn_implementation(implementation)
    before, attention, random = given(model, batch), implementations(model), torch.get_rng_state()
    if leave == "remove":
        unpadding = unpad(model)
        flat = given(model, batch)
        unpadding.remove()
        unpadding.remove()
    else:
        try:
            with unpad(model):
                flat = given(model, batch)
                assert implementations(model) != attention
                assert leave == "with"
        except AssertionError:
            assert leave == "failure"
    assert not same(before, flat)  # equal to rounding, but computed in another way
    assert same(before, given(model, batch))
    assert implementations(model) == attention and not hooks_of(model)
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("architecture", ["llama", "bert", "gemma3_text"])
def test_the_proof_leaves_weights_gradients_modes_and_windows(architecture):
    model = headed(architecture, "token" if architecture == "bert" else "causal").train()
    model.get_submodule(model.base_model_prefix).eval()
    next(model.parameters()).requires_grad_(False)
    weights = {name: (weight.clone(), weight.requires_grad) for name, weight in model.named_parameters()}
    modes, config = [module.training for module in model.modules()], model.config.to_dict()
    saved = list(model.state_dict())
    with unpad(model):
        assert list(model.state_dict()) == saved
    assert [module.training for module in model.modules()] == modes and model.config.to_dict() == config
    for name, weight in model.named_parameters():
        assert (
            torch.equal(weight, weights[name][0]) and weight.requires_grad == weights[name][1] and weight.grad is None
        )


def test_a_second_unpad_is_refused_and_the_first_stays():
    model, batch = headed("llama", "causal"), ragged()
    unpadding = unpad(model)
    hooks = hooks_of(model)
    with pytest.raises(ModelError, match="unpadded already"):
        unpad(model)
    assert hooks_of(model) == hooks and flat_calls(model, "model", batch) == 1
    unpadding.remove()
    unpad(model)


def test_hooks_share_nothing():
    """Two models whose hooks differ, called in turn."""
    decoder, encoder = headed("llama", "causal"), headed("roberta", "masked")
    batches = {decoder: ragged(), encoder: ragged("masked")}
    padded = {model: given(model, batch) for model, batch in batches.items()}
    unpad(decoder), unpad(encoder)
    outputs = {model: model(**batch) for model, batch in batches.items()}
    for model in (decoder, encoder):
        model.zero_grad()
        outputs[model].loss.backward()
        flat = {f"gradient {name}": weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        assert apart({name: part for name, part in padded[model].items() if name in flat}, flat) <= EXACT
    assert all(vars(hook) == vars(copy.deepcopy(hook)) for hook in hooks_of(decoder))


# ------------------------------------------------------------------------------------------- copied and saved


@pytest.mark.parametrize("through", ["deepcopy", "pickle", "torch.save"])
def test_hooks_survive(through):
    model, batch = headed("qwen3", "causal"), ragged()
    unpad(model)
    before = given(model, batch, output_hidden_states=False)
    if through == "deepcopy":
        other = copy.deepcopy(model)
    elif through == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert flat_calls(other, "model", batch) == 1
    assert same(before, given(other, batch, output_hidden_states=False))


@pytest.mark.slow
@pytest.mark.ci
def test_a_saved_model_runs_flat_in_another_process(tmp_path):
    model, batch = headed("llama", "causal"), ragged()
    unpad(model)
    torch.save((model, batch, model(**batch).logits), tmp_path / "model.pt")
    program = (
        f"import torch; model, batch, logits = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False);"
        "assert torch.equal(model(**batch).logits, logits)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_a_checkpoint_knows_nothing_of_it(tmp_path):
    model = headed("llama", "causal")
    unpad(model)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    loaded = type(model).from_pretrained(tmp_path)
    assert not hooks_of(loaded) and implementations(loaded)[""] == "sdpa"


# ------------------------------------------------------------------------------------ calls that stay as they are


def changed(batch, **parts):
    return {**batch, **parts}


def four_dimensional(batch):
    real = batch["attention_mask"].bool()
    causal = torch.ones(19, 19, dtype=torch.bool).tril()
    return changed(batch, attention_mask=causal[None, None] & real[:, None, None, :])


def holes(batch):
    mask = batch["attention_mask"].clone()
    mask[2, 5:9] = 0
    return changed(batch, attention_mask=mask)


def empty_row(batch):
    mask = batch["attention_mask"].clone()
    mask[1] = 0
    return changed(batch, attention_mask=mask, labels=batch["labels"].masked_fill(mask == 0, -100))


STANDS_ASIDE = {
    "a mask of four dimensions": four_dimensional,
    "no mask": lambda batch: changed(batch, attention_mask=None),
    "no padding": lambda batch: changed(batch, attention_mask=torch.ones_like(batch["attention_mask"])),
    "one row": lambda batch: {name: part[:1] for name, part in batch.items()},
    "padding between tokens": holes,
    "a row of padding only": empty_row,
    "a cache": lambda batch: changed(batch, past_key_values=DynamicCache()),
    "a cache to make": lambda batch: changed(batch, use_cache=True),
    "attention weights": lambda batch: changed(batch, output_attentions=True),
}


@pytest.mark.parametrize("case", STANDS_ASIDE)
def test_stands_aside(case):
    model, make = headed("qwen3", "causal"), STANDS_ASIDE[case]
    model.set_attn_implementation("eager" if case == "attention weights" else "sdpa")
    batch = ragged()
    padded = model(**make(batch))
    with unpad(model):
        assert flat_calls(model, "model", make(batch)) == 0
        aside = model(**make(batch))
        assert flat_calls(model, "model", batch) == 1
    for name in ("logits", "loss"):
        assert torch.equal(padded[name], aside[name]), name
    assert aside.keys() == padded.keys()
    if case == "attention weights":
        assert all(torch.equal(*pair) for pair in zip(padded.attentions, aside.attentions, strict=True))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text", "opt"])
def test_generation(architecture):
    model, batch = headed(architecture, "causal"), ragged(left=True)
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    before = model.generate(**prompt, **options)
    with unpad(model):
        assert torch.equal(before, model.generate(**prompt, **options))
        assert flat_calls(model, model.base_model_prefix if architecture != "opt" else "model.decoder", batch) == 1
        assert torch.equal(before, model.generate(**prompt, **options, use_cache=False))
    assert torch.equal(before, model.generate(**prompt, **options))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_loop_that_goes_on_from_a_cache_hears_that_there_is_none(architecture):
    model, batch = headed(architecture, "causal"), ragged(left=True)
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
    one = torch.ones(len(batch["input_ids"]), 1, dtype=torch.long)
    mask = torch.cat([prompt["attention_mask"], one], 1)

    def decode(**asked):
        first = model(**prompt, **asked)
        return model(input_ids=one, attention_mask=mask, past_key_values=first.past_key_values).logits

    before, keys = decode(), model(**prompt).keys()
    with unpad(model):
        assert model(**prompt).keys() == keys
        with pytest.raises(ModelError, match="past_key_values: was not filled.*\n.*use_cache=True"):
            decode()
        assert torch.equal(decode(use_cache=True), before)


def test_an_encoder_has_no_cache_to_miss():
    model, batch = headed("bert", "token"), ragged("token")
    keys = model(**batch).keys()
    with unpad(model):
        assert model(**batch).keys() == keys


# --------------------------------------------------------------------------------- labels that padding predicts


def test_a_supervised_first_token_behind_padding_is_refused():
    model, batch = headed("llama", "causal"), ragged(left=True)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    unpad(model)
    with pytest.raises(ModelError, match="first token of a row padded on the left") as refused:
        model(**batch)
    assert refused.value.key == "labels"
    right = ragged()
    right["labels"] = right["input_ids"].masked_fill(right["attention_mask"] == 0, -100)
    model(**right)


@pytest.mark.parametrize("head", ["causal", "token"])
def test_supervised_padding_is_refused(head):
    model, batch = headed("llama", head), ragged(head)
    unpad(model)
    batch["labels"][0, 12] = 1
    with pytest.raises(ModelError, match="padding"):
        model(**batch)


def test_what_the_last_token_predicts_is_a_token_like_others():
    """The label of the first column of padding, an end of text, comes from a real token."""
    model, batch = headed("llama", "causal"), ragged()
    batch["labels"][0, 7] = 2
    padded = given(model, batch)
    with unpad(model):
        assert apart(padded, given(model, batch)) <= EXACT


@pytest.mark.parametrize(("architecture", "head"), [("llama", "token"), ("bert", "masked"), ("bert", "token")])
def test_first_tokens_are_supervised_where_nothing_is_shifted(architecture, head):
    model, batch = headed(architecture, head), ragged(head, left=True)
    batch["labels"] = (batch["input_ids"] % 3).masked_fill(batch["attention_mask"] == 0, -100)
    padded = given(model, batch)
    with unpad(model):
        assert apart(padded, given(model, batch)) <= EXACT


def test_repr_of_the_hooks_says_what_was_found():
    model = headed("roberta", "masked")
    unpad(model)
    found = {type(hook): hook for hook in hooks_of(model)}
    assert found[Flatten].positions == "tokens behind padding_idx"
    assert found[RefuseLabels].ahead == 0 and Scatter in found
