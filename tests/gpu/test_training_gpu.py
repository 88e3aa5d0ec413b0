"""The promises of the training room on a GPU: same losses whatever the layout, and one recipe end to end."""

from __future__ import annotations

import pytest
import torch

from packtrain.recipe import load_recipe
from packtrain.training.run import train
from tests.training.helpers import curve, make_trainer
from tests.training.test_run import RECIPE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BFLOAT16 = 2e-2  # 8 bits of mantissa, 20 updates


def run(tmp_path, **settings):
    return curve(make_trainer(tmp_path, use_cpu=False, **settings))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_layouts_do_not_change_the_updates(tmp_path, family, lora):
    settings = dict(family=family, lora=lora, bf16=True, loss_weighting="example")
    reference = run(tmp_path, strategy="pad_max", **settings)
    for strategy in ("pad_longest", "group_by_length", "padding_free", "balanced"):
        ours = run(tmp_path, strategy=strategy, **settings)
        assert abs(ours.loss / reference.loss - 1).max() < BFLOAT16, strategy
        assert abs(ours.grad_norm / reference.grad_norm - 1).max() < 5 * BFLOAT16, strategy


def test_layouts_agree_in_float32(tmp_path):
    reference = run(tmp_path, strategy="pad_max")
    assert run(tmp_path, strategy="balanced").difference(reference) < 1e-3


def test_packing_the_epoch_is_another_run(tmp_path):
    """Control: the comparison above can fail; other examples in the updates give other losses."""
    reference, packed = (run(tmp_path, strategy=name, bf16=True, max_steps=10) for name in ("balanced", "bfd"))
    assert abs(packed.loss / reference.loss - 1).max() > 1e-3


def test_a_recipe_end_to_end(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.replace("OUT", str(tmp_path / "run")))
    settings = ["use_cpu=false", "bf16=true", "model.config.attention_dropout=0"]
    summary = train(load_recipe(path, settings))
    assert summary.held_out_loss_after < summary.held_out_loss_before - 0.3
    assert summary.peak_memory_of == "device" and summary.attn_implementation == "packtrain_varlen"
