"""What can't run without padding is refused with the cause, and is as it was."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from packtrain.errors import ModelError
from packtrain.modeling.audit.models import tiny_model
from packtrain.modeling.equality import short_windows, stretches_at
from packtrain.modeling.flatten import Flatten
from packtrain.modeling.unpad import find_borders, unpad
from tests.modeling.unpad.helpers import EXACT, apart, flat_calls, given, headed, ragged
from tests.modeling.unpad.test_hooks import hooks_of, implementations

CAUSES = {
    "convbert": "does not look up its attention by name",
    "t5": "is an encoder with a decoder",
    "clip": "pools its rows itself",
}


@pytest.mark.parametrize("architecture", CAUSES)
def test_refused_with_the_cause(architecture):
    model = tiny_model(architecture)
    attention, weights = implementations(model), {name: part.clone() for name, part in model.state_dict().items()}
    with pytest.raises(ModelError, match=CAUSES[architecture]) as refused:
        unpad(model)
    assert refused.value.fix
    assert implementations(model) == attention and not hooks_of(model)
    assert all(torch.equal(part, weights[name]) for name, part in model.state_dict().items())


def test_short_convolutions_are_seen_where_there_are_any():
    layers = {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}
    (inside,) = unpad(tiny_model("lfm2", **layers)).inside
    assert inside.says() == "padded inside: 1 mixer (Lfm2ShortConv)"
    assert not unpad(tiny_model("lfm2", **layers | {"layer_types": ["full_attention"] * 2})).inside


def test_counting_mask_tokens_is_seen():
    """ESM scales embeddings by the share of mask tokens in a row, which in a flat row is that of all."""
    with pytest.raises(ModelError, match="EsmModel does not give the same"):
        unpad(tiny_model("esm", token_dropout=True))
    unpad(tiny_model("esm", token_dropout=False))


def test_windows_are_cut_for_the_proof_and_restored():
    model = headed("gemma3_text", "causal")
    for module in (model.config, *model.modules()):
        if getattr(module, "sliding_window", None):
            module.sliding_window = 4096
    layers = [layer.self_attn.sliding_window for layer in model.model.layers]
    with short_windows([model.model]):
        assert model.config.sliding_window == 6
        assert {layer.self_attn.sliding_window for layer in model.model.layers} == {6, None}
    assert model.config.sliding_window == 4096
    assert [layer.self_attn.sliding_window for layer in model.model.layers] == layers


def test_a_layer_that_keeps_its_window_to_itself_is_seen():
    """With rows shorter than its window nothing would be."""
    model = tiny_model("gemma3_text", sliding_window=4096)

    def without(module, args, kwargs):
        module.sliding_window = None

    model.model.layers[0].self_attn.register_forward_pre_hook(without, with_kwargs=True)
    with pytest.raises(ModelError):
        unpad(model)
    assert model.config.sliding_window == 4096
    unpad(tiny_model("gemma3_text", sliding_window=4096))


# --------------------------------------------------------------------------- positions that depend on the batch


def stretched(kind):
    factors = {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4} if kind == "longrope" else {"factor": 4.0}
    rope = {"rope_type": kind, "rope_theta": 10000.0, **factors}
    rope |= {"original_max_position_embeddings": 16} if kind == "longrope" else {}
    return tiny_model("llama", rope_parameters=rope, max_position_embeddings=16)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rotary_embeddings_that_depend_on_the_longest_row(kind):
    """A row as long as the batch is wide settles it; where there is none, the padding did, and stays."""
    model = stretched(kind)
    assert stretches_at(model) == 16 and stretches_at(headed("llama", "causal")) is None
    full, wide = ragged(lengths=(7, 24, 12)), ragged(lengths=(7, 24, 12))
    for name, part in wide.items():
        wide[name] = torch.nn.functional.pad(part[:, :12], (0, 8), value=-100 if name == "labels" else 0)
    wide["attention_mask"][:, 12:] = 0
    wide["labels"][:, 12:] = -100
    before = {name: given(stretched(kind), batch) for name, batch in (("full", full), ("wide", wide))}
    unpad(model)
    assert flat_calls(model, "model", full) == 1 and apart(before["full"], given(model, full)) <= EXACT
    other = stretched(kind)
    unpad(other)
    assert flat_calls(other, "model", wide) == 0 and apart(before["wide"], given(other, wide)) <= EXACT


# ------------------------------------------------------------------------------------------- naming a module


def test_a_module_by_name_or_itself():
    model, batch = headed("llama", "causal"), ragged()
    for module in ("model", model.model):
        with unpad(model, module=module) as unpadding:
            assert unpadding.modules == ["model"] and flat_calls(model, "model", batch) == 1


@pytest.mark.parametrize("module", ["nowhere", "lm_head", "model.layers.0"])
def test_a_module_that_is_not_one(module):
    with pytest.raises(ModelError, match="module"):
        find_borders(headed("llama", "causal"), module)


def test_a_module_without_any():
    with pytest.raises(ModelError, match="no decoder or encoder"):
        unpad(torch.nn.Linear(2, 2))


def test_a_model_that_gives_its_decoder_another_mask():
    """Its decoder alone is equal, but would never run flat."""
    model = headed("llama", "causal")

    class Masks(type(model)):  # type: ignore[misc]
        def forward(self, input_ids=None, attention_mask=None, **kwargs):
            width = attention_mask.shape[1]
            seen = torch.ones(width, width, dtype=torch.bool).tril() & attention_mask[:, None, None].bool()
            return super().forward(input_ids, seen, **kwargs)

    model.__class__ = Masks
    with pytest.raises(ModelError, match="something else than a mask of its rows"):
        unpad(model)
    assert not hooks_of(model)


@pytest.mark.parametrize("maker", [AutoModel, AutoModelForCausalLM])
def test_the_proof_reads_heads_that_read_padding(maker):
    model = maker.from_config(tiny_model("llama").config).eval()

    class Means(type(model)):  # type: ignore[misc]
        def forward(self, input_ids=None, attention_mask=None, **kwargs):
            output = super().forward(input_ids, attention_mask, **kwargs)
            output["mean"] = output[0].mean(1)
            return output

    model.__class__ = Means
    with pytest.raises(ModelError, match="mean"):
        unpad(model)


# ------------------------------------------------------------------------------------- weights that are elsewhere


@pytest.mark.parametrize(
    ("architecture", "head"), [("llama", "causal"), ("roberta", "token"), ("bert", "sequence"), ("qwen3_moe", "causal")]
)
def test_a_small_model_stands_for_one_in_shards(architecture, head):
    """ZeRO-3 marks its weights like this, and leaves them empty until the engine runs."""
    model, batch = headed(architecture, head), ragged(head)
    padded = given(model, batch)
    found = [hook for hook in _hooks(architecture, head) if type(hook) is Flatten]
    next(model.parameters()).ds_id = 0
    empty = {name: weight.data for name, weight in model.named_parameters()}
    for weight in model.parameters():
        weight.data = torch.empty(0)
    unpad(model)
    for name, weight in model.named_parameters():
        weight.data = empty[name]
    assert [hook for hook in hooks_of(model) if type(hook) is Flatten] == found
    assert apart(padded, given(model, batch)) <= EXACT


def _hooks(architecture, head):
    model = headed(architecture, head)
    unpad(model)
    return hooks_of(model)


def test_a_small_model_is_refused_for_the_same_cause():
    for model, cause in (
        (headed("bert", "answers"), "reads padding: its `loss`"),
        (tiny_model("convbert"), CAUSES["convbert"]),
        (tiny_model("mamba"), "layers that are to be padded inside"),  # by hooks, of which the small model has its own
    ):
        next(model.parameters()).ds_id = 0
        with pytest.raises(ModelError, match=cause):
            unpad(model)
        assert not hooks_of(model)
