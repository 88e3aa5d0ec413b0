"""Mixers are found, padded inside, proved, and left as they were where that does not help."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from packtrain.errors import ModelError
from packtrain.modeling.attention.varlen import NAME
from packtrain.modeling.audit import probe
from packtrain.modeling.audit.audit import isolate, quick_check
from packtrain.modeling.audit.models import tiny_model
from packtrain.modeling.audit.settings import register_counted
from packtrain.modeling.mixers.finding import find_mixers
from packtrain.modeling.mixers.view import MOST_PADDING, Views, flat, group

EXACT = 1e-5


def hybrid() -> nn.Module:
    model = tiny_model("lfm2_moe")
    model.set_attn_implementation(NAME)
    return model


def hooks_of(model: nn.Module) -> list:
    return [
        hook
        for module in model.modules()
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    ]


def apart(model: nn.Module, lengths: tuple[int, ...]) -> float:
    """Returns how far documents in one flat row are from each of them alone, as a share of the largest output."""
    documents = probe.sample_documents(model, lengths, seed=1)
    laid = probe.flat(documents, 0, 0)
    with torch.no_grad():
        together = probe.each(probe.outputs(model, laid), laid.places)
        alone = probe.alone(model, documents)
    return (
        max(probe.largest(a, b) for a, b in zip(together, alone, strict=True))
        / max(x.abs().max() for x in alone).item()
    )


# ------------------------------------------------------------------------------------------------- the groups


@given(st.lists(st.integers(1, 300), min_size=1, max_size=120))
def test_groups_hold_every_document_once_with_little_padding(lengths):
    groups = group(tuple(lengths))
    assert sorted(number for rows in groups for number in rows) == list(range(len(lengths)))
    area = sum(max(lengths[number] for number in rows) * len(rows) for rows in groups)
    if len(set(lengths)) <= 64:
        assert area <= (1 + MOST_PADDING) * sum(lengths)
    assert len(groups) <= len(set(lengths))


def test_documents_of_one_length_are_one_group_and_equal_lengths_are_never_padded():
    assert len(group((7,) * 50)) == 1
    assert [len(rows) for rows in group((3, 9, 3, 9, 4), "equal lengths")] == [2, 1, 2]
    assert len(group((3, 9, 3, 9, 4), "one")) == 1


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_a_row_is_the_same_after_both_conversions(lengths):
    bounds = (0, *np.cumsum(lengths).tolist())
    row = torch.arange(bounds[-1] * 5.0).view(1, -1, 5)
    views = Views.of(bounds, row.device)
    assert torch.equal(flat([row[0][one.index] for one in views.groups], views), row)


# --------------------------------------------------------------------------------------------------- finding


@pytest.mark.parametrize(
    ("architecture", "mixers", "causal"),
    [
        ("lfm2_moe", {"Lfm2MoeShortConv"}, True),
        ("gptj", {"GPTJAttention"}, True),
        ("fnet", {"FNetFourierTransform"}, False),
    ],
)
def test_modules_that_mix_positions_are_found_by_trying_them(architecture, mixers, causal):
    model = tiny_model(architecture)
    register_counted()
    if architecture != "gptj":
        model.set_attn_implementation("packtrain_varlen_counted")
    found = find_mixers(model, probe.sample_documents(model)).mixers
    assert {type(one.module).__name__ for one in found} == mixers
    assert all(one.causal == causal for one in found)


def test_attention_that_is_looked_up_by_name_is_no_mixer():
    model = tiny_model("llama")
    register_counted()
    model.set_attn_implementation("packtrain_varlen_counted")
    assert not find_mixers(model, probe.sample_documents(model)).mixers
    model.set_attn_implementation(NAME)
    assert isolate(model)[1] is None and not hooks_of(model)


# ------------------------------------------------------------------------------------------------- isolation


def test_rows_of_other_documents_and_of_as_many_tokens_as_the_model_is_wide():
    model = hybrid()
    assert isolate(model)[1] is not None
    for lengths in ((9, 5, 3, 11), (1,), (1, 1, 30), (40, 2, 39, 38, 3, 1, 1), (20, 12)):  # the last: 32 tokens
        assert apart(model, lengths) < EXACT, lengths


def test_it_leaks_without_the_hooks():
    """Control. transformers itself refuses bounds of documents here, so they are told by positions alone."""
    model = tiny_model("mamba")
    model.set_attn_implementation(NAME)
    assert apart(model, (9, 5)) > 1e-2
    _, padding = isolate(model)
    assert padding is not None and apart(model, (9, 5)) < EXACT
    padding.remove()
    assert apart(model, (9, 5)) > 1e-2 and not hooks_of(model)


def test_padded_batches_are_left_alone():
    model, batch = hybrid(), {"input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])}
    batch["attention_mask"] = (batch["input_ids"] > 0).long()
    before = model(**batch, use_cache=False).logits
    isolate(model)
    assert torch.equal(model(**batch, use_cache=False).logits, before)


def test_one_row_of_another_length_is_refused():
    model = hybrid()
    isolate(model)
    with pytest.raises(ModelError, match="as many as the documents have"):
        model(input_ids=torch.ones(1, 7, dtype=torch.long), cu_seq_lens_q=torch.tensor([0, 3, 8], dtype=torch.int32))


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_keep_the_hooks_and_share_nothing_with_the_original(way):
    model = hybrid()
    isolate(model)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, file := io.BytesIO())
        other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert apart(other, (9, 5, 3)) < EXACT
    assert not {id(hook) for hook in hooks_of(model)} & {id(hook) for hook in hooks_of(other)}


@pytest.mark.parametrize("order", ["adapter first", "hooks first"])
def test_an_adapter_on_the_projections_of_a_mixer(order):
    model = hybrid()
    config = LoraConfig(r=4, target_modules=["in_proj", "out_proj", "q_proj"], init_lora_weights=False)
    if order == "adapter first":
        model = get_peft_model(model, config)
        isolate(model)
    else:
        isolate(model)
        model = get_peft_model(model, config)
    documents = probe.sample_documents(model, (9, 5, 14), seed=1)
    laid = probe.flat(documents, 0, 0)
    ours = probe.gradients(model, probe.each(probe.outputs(model, laid), laid.places))
    theirs = probe.gradients(model, probe.alone(model, documents))
    assert apart(model, (9, 5, 14)) < EXACT
    assert (ours - theirs).norm() < EXACT * theirs.norm()


def test_bfloat16():
    finding, padding = isolate(hybrid(), compute_dtype=torch.bfloat16)
    assert finding.safe and padding is not None
    assert isolate(hybrid().bfloat16())[1] is not None


def test_of_a_large_model_the_first_layers_are_tried_and_all_are_padded(monkeypatch):
    monkeypatch.setattr("packtrain.modeling.audit.audit.LARGE", 0)
    kinds = ["conv", "full_attention", "conv", "conv"]
    model = tiny_model("lfm2_moe", num_hidden_layers=4, layer_types=kinds)
    model.set_attn_implementation(NAME)
    finding, padding = isolate(model)
    assert finding.checked == "first 3 of 4 layers"  # one of them without experts
    assert padding is not None and padding.says() == "padded inside: 3 mixers (Lfm2MoeShortConv)"
    assert apart(model, (9, 5, 3)) < EXACT


def test_what_does_not_help_is_undone():
    """A model that counts all tokens of a row is not isolated by its layers' sight of documents."""
    model = hybrid()

    def add_mean(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output + output.mean(1, keepdim=True)

    model.get_input_embeddings().register_forward_hook(add_mean)
    before = len(hooks_of(model))
    model.lm_head.register_forward_hook(add_mean)
    finding, padding = isolate(model)
    assert padding is None and not finding.safe
    assert len(hooks_of(model)) == before + 1


def test_a_model_whose_positions_run_on_is_padded_as_a_whole():
    model = tiny_model("bart")
    model.set_attn_implementation(NAME)
    assert quick_check(model, "flat").verdict == "wrong"
    _, padding = isolate(model)
    assert padding is not None and padding.says() == "padded inside: BartDecoder"
    assert apart(model, (9, 5, 3)) < EXACT
