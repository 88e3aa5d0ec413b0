"""Isolation is checked before the first step, under every engine that allows it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from packtrain.errors import ModelError
from packtrain.modeling.attention.varlen import register
from packtrain.modeling.audit.models import tiny_model
from packtrain.modeling.isolation import check_isolation
from tests.tiny import tiny_model as tiny_llama

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def leaking() -> nn.Module:
    """OPT builds its mask without position_ids."""
    model = tiny_model("opt")
    model.set_attn_implementation("sdpa")
    return model


def test_whole_weights_are_asked_wherever_they_will_be_taken():
    for device in (CPU, CUDA):  # DeepSpeed and FSDP move them later
        with pytest.raises(ModelError, match="attention leaks between documents of a flat batch with sdpa: leaks"):
            check_isolation(leaking(), "flat", device)
    assert "isolated" in check_isolation(tiny_llama("llama"), "flat", CPU, dtype=torch.bfloat16).says
    assert "isolated" in check_isolation(tiny_llama("llama", attn_implementation="sdpa"), "flat", CPU).says
    assert "leaks" in check_isolation(leaking(), "flat", CPU, allow_contamination=True).says


def test_sharded_weights_are_not_asked_and_that_is_said():
    of_deepspeed = leaking()
    next(of_deepspeed.parameters()).ds_id = 0
    assert check_isolation(of_deepspeed, "flat", CPU).says.startswith("not checked: weights are sharded already")


def test_weights_that_are_elsewhere_are_not_asked():
    """FSDP loads them on one rank of a host, and leaves the others' without values."""
    assert "not checked" in check_isolation(leaking().to("meta"), "flat", CPU).says


def test_an_attention_that_needs_the_device_is_no_refusal_where_the_weights_are_not_there_yet():
    class Elsewhere(nn.Module):
        """A kernel for another device."""

        def forward(self, *args, **kwargs):
            raise RuntimeError("only on CUDA")

    def broken():
        model = leaking()
        model.model.decoder.layers[0].self_attn = Elsewhere()
        return model

    assert "not checked: cannot run a single document: RuntimeError" in check_isolation(broken(), "flat", CUDA).says
    with pytest.raises(ModelError, match="cannot run a single document"):  # control: it will never run
        check_isolation(broken(), "flat", CPU)


def test_layers_that_work_on_the_mask_are_told_which_attention_isolates_them():
    """DeepSeek's sparse attention chooses keys by the mask, which `packtrain_varlen` does not build."""
    model = tiny_model("deepseek_v32")
    with pytest.raises(ModelError, match="cannot run a flat batch with packtrain_varlen") as refused:
        model.set_attn_implementation(register())
        check_isolation(model, "flat", CPU)
    assert "set attn_implementation to sdpa, with which documents are isolated, or choose" in str(refused.value)
    model.set_attn_implementation("sdpa")
    assert "isolated" in check_isolation(model, "flat", CPU).says
    other = tiny_model("deepseek_v4")  # control: none isolates its compressed keys
    other.set_attn_implementation(register())
    with pytest.raises(ModelError, match="cannot run a flat batch with packtrain_varlen") as refused:
        check_isolation(other, "flat", CPU)
    assert "fix: choose a padded strategy" in str(refused.value)
