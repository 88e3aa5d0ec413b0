"""What of a model ranks compare before the first update."""

from __future__ import annotations

import pytest
import torch

from packtrain.training.agreement import weights_hash
from tests.tiny import tiny_model


@pytest.mark.parametrize("sharded", [False, True])
def test_an_adapter_on_shards_may_be_drawn_anew_on_every_rank(sharded):
    """DeepSpeed takes rank 0's when it shards the rest. Control: without shards the weights are compared."""
    models = [tiny_model("llama"), tiny_model("llama")]
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        model.added = torch.nn.Linear(4, 4, bias=False)
        if sharded:
            model.get_input_embeddings().weight.ds_id = 0  # as `deepspeed.zero.Init` marks its parameters
    assert (weights_hash(models[0]) == weights_hash(models[1])) == sharded


def test_one_other_weight_is_another_hash():
    model = tiny_model("llama")
    before = weights_hash(model)
    assert weights_hash(tiny_model("llama")) == before
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert weights_hash(model) != before
