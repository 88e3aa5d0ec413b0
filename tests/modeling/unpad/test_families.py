"""An unpadded model gives the loss, the gradients and the hidden states of the padded one, whatever its family and head."""

from __future__ import annotations

import pytest
import torch

from packtrain.errors import ModelError
from packtrain.modeling.unpad import unpad
from tests.modeling.unpad.helpers import EXACT, Leak, apart, difference, flat_calls, given, headed, ragged

DECODERS = ("llama", "qwen3", "gemma3_text", "gpt2", "opt", "mixtral", "qwen3_moe")
ENCODERS = ("bert", "roberta", "modernbert", "distilbert", "electra")
CASES = [
    *((name, head) for name in DECODERS for head in ("causal", "sequence", "token", "backbone")),
    *((name, head) for name in ENCODERS for head in ("masked", "sequence", "token", "backbone")),
]
CASES.remove(("opt", "token"))  # transformers has no such head
CASES.remove(("gemma3_text", "token"))


QUICK = ("llama", "gemma3_text", "gpt2", "bert", "roberta", "mixtral")
LONG = [pytest.mark.slow, pytest.mark.ci]


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize(
    ("architecture", "head"), [pytest.param(*case, marks=[] if case[0] in QUICK else LONG) for case in CASES]
)
def test_loss_gradients_and_hidden_states_are_those_of_the_padded_model(architecture, head, left):
    model, batch = headed(architecture, head), ragged(head, left=left)
    pools = architecture in ENCODERS and (head == "sequence" or (head == "backbone" and hasattr(model, "pooler")))
    if left and pools:  # the first column is pooled, and there it is padding: such batches stay padded
        padded = given(model, batch)
        with unpad(model) as unpadding:
            assert flat_calls(model, unpadding.modules[0], batch) == 0
            assert apart(padded, given(model, batch)) <= EXACT
        return
    assert difference(model, batch) <= EXACT


@pytest.mark.parametrize(("architecture", "head"), [("llama", "causal"), ("bert", "token"), ("bert", "backbone")])
def test_the_comparison_sees_a_leak(architecture, head):
    model, batch = headed(architecture, head), ragged(head)
    padded = given(model, batch)
    with unpad(model) as unpadding:
        leak = model.get_submodule(unpadding.modules[0]).register_forward_pre_hook(Leak(), with_kwargs=True)
        assert apart(padded, given(model, batch)) > 1e-2
        leak.remove()
        assert apart(padded, given(model, batch)) <= EXACT


@pytest.mark.parametrize("head", ["sequence", "backbone", "masked"])
def test_a_pooler_that_is_a_matrix_and_an_activation(head):
    assert difference(headed("albert", head), ragged(head)) <= EXACT


@pytest.mark.parametrize("architecture", ["llama", "bert", "modernbert"])
def test_question_answering_reads_padding_and_is_refused(architecture):
    """Its softmax is over all columns, padding included, whose hidden states nobody computes any more."""
    with pytest.raises(ModelError, match="reads padding: its `loss`"):
        unpad(headed(architecture, "answers"))


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("left", [False, True])
def test_router_loss(architecture, left):
    model = headed(architecture, "causal", output_router_logits=True)
    batch = ragged(left=left)
    assert model(**batch).aux_loss > 0
    assert difference(model, batch) <= EXACT


def test_a_router_loss_over_padding_is_seen():
    """The real one knows the mask; this one forgets it."""
    model = headed("mixtral", "causal", output_router_logits=True)

    class Forgets(type(model)):  # type: ignore[misc]
        def forward(self, input_ids=None, attention_mask=None, **kwargs):
            output = self.model(input_ids, attention_mask, output_router_logits=True, **kwargs)
            output["aux_loss"] = torch.stack(output.router_logits).softmax(-1).pow(2).mean()
            return output

    model.__class__ = Forgets
    with pytest.raises(ModelError, match="`aux_loss`"):
        unpad(model)


@pytest.mark.parametrize(
    "architecture",
    ["gpt2", "opt", "bert", "roberta", *(pytest.param(name, marks=LONG) for name in ("distilbert", "electra", "esm"))],
)
def test_a_flat_row_may_be_longer_than_the_models_positions(architecture):
    head = "causal" if architecture in DECODERS else "masked"
    model = headed(architecture, head)
    lengths = (90, 100, 80)
    assert sum(lengths) > model.config.max_position_embeddings
    assert difference(model, ragged(head, lengths=lengths)) <= EXACT


@pytest.mark.parametrize("left", [False, True])
def test_embeddings_in_place_of_ids(left):
    model, batch = headed("qwen3", "causal"), ragged(left=left)
    embeddings = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    assert difference(model, batch | {"inputs_embeds": embeddings}) <= EXACT


def test_token_types_and_positions_that_are_given():
    model, batch = headed("bert", "masked"), ragged("masked")
    batch["token_type_ids"] = (torch.arange(19) % 2).expand(4, -1) * batch["attention_mask"]
    batch["position_ids"] = torch.arange(19).flip(0).expand(4, -1)
    assert difference(model, batch) <= EXACT


def test_a_mask_of_bools_and_one_of_floats():
    model, batch = headed("llama", "causal"), ragged()
    padded = given(model, batch)
    with unpad(model):
        for dtype in (torch.bool, torch.float32):
            changed = batch | {"attention_mask": batch["attention_mask"].to(dtype)}
            assert flat_calls(model, "model", changed) == 1
            assert apart(padded, given(model, changed)) <= EXACT


def test_bfloat16():
    model, batch = headed("llama", "causal").bfloat16(), ragged()
    assert difference(model, batch) <= 4e-2


@pytest.mark.parametrize("as_tuple", [False, True])
def test_outputs_as_a_tuple(as_tuple):
    model, batch = headed("bert", "backbone"), ragged("backbone")
    padded = model(**batch, return_dict=not as_tuple)
    with unpad(model):
        flat = model(**batch, return_dict=not as_tuple)
    assert type(flat) is type(padded)
    torch.testing.assert_close(flat[0][batch["attention_mask"].bool()], padded[0][batch["attention_mask"].bool()])
    torch.testing.assert_close(flat[1], padded[1])


def test_two_towers_in_a_module_of_ones_own():
    towers = torch.nn.ModuleDict({"query": headed("bert", "backbone"), "document": headed("qwen3", "backbone")})
    batch = ragged("backbone")
    padded = {name: given(tower, batch) for name, tower in towers.items()}
    with unpad(towers) as unpadding:
        assert unpadding.modules == ["query", "document"]
        for name, tower in towers.items():
            assert flat_calls(tower, "", batch) == 1
            assert apart(padded[name], given(tower, batch)) <= EXACT
