"""Adapters, checkpointing, compilation and several processes, around or inside of an unpadded model."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

from packtrain.errors import ModelError
from packtrain.modeling.audit.settings import switch_checkpointing
from packtrain.modeling.unpad import unpad
from tests.modeling.unpad.helpers import EXACT, apart, difference, flat_calls, given, headed, ragged

peft = pytest.importorskip("peft")


def adapted(model, **options):
    config = peft.LoraConfig(**{"r": 4, "init_lora_weights": False, "target_modules": ["q_proj", "v_proj"]} | options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return peft.get_peft_model(model, config).eval()


# ------------------------------------------------------------------------------------------------ adapters


@pytest.mark.parametrize("head", ["causal", "sequence", "token"])
@pytest.mark.parametrize("first", ["adapter", "unpad"])
def test_an_adapter_before_and_after(head, first):
    batch, options = ragged(head), {} if head == "causal" else {"modules_to_save": ["score"]}
    padded = given(adapted(headed("llama", head), **options), batch)
    model = headed("llama", head)
    if first == "unpad":
        unpad(model)
    model = adapted(model, **options)
    if first == "adapter":
        unpad(model)
    assert flat_calls(model, "base_model.model.model", batch) == 1
    assert apart(padded, given(model, batch)) <= EXACT
    with model.disable_adapter():  # as for the reference of DPO
        assert flat_calls(model, "base_model.model.model", batch) == 1
        without = model(**batch)
    torch.testing.assert_close(without.loss, headed("llama", head)(**batch).loss, rtol=1e-6, atol=0)


def test_embeddings_that_are_trained_with_an_adapter():
    model = adapted(headed("llama", "causal"), modules_to_save=["embed_tokens", "lm_head"])
    batch = ragged()
    padded = given(model, batch)
    with unpad(model):
        assert apart(padded, given(model, batch)) <= EXACT


def test_an_adapter_whose_matrices_are_zero_is_asked_with_others():
    """And gets its zeros back. A leak through the adapter alone shows only then."""
    model = adapted(headed("llama", "causal"), init_lora_weights=True)
    zeros = {name for name, weight in model.named_parameters() if not weight.any()}
    assert zeros
    with unpad(model):
        assert {name for name, weight in model.named_parameters() if not weight.any()} == zeros

    def mix(module, args, output):
        return output + output.mean((0, 1))

    model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].register_forward_hook(mix)
    with pytest.raises(ModelError, match="does not give the same"):
        unpad(model)
    assert {name for name, weight in model.named_parameters() if not weight.any()} == zeros


def test_virtual_tokens_keep_their_padding():
    """Prompt tuning passes embeddings, prefix tuning a cache."""
    for config in (
        peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = peft.get_peft_model(headed("llama", "causal"), config).eval()
        batch = ragged()
        padded = model(**batch).loss
        unpad(model.get_base_model())
        torch.testing.assert_close(model(**batch).loss, padded, rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------ checkpointing, compilation


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("architecture", "head"), [("llama", "causal"), ("bert", "masked"), ("gemma3_text", "causal")])
def test_gradient_checkpointing(architecture, head, reentrant):
    model, batch = headed(architecture, head), ragged(head)
    padded = given(model, batch, output_hidden_states=False)
    switch_checkpointing(model, "enable", {"use_reentrant": reentrant})
    model.train()
    with unpad(model):
        assert apart(padded, given(model, batch, output_hidden_states=False)) <= EXACT


def test_a_call_that_asks_for_weights_does_not_reach_into_a_recomputation():
    """The layers of the first call are computed again after the second one has used the model's own attention."""
    model, batch = headed("llama", "causal"), ragged()
    model.set_attn_implementation("eager")
    padded = given(model, batch, output_hidden_states=False)
    switch_checkpointing(model, "enable", {"use_reentrant": False})
    model.train()
    unpad(model)
    model.zero_grad()
    loss = model(**batch).loss
    with torch.no_grad():
        assert model(**batch, output_attentions=True).attentions[0] is not None
    loss.backward()
    flat = {f"gradient {name}": weight.grad for name, weight in model.named_parameters()}
    assert apart({name: part for name, part in padded.items() if name in flat}, flat) <= EXACT


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "head"), [("llama", "causal"), ("bert", "masked")])
def test_torch_compile(architecture, head):
    model, batches = headed(architecture, head), (ragged(head), ragged(head, left=True), ragged(head, lengths=(4, 19)))
    padded = [given(model, batch, output_hidden_states=False) for batch in batches]
    unpad(model)
    compiled = torch.compile(model, backend="eager")
    for before, batch in zip(padded, batches, strict=True):
        found = given(compiled, batch, output_hidden_states=False)
        found = {name.replace("_orig_mod.", ""): part for name, part in found.items()}
        assert apart(before, found) <= EXACT


@pytest.mark.slow
def test_one_graph_is_refused_with_the_reason():
    """Control: without the hooks there is one graph."""
    model, batch = headed("llama", "causal"), ragged()
    unpadding = unpad(model)
    with pytest.raises(Exception, match="packtrain.unpad keeps the real tokens .*compile with fullgraph=False"):
        torch.compile(model, backend="eager", fullgraph=True)(**batch)
    torch.compiler.reset()
    whole = torch.compile(model, backend="eager")(**batch).loss
    torch.testing.assert_close(whole, model(**batch).loss, rtol=1e-6, atol=0)
    unpadding.remove()
    torch.compiler.reset()
    torch.compile(model, backend="eager", fullgraph=True)(**batch)


def test_dropout_in_training_is_drawn_anew():
    """Nothing compares padded and flat dropout; both are finite, and the mode is the caller's."""
    model, batch = (
        headed("bert", "masked", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1).train(),
        ragged("masked"),
    )
    unpad(model)
    assert model.training and model.config.hidden_dropout_prob == 0.1
    assert model(**batch).loss != model(**batch).loss


# ------------------------------------------------------------------------------------------- several processes


@pytest.mark.slow
@pytest.mark.ci
def test_two_processes():
    """DistributedDataParallel over gloo: gradients are the mean of those of two padded models."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    done = subprocess.run([*command, "tests.programs.unpadded_ranks"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_the_proof_of_a_larger_model():
    """110 million weights: the gradients of the embeddings stand for all, and a leak is still seen."""
    model = headed("bert", "masked")
    config = copy.deepcopy(model.config)
    for name, value in {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072}.items():
        setattr(config, name, value)
    config.vocab_size, config.num_attention_heads = 30522, 12
    large = type(model)(config).eval()
    assert sum(weight.numel() for weight in large.parameters()) > 85e6
    assert difference(large, ragged("masked")) <= EXACT
