"""The promises of the training room on a GPU: same losses whatever the layout, and one recipe end to end."""

from __future__ import annotations

import pytest
import torch

from packtrain.recipe.reader import load_recipe
from packtrain.training.run import train
from tests.training.helpers import LeakingCollator, curve, make_trainer
from tests.training.test_equivalence import LAID_OUT_OTHERWISE, REFERENCE
from tests.training.test_run import RECIPE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
EXACT = 1e-3  # float32: sums in another order, 20 updates
BFLOAT16 = 2e-2  # 8 bits of mantissa, 20 updates; a leak may hide below this
FAMILIES = pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
TRAINED = pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])


def run(tmp_path, **settings):
    return curve(make_trainer(tmp_path, use_cpu=False, **settings))


@FAMILIES
@TRAINED
def test_layouts_do_not_change_the_updates(tmp_path, family, lora):
    settings = dict(family=family, lora=lora, loss_weighting="example")
    reference = run(tmp_path, strategy=REFERENCE, **settings)
    for strategy in LAID_OUT_OTHERWISE:
        assert run(tmp_path, strategy=strategy, **settings).difference(reference) < EXACT, strategy


@FAMILIES
@TRAINED
def test_documents_that_see_each_other_are_noticed(tmp_path, family, lora):
    """Control: the comparison above can fail, and a leak alone is enough."""
    leaking = LeakingCollator(layout="flat", pad_token_id=0, loss_weighting="example")
    settings = dict(family=family, lora=lora, loss_weighting="example")
    reference = run(tmp_path, strategy=REFERENCE, **settings)
    assert run(tmp_path, strategy="padding_free", collator=leaking, **settings).difference(reference) > EXACT


@FAMILIES
@TRAINED
def test_layouts_stay_close_in_bfloat16(tmp_path, family, lora):
    """By the kernels of half precision; that these isolate is shown in `test_varlen_gpu.py`."""
    settings = dict(family=family, lora=lora, bf16=True, loss_weighting="example")
    reference = run(tmp_path, strategy=REFERENCE, **settings)
    for strategy in LAID_OUT_OTHERWISE:
        ours = run(tmp_path, strategy=strategy, **settings)
        assert abs(ours.loss / reference.loss - 1).max() < BFLOAT16, strategy
        assert abs(ours.grad_norm / reference.grad_norm - 1).max() < 5 * BFLOAT16, strategy


def test_a_recipe_end_to_end(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.replace("OUT", str(tmp_path / "run")))
    settings = ["use_cpu=false", "bf16=true", "model.config.attention_dropout=0"]
    summary = train(load_recipe(path, settings))
    assert summary.held_out_loss_after < summary.held_out_loss_before - 0.3
    assert summary.peak_memory_of == "device" and summary.attn_implementation == "packtrain_varlen"
