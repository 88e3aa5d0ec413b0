"""Liger's kernels next to a loss of packtrain's own: refused before the first step, or for the layers alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from packtrain.errors import PacktrainError
from packtrain.training import liger
from packtrain.training.liger import keep_own_loss
from tests.training.helpers import make_trainer


def arguments(device: str = "cuda", **given) -> SimpleNamespace:
    """What is read of TrainingArguments on a machine with that device."""
    settings = {"use_liger_kernel": True, "liger_kernel_config": None, "device": torch.device(device)}
    return SimpleNamespace(**settings | given)


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(liger, "is_liger_kernel_available", lambda: True)


def test_the_loss_is_not_replaced(installed, caplog):
    args = arguments(liger_kernel_config={"rms_norm": False})
    keep_own_loss(args)
    losses = {"fused_linear_cross_entropy": False, "cross_entropy": False}
    assert args.liger_kernel_config == {"rms_norm": False, **losses}
    assert caplog.messages == ["packtrain: use_liger_kernel replaces layers; the loss stays packtrain's own, in chunks"]
    keep_own_loss(off := arguments(use_liger_kernel=False))
    assert off.liger_kernel_config is None and len(caplog.messages) == 1, "control: not asked for"


@pytest.mark.parametrize("name", liger.LOSSES)
def test_losses_asked_for_by_name_are_refused(installed, name):
    with pytest.raises(PacktrainError, match="cannot replace the loss"):
        keep_own_loss(arguments(liger_kernel_config={name: True}))
    keep_own_loss(arguments(liger_kernel_config={name: False}))


def test_refused_where_it_cannot_run(installed):
    with pytest.raises(PacktrainError, match="needs a GPU"):
        keep_own_loss(arguments("cpu"))


def test_a_trainer_asks_before_its_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(liger, "is_liger_kernel_available", lambda: False)
    with pytest.raises(PacktrainError, match="which is not installed"):
        make_trainer(tmp_path, strategy="balanced", use_liger_kernel=True)
    make_trainer(tmp_path, strategy="balanced", use_liger_kernel=False)
