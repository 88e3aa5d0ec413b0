"""Run under torchrun by launch/test_runs.py: three updates of a fully sharded model, in chunks, against the
same model whole, with whole logits."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from packtrain.modeling.attention.varlen import register
from packtrain.objectives import chunks
from packtrain.objectives.causal import causal_lm_losses
from packtrain.objectives.logits import computes_in_chunks, output_head
from packtrain.packing.collator import PackCollator
from packtrain.training.ranks import settle
from tests.tiny import VOCABULARY, random_documents, tiny_model

STEPS = 3


def train(model: torch.nn.Module, batches: list[dict]) -> list[float]:
    """Losses of this rank's batches; gradients are averaged over ranks where the model is sharded."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for batch in batches:
        scored = causal_lm_losses(model, batch, head=output_head(model))
        loss = scored.weighted_sum() / batch["loss_weights"].sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    register()
    collator = PackCollator(layout="flat", pad_token_id=0)
    batches = [collator(random_documents([9, 4, 17], seed=seed)) for seed in range(STEPS)]  # the same on both ranks
    expected = train(tiny_model("llama", attn_implementation="packtrain_varlen"), batches)
    model = tiny_model("llama", attn_implementation="packtrain_varlen")
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert all(parameter.to_local().numel() < parameter.numel() for parameter in model.parameters())
    chunks.CHUNK_BYTES = 4 * VOCABULARY * 7  # seven positions of 24 at once
    found = train(model, batches)
    assert computes_in_chunks(output_head(model))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=0)
    assert expected[-1] < expected[0]
    if dist.get_rank() == 0:
        print("losses agree", found)
    dist.barrier()
    settle()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
