"""Models that bring their own code, as LLaDA and Dream do: no position ids, no mask, both ways by themselves."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel

from packtrain.objectives.masked_diffusion.loss import Masking, make_bidirectional, masked_diffusion
from packtrain.packing.plan import MicroBatch
from tests.objectives.masked_diffusion.test_loss import MASK, collator, tailed_examples

CODE = """
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

class TinyConfig(PreTrainedConfig):
    model_type = "tiny_both_ways"
    def __init__(self, vocab_size=64, hidden_size=16, **kwargs):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        super().__init__(tie_word_embeddings=False, **kwargs)

class TinyModel(PreTrainedModel):
    config_class = TinyConfig
    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.mix = nn.TransformerEncoderLayer(config.hidden_size, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
    def get_input_embeddings(self):
        return self.embed
    def get_output_embeddings(self):
        return self.head
    def forward(self, input_ids=None, attention_mask=None, use_cache=None):
        assert attention_mask is None and not use_cache
        place = torch.arange(input_ids.shape[1]).float()[:, None] / 10
        return CausalLMOutputWithPast(logits=self.head(self.mix(self.embed(input_ids) + place.sin())))
"""


@pytest.fixture
def model(tmp_path):
    (tmp_path / "modeling_tiny_both_ways.py").write_text(CODE)
    auto_map = {"AutoConfig": "modeling_tiny_both_ways.TinyConfig", "AutoModel": "modeling_tiny_both_ways.TinyModel"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "tiny_both_ways", "auto_map": auto_map}))
    config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    torch.manual_seed(0)
    return make_bidirectional(AutoModel.from_config(config, trust_remote_code=True))


def test_an_update_of_equally_long_documents_needs_no_mask(model):
    """`batch_max` in the padded layout: rows without filler, whose loss is that of each document alone."""
    examples = tailed_examples()
    ids, width = np.arange(5), int(examples.lengths.max())
    objective = masked_diffusion(Masking(mask_token_id=MASK))

    def loss(batches) -> float:
        total = sum(objective.denominator(batch) for batch in batches)
        return (sum(objective.losses(model, batch).weighted_sum() for batch in batches) / total).item()

    def batch_of(some: np.ndarray, lengths: np.ndarray) -> dict:
        micro_batch = MicroBatch(example_ids=some, starts=np.zeros_like(some), stops=lengths)
        input_ids, labels = examples.gather(some, stops=lengths)
        return collator(layout="padded", pad_token_id=0).collate(input_ids, labels, micro_batch.lengths, some)

    together = batch_of(ids, np.full(5, width))
    assert together["attention_mask"].all()
    separate = loss([batch_of(ids[i : i + 1], np.full(1, width)) for i in range(5)])
    assert loss([together]) == pytest.approx(separate, rel=1e-6)
    with pytest.raises(AssertionError):  # control: filler would need a mask, which this model does not read
        loss([batch_of(ids, examples.lengths[ids])])
