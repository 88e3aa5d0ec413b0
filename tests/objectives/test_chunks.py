"""The loss in chunks equals that of whole logits, in value and in every gradient; where it can't, logits are whole."""

from __future__ import annotations

import logging

import peft
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from packtrain.objectives import chunks
from packtrain.objectives.causal import causal_lm_losses
from packtrain.objectives.logits import output_head
from packtrain.objectives.masked_diffusion.loss import masked_losses
from tests.objectives.test_causal import gradients, padded_batch
from tests.tiny import _DECODER, VOCABULARY, random_documents, tiny_model

ROWS = 7  # positions of a chunk; batches have more, and not a multiple
WHOLE = chunks.CHUNK_BYTES


def decoder(model_type: str, **changes) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **_DECODER | changes)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def biased() -> nn.Module:
    model = decoder("phi")
    nn.init.normal_(model.lm_head.bias)
    return model


def adapted(**lora) -> nn.Module:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **lora)
    return peft.get_peft_model(tiny_model("llama"), config)


MODELS = {
    "llama": lambda: tiny_model("llama"),
    "tied": lambda: tiny_model("qwen3", tie_word_embeddings=True),
    "bias": biased,
    "softcap": lambda: tiny_model("gemma2", final_logit_softcapping=0.3),
    "scaled up": lambda: decoder("cohere", logit_scale=3.0),
    "scaled down": lambda: decoder("granite", logits_scaling=0.17),
    "frozen head": lambda: adapted(target_modules=["q_proj", "v_proj"]),
    "adapter on the head": lambda: adapted(target_modules=["q_proj", "lm_head"]),
    "head trained next to adapters": lambda: adapted(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "trained rows": lambda: adapted(target_modules=["q_proj"], trainable_token_indices={"lm_head": [3, 9]}),
}
TRANSFORMS = {
    "softcap": chunks.Transform(1.0, pytest.approx(0.3)),
    "scaled up": chunks.Transform(pytest.approx(3.0)),
    "scaled down": chunks.Transform(pytest.approx(1 / 0.17)),
}


def batch_of(*lengths: int, seed: int = 0) -> dict[str, torch.Tensor]:
    batch = padded_batch(random_documents(list(lengths), seed=seed))
    generator = torch.Generator().manual_seed(seed)
    batch["loss_weights"] *= torch.rand(batch["loss_weights"].shape, generator=generator) + 0.2
    return batch


def both(monkeypatch, model, batch, losses=causal_lm_losses, factor=1 / 7):
    """Loss, nll and gradients from whole logits and in chunks, of a share of an update."""
    found = []
    for size in (WHOLE, 4 * VOCABULARY * ROWS):
        monkeypatch.setattr(chunks, "CHUNK_BYTES", size)
        scored = losses(model, batch, head=output_head(model))
        (scored.weighted_sum() * factor).backward()
        found.append((scored, gradients(model)))
        model.zero_grad()
    (whole, _), (chunked, _) = found
    assert whole.total is None and chunked.total is not None
    return found


def assert_same(found, tolerance=1e-5):
    (whole, expected), (chunked, gradient) = found
    torch.testing.assert_close(chunked.nll, whole.nll.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(chunked.weighted_sum(), whole.weighted_sum(), rtol=tolerance, atol=0)
    assert torch.equal(chunked.index, whole.index) and torch.equal(chunked.weights, whole.weights)
    assert gradient.keys() == expected.keys() and gradient
    for name, one in expected.items():
        size = float(one.norm())
        assert float((gradient[name] - one).norm()) <= tolerance * 10 * size + 1e-7, name


@pytest.mark.parametrize("name", MODELS)
def test_chunks_have_the_loss_and_gradients_of_whole_logits(monkeypatch, name):
    model = MODELS[name]()
    for batch in (batch_of(5, 17, 9, 30), batch_of(40, 3, seed=1)):  # the model is known at the second
        assert_same(both(monkeypatch, model, batch))
    weights = [weight for weight in output_head(model).parameters() if weight.requires_grad]
    assert bool(weights) == (name != "frozen head")


def test_a_second_batch_of_gradients_adds_up(monkeypatch):
    model, batch = tiny_model("llama"), batch_of(30, 12)
    ((_, once), _) = both(monkeypatch, model, batch)
    for _ in range(2):
        causal_lm_losses(model, batch).weighted_sum().mul(1 / 7).backward()
    twice = gradients(model)
    for name, one in once.items():
        torch.testing.assert_close(twice[name], 2 * one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_what_happens_after_the_head_is_found(monkeypatch, name):
    """And is not nothing: without it, losses differ."""
    model, batch = MODELS[name](), batch_of(30, 12)
    (_, (scored, _)) = both(monkeypatch, model, batch)
    found: list[chunks.Transform] = []
    apply = chunks.ChunkedLoss.apply

    def listen(*args):
        found.append(args[4])
        return apply(*args[:4], chunks.Transform(), *args[5:])

    monkeypatch.setattr(chunks.ChunkedLoss, "apply", listen)
    without = causal_lm_losses(model, batch)
    assert found == [TRANSFORMS[name]]
    assert (without.nll - scored.nll).abs().max() > 1e-3


@pytest.mark.parametrize("shift", [False, True])
def test_masked_tokens_are_scored_in_chunks(monkeypatch, shift):
    batch = batch_of(30, 12)
    batch["loss_weights"] *= torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(3)) < 0.6
    batch["example_ids"] = torch.tensor([0, 1])
    batch["supervised_index"] = batch["loss_weights"].flatten().nonzero().flatten()
    batch["has_padding"] = True

    def losses(model, batch, head):
        return masked_losses(model, batch, head=head, shift=shift)

    assert_same(both(monkeypatch, tiny_model("llama"), batch, losses))


@pytest.mark.parametrize("way", ["autocast", "weights"])
@pytest.mark.parametrize("name", ["llama", "tied", "softcap", "bias", "adapter on the head"])
def test_half_precision(monkeypatch, name, way):
    """In bfloat16 about as far from float32 as whole logits are."""
    exact = both(monkeypatch, MODELS[name](), batch_of(40, 30))[0][1]
    model = MODELS[name]()
    if way == "weights":
        model = model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        found = both(monkeypatch, model, batch_of(40, 30))
    assert_same(found, tolerance=0.01)
    whole, chunked = (
        torch.stack([(gradient[name].float() - one).norm() for name, one in exact.items()]).norm()
        for _, gradient in found
    )
    assert chunked <= 1.5 * whole  # gradients are rounded once more, when they get their factor
    assert all(found[1][1][name].dtype == one.dtype for name, one in found[0][1].items())


def test_a_weight_that_many_chunks_add_to_is_summed_in_float32(monkeypatch):
    """Control: summed in bfloat16, its gradient loses what is small next to the sum."""
    torch.manual_seed(0)
    head, hidden = nn.Linear(16, VOCABULARY, bias=False), torch.randn(1000, 16) + 1
    targets, weights = torch.zeros(1000, dtype=torch.int64), torch.ones(1000)

    def gradient(dtype: torch.dtype, rows: int) -> torch.Tensor:
        half = nn.Linear(16, VOCABULARY, bias=False).to(dtype)
        half.weight.data.copy_(head.weight)
        parts = (targets, weights, half, chunks.Transform(), rows, half.weight)
        chunks.ChunkedLoss.apply(hidden.to(dtype), *parts)[0].backward()
        return half.weight.grad.float()

    exact = gradient(torch.float32, 1000)
    error = {rows: float((gradient(torch.bfloat16, rows) - exact).norm() / exact.norm()) for rows in (1000, 2)}
    assert error[2] < 1.5 * error[1000]
    added = torch.zeros_like(head.weight, dtype=torch.bfloat16)
    for start in range(0, 1000, 2):
        part = hidden[start : start + 2].bfloat16()
        logits = (part @ head.weight.bfloat16().T).float()
        added += (
            logits.softmax(-1) - nn.functional.one_hot(targets[start : start + 2], VOCABULARY)
        ).bfloat16().T @ part
    assert float((added.float() - exact).norm() / exact.norm()) > 10 * error[2]


def test_float16_with_a_gradient_scaler(monkeypatch):
    """Small weights of tokens survive float16, as they do where a scaler multiplies the loss first."""
    torch.manual_seed(0)
    hidden, targets = torch.randn(40, 16), torch.arange(40)
    weights, scale = torch.full((40,), 1e-6), 2.0**20

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        torch.manual_seed(1)
        head = nn.Linear(16, VOCABULARY, bias=True).to(dtype)
        leaf = hidden.clone().to(dtype).requires_grad_()
        given = (targets, weights, head, chunks.Transform(), ROWS, *chunks.trained_parameters(head))
        (chunks.ChunkedLoss.apply(leaf, *given)[0] * scale).backward()
        return [one.grad.float() for one in (leaf, head.weight, head.bias)]

    exact = run(torch.float32)
    assert all(torch.allclose(*pair, rtol=0.02, atol=0.01) for pair in zip(run(torch.float16), exact, strict=True))
    monkeypatch.setattr(chunks, "FLOAT16_SIZE", 1e-6)  # control: weights as they are
    assert not all(torch.allclose(*pair, rtol=0.02, atol=0.01) for pair in zip(run(torch.float16), exact, strict=True))


def test_evaluation_computes_no_gradient(monkeypatch):
    model, batch = tiny_model("gemma2", final_logit_softcapping=0.3), batch_of(30, 12)
    whole, chunked = both(monkeypatch, model, batch)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            found = causal_lm_losses(model, batch)
        assert found.total is not None and not found.total.requires_grad
        torch.testing.assert_close(found.nll, whole[0].nll.detach(), rtol=1e-5, atol=1e-6)


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that anything makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.numel())
        return result


def test_logits_never_exist_at_once(monkeypatch):
    model, batch = tiny_model("llama"), batch_of(*[60] * 8)
    count = int((batch["labels"] != -100).sum())
    both(monkeypatch, model, batch)
    with Largest() as chunked:
        causal_lm_losses(model, batch).weighted_sum().backward()
    monkeypatch.setattr(chunks, "CHUNK_BYTES", WHOLE)
    with Largest() as whole:
        causal_lm_losses(tiny_model("llama"), batch).weighted_sum().backward()
    assert whole.elements == count * VOCABULARY  # control
    assert chunked.elements < count * VOCABULARY


def test_few_positions_have_whole_logits_and_no_second_pass(monkeypatch):
    model, passes = tiny_model("llama"), []
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    batch = batch_of(9)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 4 * VOCABULARY * ROWS)  # seven supervised
    assert causal_lm_losses(model, batch).total is None and len(passes) == 1
    assert causal_lm_losses(model, batch_of(10)).total is not None and len(passes) == 3  # eight: once more to compare
    assert causal_lm_losses(model, batch_of(11)).total is not None and len(passes) == 4
    handle.remove()
    assert not model.lm_head._forward_hooks and not model.lm_head._forward_pre_hooks


def add_to_logits(model):
    """Something that depends on the token, which is no scale or softcap."""
    model.lm_head.register_forward_hook(lambda _m, _args, logits: logits + torch.arange(logits.shape[-1]) * 0.01)
    return model


def hide_tokens(model):
    def hide(_module, _args, output):
        output.logits[..., 5] = -1e4
        return output

    model.register_forward_hook(hide)
    return model


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda: add_to_logits(tiny_model("llama")), "neither a scale nor a softcap"),
        (lambda: hide_tokens(tiny_model("llama")), "neither a scale nor a softcap"),
        (lambda: adapted(target_modules=["lm_head"], lora_dropout=0.5).train(), "losses of the head differ"),
    ],
    ids=["bias after the head", "hidden tokens", "dropout of an adapter"],
)
def test_whole_logits_where_chunks_would_differ(monkeypatch, caplog, build, why):
    model, batch = build(), batch_of(30, 12)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 4 * VOCABULARY * ROWS)
    with caplog.at_level(logging.WARNING):
        found = [causal_lm_losses(model, batch, head=output_head(model)) for _ in range(2)]
    assert [one.total for one in found] == [None, None]
    (message,) = (record.message for record in caplog.records if "whole logits" in record.message)  # once
    assert message.startswith("losses are computed from whole logits, which takes more memory: ") and why in message


def test_a_head_whose_gradient_is_wrong_in_chunks_is_noticed():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight):
            return weight.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * (2 if len(seen) == 1 else 1)

    class Head(nn.Linear):
        def forward(self, hidden):
            seen.append(len(hidden))
            return nn.functional.linear(hidden, Doubled.apply(self.weight))

    seen: list[int] = []
    assert chunks.check_gradients(Head(8, VOCABULARY), torch.randn(8, 8)) == "gradients"
    assert chunks.check_gradients(nn.Linear(8, VOCABULARY), torch.randn(8, 8)) is None


def test_looking_draws_no_random_numbers(monkeypatch):
    """A model with dropout takes the same updates whether or not it was looked at."""
    model = tiny_model("gpt2", resid_pdrop=0.3).train()
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 4 * VOCABULARY * ROWS)
    losses = []
    for _ in range(2):  # the second finds the model known
        torch.manual_seed(5)
        losses.append(causal_lm_losses(model, batch_of(30, 12)).nll)
    assert torch.equal(*losses)


def test_checkpointed_layers_and_frozen_embeddings(monkeypatch):
    model = adapted(target_modules="all-linear").train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    assert_same(both(monkeypatch, model, batch_of(30, 12)))


@pytest.mark.ci
@pytest.mark.slow  # compiles three times
def test_a_compiled_model(monkeypatch):
    model = tiny_model("gemma2", final_logit_softcapping=0.3)
    compiled = torch.compile(model, backend="eager")
    for seed, lengths in enumerate([(12, 22), (22, 12), (12, 22)]):
        batch = batch_of(*lengths, seed=seed)
        expected, _ = both(monkeypatch, model, batch)
        found = causal_lm_losses(compiled, batch, head=output_head(model))
        found.weighted_sum().mul(1 / 7).backward()
        assert_same([expected, (found, gradients(model))])
        model.zero_grad()


@pytest.mark.parametrize("scale", [1.0, 0.0625, 1 / 3, -2.0])
@pytest.mark.parametrize("cap", [None, 0.5, 30.0, 50.0])
def test_transforms_are_fitted(scale, cap):
    transform = chunks.Transform(scale, None if cap is None else cap)
    known = chunks.known_logits(VOCABULARY, torch.device("cpu"))
    found = chunks.fit_transform(known, transform(known))
    if cap is not None and scale < 0:  # the cap takes the sign
        assert found is None or chunks.same(found(known), transform(known), 1e-5)
        return
    assert found == chunks.Transform(pytest.approx(scale, rel=1e-6), None if cap is None else pytest.approx(cap))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.clamp(-30, 30),
        lambda x: x + 1,
        lambda x: x.log_softmax(-1),
        lambda x: torch.where(x > 0, x, 0.5 * x),
        lambda x: x[:-1],
        lambda x: x * 0,
        lambda x: x * torch.nan,
        lambda x: 30 * torch.sin(x / 30),
    ],
)
def test_other_functions_are_not_fitted(change):
    known = chunks.known_logits(VOCABULARY, torch.device("cpu"))
    assert chunks.fit_transform(known, change(known)) is None
