"""Models that are padded inside, under ZeRO-3: ranks have other numbers of groups, and gather weights together."""

from __future__ import annotations

import numpy as np
import pytest

from tests.launch.helpers import difference, needs_deepspeed, run, weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), needs_deepspeed]

COMMON = "hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4"
MODELS = {
    "mixers": f"model_type: lfm2, {COMMON}, num_key_value_heads: 2, layer_types: [conv, full_attention]",
    "backbone": "model_type: bart, d_model: 32, decoder_layers: 2, decoder_ffn_dim: 48, decoder_attention_heads: 4, "
    "is_decoder: true, is_encoder_decoder: false, dropout: 0.0",
}
OPTIONS = {"mixers": ["training.gradient_checkpointing=true"], "backbone": []}


@pytest.mark.parametrize("padded", [pytest.param("mixers", marks=pytest.mark.ci), "backbone"])
def test_two_sharded_ranks_train_as_one(tmp_path, padded):
    options = [f"model.config={{{MODELS[padded]}, max_position_embeddings: 1024}}", "data.num_rows=16"]
    options += ["training.num_train_epochs=1", *OPTIONS[padded]]
    expected = run(tmp_path / "alone", None, 1, *options)[0]
    found = run(tmp_path / "both", "zero3", 2, *options)[0]
    for figure in ("losses", "norms"):
        ours, theirs = (list(one[figure].values()) for one in (found, expected))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)
        assert np.ptp(theirs) > 1e-2 * max(theirs)  # updates differ from each other
    assert difference(weights(tmp_path / "both"), weights(tmp_path / "alone")) < 1e-4
