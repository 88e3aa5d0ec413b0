"""The loss at supervised positions equals Hugging Face's own loss, in value and gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from packtrain.errors import ModelError
from packtrain.objectives.causal import causal_lm_losses
from packtrain.objectives.logits import output_head
from tests.tiny import CONFIGS, random_documents, tiny_model

FAMILIES = sorted(CONFIGS)


def padded_batch(documents, *, pad_to=None):
    """Right-padded `[B, T]` batch written out by hand, independent of packtrain's collator."""
    width = pad_to or max(len(d["input_ids"]) for d in documents)

    def pad(rows, fill):
        return torch.tensor([row + [fill] * (width - len(row)) for row in rows])

    labels = pad([[-100] + d["labels"][1:] for d in documents], -100)
    return {
        "input_ids": pad([d["input_ids"] for d in documents], 0),
        "attention_mask": pad([[1] * len(d["input_ids"]) for d in documents], 0),
        "labels": labels,
        "loss_weights": (labels != -100).float(),
    }


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(model, left, right):
    assert left.keys() == right.keys() and left
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_models_own_loss_and_gradients(family):
    batch = padded_batch(random_documents([5, 17, 9, 30]))
    model = tiny_model(family)

    own = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    own.backward()
    expected = gradients(model)
    model.zero_grad()

    losses = causal_lm_losses(model, batch)
    loss = losses.weighted_sum() / batch["loss_weights"].sum()
    loss.backward()

    torch.testing.assert_close(loss, own, rtol=1e-5, atol=0)
    assert_same_gradients(model, gradients(model), expected)


def test_the_head_runs_only_where_a_token_is_predicted():
    batch = padded_batch(random_documents([6, 11], prompt=4))
    model = tiny_model("llama")
    rows = []
    handle = model.lm_head.register_forward_hook(lambda _m, _args, out: rows.append(out.shape[:-1].numel()))
    losses = causal_lm_losses(model, batch)
    handle.remove()
    assert rows == [(6 - 4) + (11 - 4)] == [len(losses.nll)]
    model(input_ids=batch["input_ids"])  # and the hook is gone afterwards
    assert rows == [9] and not model.lm_head._forward_pre_hooks


def test_softcapping_after_the_head_is_kept():
    batch = padded_batch(random_documents([12]))
    capped = causal_lm_losses(tiny_model("gemma2", final_logit_softcapping=0.5), batch).nll
    free = causal_lm_losses(tiny_model("gemma2", final_logit_softcapping=None), batch).nll
    assert (capped - free).abs().max() > 1e-3
    assert (capped - torch.log(torch.tensor(64.0))).abs().max() <= 1.0  # logits within +-0.5 of each other


def test_index_points_at_the_targets():
    batch = padded_batch(random_documents([4, 6], prompt=2))
    losses = causal_lm_losses(tiny_model("llama"), batch)
    assert losses.index.tolist() == [2, 3, 8, 9, 10, 11]  # two rows of width 6, prompts of 2


def test_example_weights_scale_each_token():
    batch = padded_batch(random_documents([4, 8]))
    batch["loss_weights"][1] /= 6
    losses = causal_lm_losses(tiny_model("llama"), batch)
    expected = losses.nll[:2].sum() + losses.nll[2:].mean()
    torch.testing.assert_close(losses.weighted_sum(), expected)


def test_a_micro_batch_without_supervised_tokens_has_zero_loss_and_zero_gradients():
    batch = padded_batch(random_documents([5]))
    batch["labels"].fill_(-100)
    batch["loss_weights"].zero_()
    model = tiny_model("qwen3")
    loss = causal_lm_losses(model, batch).weighted_sum()
    loss.backward()
    assert loss.item() == 0.0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() == 0, name


def test_a_compiled_model_has_the_same_losses():
    """Twice in the same shapes: what was compiled for the positions of the first batch must not be used for others."""
    model = tiny_model("llama")
    compiled = torch.compile(model, backend="eager")
    for first, second in ((6, 11), (11, 6)):  # [2, 11] and 13 supervised tokens each
        batch = padded_batch(random_documents([first, second], seed=first))
        found = causal_lm_losses(compiled, batch, head=model.get_output_embeddings())
        torch.testing.assert_close(found.nll, causal_lm_losses(model, batch).nll)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ModelError, match="no output embeddings.*Linear"):
        output_head(nn.Linear(2, 2))


def test_a_model_that_does_not_call_its_head_is_refused():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(64, 8), nn.Linear(8, 64, bias=False)

        def get_output_embeddings(self):
            return self.head

        def forward(self, input_ids, **kwargs):
            return type("Output", (), {"logits": self.embed(input_ids) @ self.head.weight.T})

    with pytest.raises(ModelError, match="does not call its output embeddings"):
        causal_lm_losses(Functional(), padded_batch(random_documents([5])))
