"""Flat rows with positions alone, in a model with short convolutions: changing the first document moves the second one."""

import torch
from transformers import Lfm2Config, Lfm2ForCausalLM

sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
torch.manual_seed(0)
model = Lfm2ForCausalLM(Lfm2Config(**sizes, num_key_value_heads=2, layer_types=["conv", "full_attention"])).eval()
positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
one, other = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]]), torch.tensor([[5, 6, 13, 14, 9, 10, 11, 12]])
with torch.no_grad():
    apart = model(one, position_ids=positions).logits - model(other, position_ids=positions).logits
print(apart[0, 4:].abs().max())
