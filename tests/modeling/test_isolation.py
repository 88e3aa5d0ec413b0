"""Isolation is checked before the first step, under every engine that allows it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from packtrain.errors import ModelError
from packtrain.modeling.attention.varlen import register
from packtrain.modeling.audit.audit import quick_check
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


@pytest.mark.parametrize(("architecture", "attention"), [("deepseek_v32", "sdpa"), ("deepseek_v4", "eager")])
def test_layers_that_packtrain_varlen_cannot_compute_are_padded_inside_with_an_attention_of_transformers(
    architecture, attention
):
    """DeepSeek's sparse attention chooses keys by the mask, which `packtrain_varlen` does not build; its compressed keys
    are no tokens."""
    model = tiny_model(architecture)
    assert not quick_check(model, "flat", register()).safe  # control
    model.set_attn_implementation(register())
    found = check_isolation(model, "flat", CPU)
    assert found.says.startswith("isolated") and found.padding is not None
    assert found.says.endswith(f", with {attention}, as packtrain_varlen cannot compute its attention")
    assert model.config._attn_implementation == attention


def test_outputs_that_are_not_finite_prove_nothing(caplog):
    """No difference of NaN is above a tolerance, so a model that leaks would be called isolated."""
    model = leaking()
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="answers a single document with NaN, as its weights hold NaN .*layers.0.fc1"):
        check_isolation(model, "flat", CPU)
    model = leaking()
    model.lm_head.register_forward_hook(
        lambda head, args, logits: torch.cat([logits[..., 1:], logits[..., :1] / 0], -1)
    )
    assert check_isolation(model, "flat", CPU).says.startswith("unclear")
    assert "is not known" in caplog.text
