"""LLaMA-Factory, `neat_packing`: its 4-D mask isolates attention, but short convolutions do not read it."""

import torch
from llamafactory.data.collator import prepare_4d_attention_mask
from transformers import Lfm2Config, Lfm2ForCausalLM

sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
sizes |= dict(num_key_value_heads=2, initializer_range=0.5)
mask = prepare_4d_attention_mask(torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2]]), torch.float32)
given = dict(attention_mask=mask, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]))
one, other = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]]), torch.tensor([[5, 6, 13, 14, 9, 10, 11, 12]])
for layers in (["full_attention", "full_attention"], ["conv", "full_attention"]):
    torch.manual_seed(0)
    model = Lfm2ForCausalLM(Lfm2Config(**sizes, layer_types=layers)).eval()
    with torch.no_grad():
        print(layers, (model(one, **given).logits - model(other, **given).logits)[0, 4:].abs().max())
